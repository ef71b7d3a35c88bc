"""Hugging Face caches as the operator's tensors, all or nothing.

A ``CacheTransaction`` gives ``pop::prefill`` one key and one value tensor per layer,
``[batch, kv_heads, slots, head_dim]``, and makes the cache hold the new tokens only in ``commit``:
a call that fails leaves the cache as it was.

| layer class                 | written                                | commit                |
|-----------------------------|----------------------------------------|-----------------------|
| ``DynamicLayer``            | new tensors of past + new slots        | becomes the layer's   |
| ``StaticLayer``             | in place, after a copy of those slots  | length advances       |
| sliding-window layers       | new tensors of past + new slots        | ``layer.update``      |
| quantised layers            | new tensors of past + new slots        | ``layer.update``      |
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
    """The native prefill does not know this kind of cache."""


class _LayerTransaction(Protocol):
    key: torch.Tensor
    value: torch.Tensor

    def commit(self) -> None: ...
    def abort(self) -> None: ...


def _new_buffer(like: torch.Tensor, batch: int, slots: int, zero: bool) -> torch.Tensor:
    """``[batch, kv_heads, slots, head_dim]`` with dtype, device and heads of ``like [*, kv_heads, *, head_dim]``."""
    shape = (batch, like.shape[1], slots, like.shape[3])
    return like.new_zeros(shape) if zero else like.new_empty(shape)


class _Dynamic:
    """Grows as ``torch.cat`` would, with one copy of the past and none of the new tokens."""

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


def _initialise(fresh: list[_Dynamic]) -> None:
    """Makes layers without tensors what ``lazy_initialization`` makes the first; it makes two tensors a layer."""
    fresh[0].layer.lazy_initialization(fresh[0].key, fresh[0].value)
    for other in fresh[1:]:
        vars(other.layer).update(vars(fresh[0].layer))


class _Static:
    """Writes where the layer's tensors are: their addresses must stay (CUDA graphs, compile)."""

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
        """Zeroes new slots ``[batch, new]`` that hold no token: they may hold those of an earlier use."""
        for cache in (self.key, self.value):
            cache[:, :, self._columns].masked_fill_(padding[:, None, :, None].to(cache.device), 0)

    def commit(self) -> None:
        self._layer.cumulative_length.add_(self._new)

    def abort(self) -> None:
        restore(self._layer.__dict__, self._before, self._saved)


