"""The arguments of a prefill, checked and packed: what ``NativeModel`` hands to the operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pop_ext.hf.kv_cache import check_cache, check_windows, has_window, new_cache, past_slots
from pop_ext.hf.packing import PackedBatch, PerSequence, check_device, is_int, pack_batch, per_sequence
from pop_ext.hf.vision import Blocks, widened

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from pop_ext.hf.native_model import NativeModel


@dataclass(frozen=True)
class PrefillInputs:
    """A call's packed rows and what is to become of them.

    Attributes:
        rows: ``[rows]`` ids or ``[rows, hidden_size]`` embeddings.
        positions: ``[rows]`` int64, or ``[3, rows]`` for time, height and width where the family has such.
        boundaries, keeps: per sequence, rows at full depth and rows whose logits are wanted.
        shape: of the hidden states that come back, but for the last dimension.
        blocks: of tokens that see each other.
        feature_index: ``[rows]`` int64, row of each of ``features`` or -1; None without them.
        features: for each of the first layers ``[tokens of images, hidden_size]``.
    """

    rows: torch.Tensor
    packed: PackedBatch
    positions: torch.Tensor
    cache: Cache
    boundaries: list[int]
    keeps: list[int]
    shape: tuple[int, ...]
    blocks: Blocks
    feature_index: torch.Tensor | None = None
    features: tuple[torch.Tensor, ...] = ()


def check_tokens(
    native: NativeModel, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> torch.Tensor:
    """Whichever of the two was given."""
    if (input_ids is None) == (inputs_embeds is None):
        found = "none" if input_ids is None else "both"
        raise ValueError(f"input_ids: expected exactly one of input_ids and inputs_embeds, got {found}")
    name, tokens = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    if not isinstance(tokens, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tokens).__name__}")
    if tokens.device != native.device:
        raise ValueError(f"{name}: expected device {native.device} like the model, got {tokens.device}")
    if input_ids is None:
        hidden_size = native.spec.hidden_size
        if tokens.ndim != 3 or tokens.shape[-1] != hidden_size:
            raise ValueError(f"{name}: expected shape [batch, tokens, {hidden_size}], got {list(tokens.shape)}")
        if tokens.dtype != native.dtype:
            raise ValueError(f"{name}: expected dtype {native.dtype} like the model, got {tokens.dtype}")
        return tokens
    if tokens.ndim != 2:
        raise ValueError(f"{name}: expected shape [batch, tokens], got {list(tokens.shape)}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 or int32 ids, got {tokens.dtype}")
    return tokens


def pack_tokens(
    native: NativeModel, tokens: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None
) -> PackedBatch:
    """The real tokens among the new columns. Raises for a mask or a cache that does not fit them."""
    if cache is not None:
        check_cache(cache, native.spec.num_layers)
    batch, columns = tokens.shape[:2]
    return pack_batch(batch, columns, past_slots(cache), attention_mask, native.device)


def check_ids(native: NativeModel, rows: torch.Tensor, also: int | None = None) -> None:
    """Raises ValueError for packed ids outside the vocabulary, but for the id ``also``; padding may hold any."""
    if rows.is_floating_point():
        return
    if rows.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # looking would synchronise; the operator clamps the ids, and reports them to a later call
    if also is not None:
        rows = torch.where(rows == also, 0, rows)
    low, high = torch.stack(rows.aminmax()).tolist()
    size = native.spec.vocab_size
    if low < 0 or high >= size:
        raise ValueError(f"input_ids: expected ids from 0 to {size - 1}, got {low if low < 0 else high}")


def prepare(
    native: NativeModel,
    rows: torch.Tensor,
    packed: PackedBatch,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    boundary: PerSequence | None,
    logits_to_keep: PerSequence,
    blocks: Blocks,
) -> PrefillInputs:
    """The inputs of a call, without features.

    Raises:
        ValueError, TypeError: a bad argument, named with what was expected and what came.
    """
    keeps = per_sequence(logits_to_keep, packed.batch, "logits_to_keep")
    _check_at_most(keeps, packed.tokens, "logits_to_keep")
    boundaries = _boundaries(native, boundary, packed)
    if blocks:
        full_depth = [max(pair) for pair in zip(boundaries, keeps, strict=True)]
        boundaries = widened(full_depth, packed.tokens, blocks)
    if cache is None:
        cache = new_cache(native.model.config)
    check_windows(cache, native.spec.window, packed.slots)
    if packed.slot_table is not None and has_window(cache):
        raise ValueError(
            "attention_mask: expected consecutive real tokens in every sequence with a sliding-window cache "
            "(it keeps the last slots, masked or not), got holes"
        )
    positions = _positions(native, position_ids, packed)
    if native.family.has_axes:  # text has one position on all of them
        positions = positions.expand(3, -1)
    shape = (packed.batch, keeps[0]) if is_int(logits_to_keep) else (sum(keeps),)
    return PrefillInputs(rows, packed, positions, cache, boundaries, keeps, shape, blocks)


def _boundaries(native: NativeModel, boundary: PerSequence | None, packed: PackedBatch) -> list[int]:
    if boundary is None:
        return [min(native.plan.boundary, tokens) for tokens in packed.tokens]
    boundaries = per_sequence(boundary, packed.batch, "boundary")
    _check_at_most(boundaries, packed.tokens, "boundary")
    return boundaries


def _positions(native: NativeModel, position_ids: torch.Tensor | None, packed: PackedBatch) -> torch.Tensor:
    if position_ids is None:
        return packed.positions().to(native.device)
    if not isinstance(position_ids, torch.Tensor):
        raise TypeError(f"position_ids: expected a tensor, got {type(position_ids).__name__}")
    if position_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"position_ids: expected int64 or int32, got {position_ids.dtype}")
    check_device(position_ids, native.device, "position_ids")
    batch, columns = packed.batch, packed.columns
    axes = position_ids.unbind() if position_ids.ndim == 3 and native.family.has_axes else (position_ids,)
    if len(axes) not in (1, 3) or tuple(axes[0].shape) not in ((batch, columns), (1, columns)):
        of_images = f" or [3, {batch}, {columns}]" if native.family.has_axes else ""
        raise ValueError(
            f"position_ids: expected shape [{batch}, {columns}] or [1, {columns}]{of_images}, "
            f"got {list(position_ids.shape)}"
        )
    packed_axes = [packed.pack(axis.expand(batch, columns)).to(native.device) for axis in axes]
    return packed_axes[0] if len(axes) == 1 else torch.stack(packed_axes)


def _check_at_most(values: list[int], tokens: list[int], name: str) -> None:
    for i, (value, limit) in enumerate(zip(values, tokens, strict=True)):
        if value > limit:
            raise ValueError(f"{name}: expected at most {limit} (the new tokens) for sequence {i}, got {value}")
