"""Fill Hugging Face caches natively, all or nothing.

A ``CacheTransaction`` gives ``pop::prefill`` one key and one value tensor per layer,
``[batch, kv_heads, slots, head_dim]``. The cache holds the new tokens only after ``commit``. ``abort`` leaves it as it
was before the call.

| layer class           | the operator writes                            | ``commit``                      |
|-----------------------|------------------------------------------------|---------------------------------|
| ``DynamicLayer``      | new tensors of past + new slots                | the layer takes the new tensors |
| ``StaticLayer``       | the layer's tensors, whose new slots are saved | the layer's length grows        |
| sliding-window layers | new tensors of past + new slots                | ``layer.update``                |
| quantised layers      | new tensors of past + new slots                | ``layer.update``                |
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from pop_ext.hf.restore import Saved, restore, save


class UnsupportedCacheError(ValueError):
    """Raised for a kind of cache that the native prefill cannot fill."""


class _LayerTransaction(Protocol):
    """Fill the cache of one layer.

    Attributes:
        key, value: ``[batch, kv_heads, slots, head_dim]``, read and written by the operator.
    """

    key: torch.Tensor
    value: torch.Tensor

    def commit(self) -> None:
        """Make the layer hold the new tokens."""

    def abort(self) -> None:
        """Make the layer what it was before the call."""


def _new_buffer(like: torch.Tensor, batch: int, slots: int, zero: bool) -> torch.Tensor:
    """Make a tensor ``[batch, kv_heads, slots, head_dim]`` with the sizes, dtype and device of ``like``.

    Args:
        like: ``[*, kv_heads, *, head_dim]``.
        batch: sequences.
        slots: cache slots of each.
        zero: fill it with zeros. Otherwise it is uninitialised.
    """
    shape = (batch, like.shape[1], slots, like.shape[3])
    return like.new_zeros(shape) if zero else like.new_empty(shape)


class _DynamicTransaction:
    """Grow a dynamic layer as ``torch.cat`` would, but copy only the past: the operator writes the new tokens."""

    def __init__(self, layer: Any, like: torch.Tensor, batch: int, past: int, new: int, zero: bool) -> None:
        self.layer = layer
        self.key = _new_buffer(like, batch, past + new, zero=zero)
        self.value = _new_buffer(like, batch, past + new, zero=zero)
        if past > 0:
            self.key[:, :, :past] = layer.keys
            self.value[:, :, :past] = layer.values
        self._before = dict(layer.__dict__)

    def commit(self) -> None:
        self.layer.keys = self.key
        self.layer.values = self.value

    def abort(self) -> None:
        restore(self.layer.__dict__, self._before, [])


def _initialise(empty: list[_DynamicTransaction]) -> None:
    """Initialise dynamic layers that hold no tensors yet.

    ``lazy_initialization`` allocates two tensors, which ``commit`` replaces at once. So it is called for the first
    layer only, and the others copy its attributes.
    """
    empty[0].layer.lazy_initialization(empty[0].key, empty[0].value)
    for other in empty[1:]:
        vars(other.layer).update(vars(empty[0].layer))


class _StaticTransaction:
    """Write into the tensors of a static layer. Their addresses must not change (CUDA graphs, ``torch.compile``)."""

    def __init__(self, layer: Any, like: torch.Tensor, batch: int, past: int, new: int, zero: bool) -> None:
        if past + new > layer.max_cache_len:
            raise ValueError(
                f"past_key_values: expected room for {past + new} positions (past and new tokens), "
                f"got a static cache of {layer.max_cache_len}"
            )
        self._layer = layer
        self._new = new
        self._columns = slice(past, past + new)
        self._before = dict(layer.__dict__)
        self._saved = save([layer.cumulative_length])
        if layer.is_initialized:
            self._saved += save([cache[:, :, self._columns] for cache in (layer.keys, layer.values)])
        else:
            empty = _new_buffer(like, batch, 0, zero=False)
            layer.lazy_initialization(empty, empty)
        self.key = layer.keys
        self.value = layer.values

    def clear_padding(self, padding: torch.Tensor) -> None:
        """Zero the new slots of padding, which may hold tokens of an earlier use of the cache.

        Args:
            padding: ``[batch, new]`` bool, True where a new slot holds no token.
        """
        for cache in (self.key, self.value):
            cache[:, :, self._columns].masked_fill_(padding[:, None, :, None].to(cache.device), 0)

    def commit(self) -> None:
        self._layer.cumulative_length.add_(self._new)

    def abort(self) -> None:
        restore(self._layer.__dict__, self._before, self._saved)


class _UpdateTransaction:
    """Let the operator fill tensors of past + new slots, and pass the new ones to the layer's own ``update``.

    Past slots that the layer no longer has are zero. No query of this call reaches them.
    """

    def __init__(self, layer: Any, like: torch.Tensor, batch: int, past: int, new: int, zero: bool) -> None:
        self._layer = layer
        self._past = past
        self._before = dict(layer.__dict__)
        self._saved: Saved = []
        stored = (
            self._stored(_new_buffer(like, batch, 0, zero=False), past) if layer.is_initialized and past > 0 else None
        )
        first = past if stored is None else past - stored[0].shape[2]
        self.key = _new_buffer(like, batch, past + new, zero=zero or first > 0)
        self.value = _new_buffer(like, batch, past + new, zero=zero or first > 0)
        if stored is not None:
            self.key[:, :, first:past], self.value[:, :, first:past] = stored

    def _stored(self, nothing: torch.Tensor, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of past positions, as many of the last ones as the layer still has.

        Args:
            nothing: K or V of no position, ``[batch, kv_heads, 0, head_dim]``.
            past: positions that the layer has seen.
        """
        raise NotImplementedError

    def commit(self) -> None:
        self._layer.update(self.key[:, :, self._past :], self.value[:, :, self._past :])

    def abort(self) -> None:
        restore(self._layer.__dict__, self._before, self._saved)