class _Updated:
    """New tensors of past + new slots side by side; the layer then takes the new ones through its own ``update``.

    Slots that the layer has dropped are zero: no query of this call reaches them.
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
        """K and V of the last of ``past`` positions, as many as the layer still has. ``nothing``: K or V of none."""
        raise NotImplementedError

    def commit(self) -> None:
        self._layer.update(self.key[:, :, self._past :], self.value[:, :, self._past :])

    def abort(self) -> None:
        restore(self._layer.__dict__, self._before, self._saved)


class _Sliding(_Updated):
    """The layer keeps what its window needs."""

    def __init__(self, layer: Any, like: torch.Tensor, batch: int, past: int, new: int, zero: bool) -> None:
        super().__init__(layer, like, batch, past, new, zero)
        # A dynamic layer's update makes new tensors, a static one's writes into those that it has.
        in_place: list[Any] = []
        if isinstance(layer, StaticLayer):
            in_place = [layer.keys, layer.values, layer.cumulative_length]
        self._saved = save([tensor for tensor in in_place if tensor is not None])

    def _stored(self, nothing: torch.Tensor, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self._layer
        stored = min(past, layer.keys.shape[-2])
        # A static layer that is not full yet has its tokens in front, a full one is all tokens.
        kept = slice(0, stored) if isinstance(layer, StaticLayer) else slice(layer.keys.shape[-2] - stored, None)
        return layer.keys[:, :, kept], layer.values[:, :, kept]


class _Quantized(_Updated):
    """The past comes back dequantised, and the new tokens are quantised when the call is through.

    So the call itself reads its own K and V as they were computed, as in the stock forward's first call.
    """

    def _stored(self, nothing: torch.Tensor, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        # What an update by no token returns: quantised part, residual and beams in their order. Updates assign
        # attributes and write into no tensor, so that a shallow copy takes them without a trace.
        keys, values = copy.copy(self._layer).update(nothing, nothing)
        return keys.to(nothing.dtype), values.to(nothing.dtype)


_HANDLERS: dict[type, type] = {
    DynamicLayer: _Dynamic,
    StaticLayer: _Static,
    DynamicSlidingWindowLayer: _Sliding,
    StaticSlidingWindowLayer: _Sliding,
}

# Of transformers 5.24 on; FP8 layers are none of the other's.
_QUANTIZED = getattr(cache_utils, "BaseQuantizedLayer", QuantizedLayer)


def _handler_of(layer: Any) -> type | None:
    """What takes a layer class through a call; None: nothing does."""
    if layer is None:  # a cache that makes no layers by itself
        return None
    if issubclass(layer, _QUANTIZED) and layer.update.__module__ == cache_utils.__name__:
        return _Quantized  # whatever quantises: Quanto, HQQ, FP8
    return _HANDLERS.get(layer)


# What a cache must not do in another way than its layers do.
_CACHE_METHODS = ("update", "get_seq_length", "get_mask_sizes", "get_query_offset")


def past_slots(cache: Cache | None) -> int:
    """Slots that the cache already holds, padding included."""
    return 0 if cache is None else int(cache.get_seq_length())


def check_cache(cache: Any, num_layers: int) -> None:
    """Raises ``UnsupportedCacheError`` (TypeError for something that is no cache) if it cannot be filled natively."""
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
        if _handler_of(type(layer)) is None:
            known = ", ".join(sorted(kind.__name__ for kind in (*_HANDLERS, QuantizedLayer)))
            raise UnsupportedCacheError(f"past_key_values: expected layers of {known}, got {type(layer).__name__}")
    if len(cache.layers) > num_layers:
        raise ValueError(f"past_key_values: expected {num_layers} layers like the model, got {len(cache.layers)}")
    if len(cache.layers) < num_layers and _handler_of(cache.layer_class_to_replicate) is None:
        raise UnsupportedCacheError(
            f"past_key_values: expected {num_layers} layers like the model, got {len(cache.layers)}"
        )


def check_windows(cache: Cache, windows: Sequence[int], positions: int) -> None:
    """Raises ValueError if a layer would drop one of ``positions`` that a later query still reaches.

    Args:
        windows: sliding window of each layer of the model, 0 for none.
    """
    for index, (layer, window) in enumerate(zip(cache.layers, windows, strict=False)):
        name = f"past_key_values: layer {index}"
        if isinstance(layer, DynamicSlidingWindowLayer):
            length, kept = layer.sliding_window, layer.sliding_window - 1  # the next token is the last of its window
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
    """Whether some layer keeps only a window of its positions."""
    return any(isinstance(layer, (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)) for layer in cache.layers)


def keeps_only_windows(cache: Cache, windows: Sequence[int], layers: Collection[int]) -> bool:
    """Whether each of some layers keeps no position that its window has left behind.

    Args:
        windows: sliding window of each layer of the model, 0 for none.
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
    """The caches of one prefill call.

    Args:
        cache: a checked cache (``check_cache``).
        like: ``[*, kv_heads, *, head_dim]`` tensor with the cache's dtype and device.
        num_layers, batch, past, new: layers, sequences, slots before the call, columns it adds.
        padding: ``[batch, new]`` bool, True where a new slot holds no token; None: nowhere.
        left_out: layers in which the operator leaves some new slots as they are.
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
        self._open: list[Any] = []
        try:  # no slot shows uninitialised memory: where some are not written, all are zeroed
            for index, layer in enumerate(self._layers):
                _check_layer(layer, index, like, batch, past)
                handler: Any = _handler_of(type(layer))
                self._open.append(handler(layer, like, batch, past, new, padding is not None or index in left_out))
        except BaseException:
            self.abort()
            raise

    @property
    def key_cache(self) -> list[torch.Tensor]:
        return [layer.key for layer in self._open]

    @property
    def value_cache(self) -> list[torch.Tensor]:
        return [layer.value for layer in self._open]

    def commit(self) -> None:
        fresh = [layer for layer in self._open if isinstance(layer, _Dynamic) and not layer.layer.is_initialized]
        if fresh:
            _initialise(fresh)
        for layer in self._open:
            if self._padding is not None and isinstance(layer, _Static):
                layer.clear_padding(self._padding)
            layer.commit()
        self._cache.layers[:] = self._layers

    def abort(self) -> None:
        for layer in self._open:
            layer.abort()


def _check_layer(layer: Any, index: int, like: torch.Tensor, batch: int, past: int) -> None:
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
