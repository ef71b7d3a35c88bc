"""The oracle's caches: the caller's, read; one a sequence, freed of its padding; the batch's, put together."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from pop_ext.reference.vision import Images

QUANTIZED = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)  # the first from 5.24 on


@dataclass(frozen=True)
class PastLayer:
    """One layer of the caller's cache: keys, values [batch, kv_heads, stored, head_dim], columns `first` onwards."""

    keys: Tensor
    values: Tensor
    first: int


@dataclass(frozen=True)
class OneSequence:
    """One sequence of a call, freed of its padding."""

    past_columns: Tensor  # [n] cache columns of its real past positions
    new_columns: Tensor  # [T_i] columns of its real new tokens, counted from the first new column
    positions: Tensor  # [1, T_i] int64, or [3, 1, T_i] (time, height, width), for RoPE
    boundary: int  # effective: rows at full depth
    keep: int  # rows whose logits are wanted
    images: Images


def past_key_values_length(cache: Cache | None) -> int:
    """Columns that the cache holds."""
    return 0 if cache is None else int(cache.get_seq_length())


def read_past(cache: Cache | None, num_layers: int, batch: int) -> list[PastLayer]:
    """The filled columns of each layer of `cache`; an empty list for an empty cache."""
    if cache is None:
        return []
    known = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
    for layer in getattr(cache, "layers", [None]):
        if type(layer) not in known and not isinstance(layer, QUANTIZED):
            raise TypeError(
                "past_key_values: expected a DynamicCache, StaticCache or QuantizedCache of full or sliding-window "
                f"attention layers, got {type(cache).__name__} with {type(layer).__name__}"
            )
    length = past_key_values_length(cache)
    if length == 0:
        return []
    if len(cache.layers) != num_layers:
        raise ValueError(f"past_key_values: expected {num_layers} layers, got {len(cache.layers)}")
    past = []
    layers: list[Any] = list(cache.layers)
    for index, layer in enumerate(layers):
        filled = int(layer.get_seq_length())
        if filled != length:
            raise ValueError(f"past_key_values: layer {index} has {filled} positions, layer 0 has {length}")
        keys, values = dequantized(layer) if isinstance(layer, QUANTIZED) else (layer.keys, layer.values)
        if keys.shape[0] != batch:
            raise ValueError(f"past_key_values: expected batch {batch}, got {keys.shape[0]} in layer {index}")
        stored = min(length, keys.shape[2])  # a static layer has room behind, a sliding one dropped the front
        past.append(PastLayer(keys[:, :, :stored], values[:, :, :stored], length - stored))
    return past


def dequantized(layer: Any) -> tuple[Tensor, Tensor]:
    """K and V that a quantised layer holds: what a stock call would read of them."""
    if layer.keys.ndim == 4:  # not yet quantised, behind what is
        nothing = layer.keys[:, :, :0]
    else:
        read = layer._dequantize(layer._quantized_keys)
        nothing = read[:, :, :0].to(layer.keys.dtype)
    # An update makes new tensors and assigns them: that of a shallow copy leaves the layer as it is.
    keys, values = copy.copy(layer).update(nothing, nothing)
    return keys.to(nothing.dtype), values.to(nothing.dtype)


def past_of_sequence(past: list[PastLayer], sequence: OneSequence, index: int, window: int | None) -> DynamicCache:
    """The real past positions of one sequence, side by side, in a cache of its own (copies)."""
    cache = DynamicCache()
    real = len(sequence.past_columns)
    if real == 0:
        return cache
    for number, layer in enumerate(past):
        columns = sequence.past_columns[sequence.past_columns >= layer.first]
        dropped = real - len(columns)
        needed = real if window is None else min(real, window - 1)
        if dropped > 0 and len(columns) < needed:
            raise ValueError(
                f"past_key_values: expected the last {needed} of the {real} past "
                f"positions of sequence {index} (sliding window {window}), but layer {number} has dropped the first "
                f"{dropped} of them"
            )
        stored = columns - layer.first
        shape = (1, layer.keys.shape[1], dropped)
        cache.update(
            torch.cat([layer.keys.new_zeros(*shape, layer.keys.shape[3]), layer.keys[index, None, :, stored]], dim=2),
            torch.cat([layer.values.new_zeros(*shape, layer.values.shape[3]), layer.values[index, None, :, stored]], 2),
            number,
        )
    return cache


def check_filled(cache: DynamicCache, length: int) -> None:
    """Raise unless every layer holds `length` positions: what hooks of attentions took away, later rows would miss."""
    layers: list[Any] = list(cache.layers)
    for number, layer in enumerate(layers):
        stored = int(layer.get_seq_length())
        if stored != length:
            raise ValueError(
                f"model: expected hooks that leave the cache as it is until the prefill is through, got {stored} of "
                f"{length} positions in layer {number}: compress the cache that the prefill returns"
            )


def assemble(caches: list[DynamicCache], sequences: list[OneSequence], past_length: int, new: int) -> DynamicCache:
    """One batch cache with `past_length + new` columns: each position in its mask column, zeros elsewhere."""
    result = DynamicCache()
    for number in range(len(caches[0].layers)):
        first: Any = caches[0].layers[number]
        heads = first.keys.shape[1]
        keys = first.keys.new_zeros(len(caches), heads, past_length + new, first.keys.shape[3])
        values = first.values.new_zeros(len(caches), heads, past_length + new, first.values.shape[3])
        for i, (cache, sequence) in enumerate(zip(caches, sequences, strict=True)):
            columns = torch.cat([sequence.past_columns, past_length + sequence.new_columns])
            layer: Any = cache.layers[number]
            keys[i, :, columns] = layer.keys[0]
            values[i, :, columns] = layer.values[0]
        result.update(keys, values, number)
    return result
