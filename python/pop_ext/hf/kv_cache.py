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

from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, StaticSlidingWindowLayer

from pop_ext.hf.layer_caches import (
    DynamicTransaction,
    LayerTransaction,
    StaticTransaction,
    initialise,
    supported_layers,
    transaction_class,
)


class UnsupportedCacheError(ValueError):
    """Raised for a kind of cache that the native prefill cannot fill."""


# A cache class that overrides one of these may do something else than its layers do.
_CACHE_METHODS = ("update", "get_seq_length", "get_mask_sizes", "get_query_offset")


def past_slots(cache: Cache | None) -> int:
    """Return the number of slots that the cache already holds, padding included."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # no layer of attention, so none that counts positions
        return 0


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
        if transaction_class(type(layer)) is None:
            raise UnsupportedCacheError(
                f"past_key_values: expected layers of {supported_layers()}, got {type(layer).__name__}"
            )
    if len(cache.layers) > num_layers:
        raise ValueError(f"past_key_values: expected {num_layers} layers like the model, got {len(cache.layers)}")
    if len(cache.layers) < num_layers and transaction_class(cache.layer_class_to_replicate) is None:
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
            room for the new tokens. The cache is unchanged.
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
        self._transactions: list[LayerTransaction] = []
        try:
            for index, layer in enumerate(self._layers):
                _check_layer(layer, index, like, batch, past)
                transaction: Any = transaction_class(type(layer))
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
        dynamic = [transaction for transaction in self._transactions if isinstance(transaction, DynamicTransaction)]
        empty = [transaction for transaction in dynamic if not transaction.layer.is_initialized]
        if empty:
            initialise(empty)
        for transaction in self._transactions:
            if self._padding is not None and isinstance(transaction, StaticTransaction):
                transaction.clear_padding(self._padding)
            transaction.commit()
        self._cache.layers[:] = self._layers

    def abort(self) -> None:
        """Restore the cache to its state before the call. Allowed right after a failed ``commit``, too."""
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