class _SlidingTransaction(_UpdateTransaction):
    """Fill a sliding-window layer, which keeps only the last positions."""

    def __init__(self, layer: Any, like: torch.Tensor, batch: int, past: int, new: int, zero: bool) -> None:
        super().__init__(layer, like, batch, past, new, zero)
        # update of a dynamic layer makes new tensors; that of a static layer writes into the existing ones.
        in_place: list[Any] = []
        if isinstance(layer, StaticLayer):
            in_place = [layer.keys, layer.values, layer.cumulative_length]
        self._saved = save([tensor for tensor in in_place if tensor is not None])

    def _stored(self, nothing: torch.Tensor, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self._layer
        stored = min(past, layer.keys.shape[-2])
        # A static layer that is not full has its tokens in front. In a full one every slot is a token.
        kept = slice(0, stored) if isinstance(layer, StaticLayer) else slice(layer.keys.shape[-2] - stored, None)
        return layer.keys[:, :, kept], layer.values[:, :, kept]


class _QuantizedTransaction(_UpdateTransaction):
    """Fill a quantised layer: dequantise the past for the operator, quantise the new tokens in ``commit``.

    So the call itself attends to its own K and V unquantised, as the stock forward's first call does.
    """

    def _stored(self, nothing: torch.Tensor, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        # An update with no token returns the whole past: the quantised part, then the unquantised residual, with the
        # beams in their current order. It assigns attributes and writes into no tensor, so on a shallow copy it leaves
        # the layer unchanged.
        keys, values = copy.copy(self._layer).update(nothing, nothing)
        return keys.to(nothing.dtype), values.to(nothing.dtype)


_TRANSACTIONS: dict[type, type] = {
    DynamicLayer: _DynamicTransaction,
    StaticLayer: _StaticTransaction,
    DynamicSlidingWindowLayer: _SlidingTransaction,
    StaticSlidingWindowLayer: _SlidingTransaction,
}

# BaseQuantizedLayer exists from transformers 5.24 on. Its FP8 layers are no subclass of QuantizedLayer.
_QUANTIZED = getattr(cache_utils, "BaseQuantizedLayer", QuantizedLayer)


def _transaction_class(layer: Any) -> type | None:
    """Return the transaction class for a layer class, or None if such layers cannot be filled natively.

    Args:
        layer: a layer class; None for a cache that makes no layers by itself.
    """
    if layer is None:
        return None
    if issubclass(layer, _QUANTIZED) and layer.update.__module__ == cache_utils.__name__:
        return _QuantizedTransaction  # of any quantiser: Quanto, HQQ, FP8
    return _TRANSACTIONS.get(layer)


# A cache class that overrides one of these may do something else than its layers do.
_CACHE_METHODS = ("update", "get_seq_length", "get_mask_sizes", "get_query_offset")


def past_slots(cache: Cache | None) -> int:
    """Return the number of slots that the cache already holds, padding included."""
    return 0 if cache is None else int(cache.get_seq_length())


def check_cache(cache: Any, num_layers: int) -> None:
    """Check that a cache can be filled natively.

    Raises:
        UnsupportedCacheError: The cache, or one of its layers, is of a class that the native prefill cannot fill, or
            it has fewer layers than the model and cannot make the others.
        ValueError: The cache has more layers than the model.
        TypeError: The argument is no transformers Cache.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values: expected a transformers Cache, got {type(cache).__name__}")
    if not hasattr(cache, "layers"):
        raise UnsupportedCacheError(f"past_key_values: expected a cache of layers, got {type(cache).__name__}")
    for method in _CACHE_METHODS:
        if getattr(type(cache), method, None) is not getattr(Cache, method, None):
            raise UnsupportedCacheError(
                f"past_key_values: expected a cache with transformers' own {method}, got {type(cache).__name__}"
            )
    if getattr(cache, "offloading", False):
        raise UnsupportedCacheError("past_key_values: expected a cache on the model's device, got an offloaded one")
    for layer in cache.layers:
        if _transaction_class(type(layer)) is None:
            known = ", ".join(sorted(kind.__name__ for kind in (*_TRANSACTIONS, QuantizedLayer)))
            raise UnsupportedCacheError(f"past_key_values: expected layers of {known}, got {type(layer).__name__}")
    if len(cache.layers) > num_layers:
        raise ValueError(f"past_key_values: expected {num_layers} layers like the model, got {len(cache.layers)}")
    if len(cache.layers) < num_layers and _transaction_class(cache.layer_class_to_replicate) is None:
        raise UnsupportedCacheError(
            f"past_key_values: expected {num_layers} layers like the model, got {len(cache.layers)}"
        )


def check_windows(cache: Cache, windows: Sequence[int], positions: int) -> None:
    """Raise ValueError if a layer of the cache would drop a position that a later query still reaches.

    Args:
        cache: a checked cache (``check_cache``).
        windows: sliding window of each layer of the model, 0 for none.
        positions: slots that the cache must hold after the call.
    """
    for index, (layer, window) in enumerate(zip(cache.layers, windows, strict=False)):
        name = f"past_key_values: layer {index}"
        if isinstance(layer, DynamicSlidingWindowLayer):
            # The layer keeps one position less than the window: the next token takes the last place in it.
            length, kept = layer.sliding_window, layer.sliding_window - 1
        elif isinstance(layer, StaticSlidingWindowLayer):
            length = kept = layer.max_cache_len
        else:
            continue
        if positions <= kept or length >= window > 0:
            continue
        if window == 0:
            raise ValueError(f"{name}: expected all positions (full attention), got a window of {length}")
        raise ValueError(
            f"{name}: expected room for {positions} positions or a window of at least {window} like the model, "
            f"got a window of {length}"
        )


def has_window(cache: Cache) -> bool:
    """Return whether some layer keeps only a window of its positions."""
    return any(isinstance(layer, (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)) for layer in cache.layers)


def keeps_only_windows(cache: Cache, windows: Sequence[int], layers: Collection[int]) -> bool:
    """Return whether each of ``layers`` drops all positions before its window.

    Args:
        cache: a checked cache (``check_cache``).
        windows: sliding window of each layer of the model, 0 for none.
        layers: indices of the layers to look at.
    """
    for index in layers:
        layer = cache.layers[index] if index < len(cache.layers) else None
        if isinstance(layer, DynamicSlidingWindowLayer):
            if layer.sliding_window > windows[index] or getattr(layer, "record_past", False):
                return False
        elif not isinstance(layer, StaticSlidingWindowLayer) or layer.max_cache_len > windows[index]:
            return False
    return True


class CacheTransaction:
    """Fill the cache of one prefill call. End it with ``commit`` or ``abort``.

    Args:
        cache: a checked cache (``check_cache``).
        like: ``[*, kv_heads, *, head_dim]`` tensor with the cache's dtype and device.
        num_layers: layers of the model. The cache may have fewer; the others are added in ``commit``.
        batch: sequences.
        past: slots that the cache holds before the call.
        new: columns that the call adds.
        padding: ``[batch, new]`` bool, True where a new slot holds no token. None: no padding.
        left_out: layers in which the operator does not write all new slots.

    Raises:
        ValueError: A layer does not hold ``past`` positions, has tensors of another shape, dtype or device, or has no
            room for the new tokens. The cache is as it was.
    """

    def __init__(
        self,
        cache: Cache,
        like: torch.Tensor,
        num_layers: int,
        batch: int,
        past: int,
        new: int,
        padding: torch.Tensor | None,
        left_out: Collection[int] = (),
    ) -> None:
        self._cache = cache
        self._layers: list[Any] = list(cache.layers)
        make_layer: Any = cache.layer_class_to_replicate
        while len(self._layers) < num_layers:
            self._layers.append(make_layer())
        self._padding = padding
        self._transactions: list[_LayerTransaction] = []
        try:
            for index, layer in enumerate(self._layers):
                _check_layer(layer, index, like, batch, past)
                transaction: Any = _transaction_class(type(layer))
                # Where the operator leaves new slots unwritten, zero the buffers: no slot may be uninitialised.
                zero = padding is not None or index in left_out
                self._transactions.append(transaction(layer, like, batch, past, new, zero))
        except BaseException:
            self.abort()
            raise

    @property
    def key_cache(self) -> list[torch.Tensor]:
        """Keys of each layer, ``[batch, kv_heads, slots, head_dim]``, for the operator."""
        return [transaction.key for transaction in self._transactions]

    @property
    def value_cache(self) -> list[torch.Tensor]:
        """Values of each layer, ``[batch, kv_heads, slots, head_dim]``, for the operator."""
        return [transaction.value for transaction in self._transactions]

    def commit(self) -> None:
        """Make the cache hold the new tokens."""
        dynamic = [transaction for transaction in self._transactions if isinstance(transaction, _DynamicTransaction)]
        empty = [transaction for transaction in dynamic if not transaction.layer.is_initialized]
        if empty:
            _initialise(empty)
        for transaction in self._transactions:
            if self._padding is not None and isinstance(transaction, _StaticTransaction):
                transaction.clear_padding(self._padding)
            transaction.commit()
        self._cache.layers[:] = self._layers

    def abort(self) -> None:
        """Make the cache what it was before the call. Also right after a ``commit`` that failed."""
        for transaction in self._transactions:
            transaction.abort()


def _check_layer(layer: Any, index: int, like: torch.Tensor, batch: int, past: int) -> None:
    """Raise ValueError unless a layer holds ``past`` positions in tensors that fit ``like`` and ``batch``."""
    if not layer.is_initialized:
        if past > 0:
            raise ValueError(f"past_key_values: expected {past} positions in layer {index}, got none")
        return
    name = f"past_key_values: layer {index}"
    length = int(layer.get_seq_length())
    if length != past:
        raise ValueError(f"{name}: expected {past} positions like layer 0, got {length}")
    # An initialised but empty dynamic layer has keys of shape [0].
    for kind, tensor in (("keys", layer.keys), ("values", layer.values)):
        if tensor.numel() == 0:
            continue
        if tensor.dtype != like.dtype or tensor.device != like.device:
            raise ValueError(
                f"{name}: expected {kind} of {like.dtype} on {like.device} like the model, "
                f"got {tensor.dtype} on {tensor.device}"
            )
        expected = (batch, like.shape[1], like.shape[3])
        found = (tensor.shape[0], tensor.shape[1], tensor.shape[3])
        if found != expected:
            raise ValueError(
                f"{name}: expected {kind} of [{expected[0]}, {expected[1]}, *, {expected[2]}] "
                f"(batch, KV heads, slots, head_dim), got {list(tensor.shape)}"
            )
