"""The caches of the oracle: read the caller's, fill one per sequence without padding, assemble the batch's."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from pop_ext.reference.vision import Images

# transformers names the base class BaseQuantizedLayer from 5.24 on.
QUANTIZED = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)


@dataclass(frozen=True)
class PastLayer:
    """The filled part of one layer of the caller's cache.

    Attributes:
        keys: [batch, kv_heads, stored, head_dim].
        values: [batch, kv_heads, stored, head_dim].
        first: Cache column of the first stored position; a sliding layer has dropped those before.
    """

    keys: Tensor
    values: Tensor
    first: int


@dataclass(frozen=True)
class UnpaddedSequence:
    """One sequence of a call, without its padding.

    Attributes:
        past_columns: [n] cache columns of its real past positions.
        new_columns: [T_i] columns of its real new tokens, counted from the first new column.
        positions: Positions for RoPE, int64 [1, T_i], or [3, 1, T_i] for (time, height, width).
        boundary: Number of rows that run at full depth, enough for the logits and for whole images.
        num_logits: Number of last rows whose logits are returned.
        images: Images among the new tokens.
    """

    past_columns: Tensor
    new_columns: Tensor
    positions: Tensor
    boundary: int
    num_logits: int
    images: Images


def past_key_values_length(cache: Cache | None) -> int:
    """Return the number of columns in the cache; 0 for None."""
    return 0 if cache is None else int(cache.get_seq_length())


def read_past(cache: Cache | None, num_layers: int, batch: int) -> list[PastLayer]:
    """Read the filled columns of each layer of a cache.

    Args:
        cache: The caller's cache, which is not modified, or None.
        num_layers: Depth of the model.
        batch: Number of sequences of the call.

    Returns:
        One entry per layer; an empty list for an empty cache.

    Raises:
        TypeError: The cache has a layer of an unknown type.
        ValueError: The number of layers, the batch or the length of a layer does not fit.
    """
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
        stored = min(length, keys.shape[2])  # a static layer has spare room at the end, a sliding one dropped the front
        past.append(PastLayer(keys[:, :, :stored], values[:, :, :stored], length - stored))
    return past


def dequantized(layer: Any) -> tuple[Tensor, Tensor]:
    """Return K and V of a quantised cache layer, as a stock call would read them.

    Args:
        layer: Cache layer, which is left unchanged.

    Returns:
        K and V, [batch, kv_heads, stored, head_dim] each.
    """
    if layer.keys.ndim == 4:  # the newest positions, which are not quantised yet
        nothing = layer.keys[:, :, :0]
    else:
        read = layer._dequantize(layer._quantized_keys)
        nothing = read[:, :, :0].to(layer.keys.dtype)
    # An update assigns new tensors, so updating a shallow copy with no rows reads the layer and leaves it unchanged.
    keys, values = copy.copy(layer).update(nothing, nothing)
    return keys.to(nothing.dtype), values.to(nothing.dtype)


def gather_past(past: list[PastLayer], sequence: UnpaddedSequence, index: int, window: int | None) -> DynamicCache:
    """Copy the real past positions of one sequence, without holes, into a cache of its own.

    Positions that a sliding layer has dropped are filled with zeros.

    Args:
        past: Layers of the caller's cache.
        sequence: The sequence.
        index: Its index in the batch.
        window: Sliding window of the model in positions, or None.

    Raises:
        ValueError: A sliding layer has dropped a position that is still within the window.
    """
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
    """Check that no hook of an attention has shortened the cache, which later rows still read.

    Args:
        cache: Cache of one sequence.
        length: Number of positions that every layer must hold.

    Raises:
        ValueError: A layer holds another number of positions.
    """
    layers: list[Any] = list(cache.layers)
    for number, layer in enumerate(layers):
        stored = int(layer.get_seq_length())
        if stored != length:
            raise ValueError(
                f"model: expected hooks that leave the cache as it is until the prefill has ended, got {stored} of "
                f"{length} positions in layer {number}: compress the cache that the prefill returns"
            )


def assemble_cache(
    caches: list[DynamicCache], sequences: list[UnpaddedSequence], past_length: int, new: int
) -> DynamicCache:
    """Assemble the caches of all sequences into one batch cache.

    Args:
        caches: One cache per sequence.
        sequences: The sequences.
        past_length: Number of past columns.
        new: Number of new columns.

    Returns:
        A cache of ``past_length + new`` columns, with each position in its mask column and zeros elsewhere.
    """
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
