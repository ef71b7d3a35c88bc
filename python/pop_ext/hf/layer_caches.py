"""Fill the cache of one layer, for each layer class of transformers that the native prefill supports.

``kv_cache.py`` lists what each class does.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from pop_ext.hf.restore import Saved, restore, save


class LayerTransaction(Protocol):
    """Fill the cache of one layer.

    Attributes:
        key, value: ``[batch, kv_heads, slots, head_dim]``, read and written by the operator.
    """

    key: torch.Tensor
    value: torch.Tensor

    def commit(self) -> None:
        """Make the layer hold the new tokens."""

    def abort(self) -> None:
        """Restore the layer to its state before the call."""


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


class DynamicTransaction:
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


def initialise(empty: list[DynamicTransaction]) -> None:
    """Initialise dynamic layers that hold no tensors yet.

    ``lazy_initialization`` allocates two tensors, which ``commit`` replaces at once. So it is called for the first
    layer only, and the others copy its attributes.
    """
    empty[0].layer.lazy_initialization(empty[0].key, empty[0].value)
    for other in empty[1:]:
        vars(other.layer).update(vars(empty[0].layer))


class StaticTransaction:
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
            try:
                layer.lazy_initialization(empty, empty)
            except BaseException:  # out of memory between two of its tensors: nobody else holds this transaction yet
                self.abort()
                raise
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
    DynamicLayer: DynamicTransaction,
    StaticLayer: StaticTransaction,
    DynamicSlidingWindowLayer: _SlidingTransaction,
    StaticSlidingWindowLayer: _SlidingTransaction,
}

# BaseQuantizedLayer exists from transformers 5.24 on. Its FP8 layers are no subclass of QuantizedLayer.
_QUANTIZED = getattr(cache_utils, "BaseQuantizedLayer", QuantizedLayer)


def transaction_class(layer: Any) -> type | None:
    """Return the transaction class for a layer class, or None if such layers cannot be filled natively.

    Args:
        layer: a layer class; None for a cache that makes no layers by itself.
    """
    if layer is None:
        return None
    if issubclass(layer, _QUANTIZED) and layer.update.__module__ == cache_utils.__name__:
        return _QuantizedTransaction  # of any quantiser: Quanto, HQQ, FP8
    return _TRANSACTIONS.get(layer)


def supported_layers() -> str:
    """Return the names of the supported layer classes, for error texts."""
    return ", ".join(sorted(kind.__name__ for kind in (*_TRANSACTIONS, QuantizedLayer)))
