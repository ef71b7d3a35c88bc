"""``PrefillRequest``: one validated prefill, and how ``NativeModel.prefill`` makes one from a user's arguments.

``dispatch`` makes the same request from a call of an enabled model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache

from pop_ext import _core
from pop_ext.hf.compat import new_cache
from pop_ext.hf.family import Family
from pop_ext.hf.kv_cache import check_cache, check_windows, has_window, past_slots
from pop_ext.hf.packing import (
    PackedBatch,
    PerSequence,
    Spans,
    bidirectional_spans,
    check_device,
    is_int,
    pack_batch,
    per_sequence,
    snap_to_span_start,
)
from pop_ext.plans.plan import Plan
from pop_ext.utils.tensors import check_dense, check_layers


@dataclass(frozen=True)
class PrefillRequest:
    """Hold one prefill with valid arguments. ``NativeModel.run`` does not check them again.

    Attributes:
        rows: packed new tokens, ``[rows]`` ids or ``[rows, hidden_size]`` embeddings.
        packed: where each sequence lies among the rows and among the slots of the cache.
        positions: ``[rows]`` int64, or ``[3, rows]`` (time, height, width) with multimodal RoPE. In a
            vision-language model they are used where its wrapper gives none.
        cache: receives K and V of every new position.
        boundary: per sequence, last rows that run at full depth.
        num_logits: per sequence, last rows that get logits.
        output_shape: of the returned hidden states, without the hidden size: ``(batch, keep)``, or ``(sum(keep),)``
            where the call gave one ``logits_to_keep`` per sequence.
        spans: new tokens that attend to each other in both directions.
        window_only: leave out K and V of positions that no later token of a sliding window can reach.
        arguments: the call by name, padded: ``input_ids``, ``inputs_embeds``, ``attention_mask`` (2-D or None),
            ``position_ids``, ``past_key_values`` and the arguments of a vision wrapper. Read by code that calls the
            model's own modules: the vision wrapper and the oracle.
        feature_index: ``[rows]`` int64, row of each of ``features`` that is added to a row, or -1; None without them.
        features: for each of the first layers ``[image tokens, hidden_size]`` (DeepStack).
    """

    rows: torch.Tensor
    packed: PackedBatch
    positions: torch.Tensor
    cache: Cache
    boundary: list[int]
    num_logits: list[int]
    output_shape: tuple[int, ...]
    spans: Spans
    arguments: Mapping[str, Any]
    window_only: bool = False
    feature_index: torch.Tensor | None = None
    features: tuple[torch.Tensor, ...] = ()


class LoadedModel(Protocol):
    """List the attributes of a loaded model that the checks of new tokens read. ``LoadedWeights`` has them."""

    @property
    def family(self) -> Family: ...
    @property
    def spec(self) -> _core.ModelSpec: ...
    @property
    def config(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...


class Target(LoadedModel, Protocol):
    """Add the attribute that the check of a boundary reads. ``NativeModel`` has them all."""

    @property
    def plan(self) -> Plan: ...


def make_request(
    target: Target,
    input_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    boundary: PerSequence | None = None,
    logits_to_keep: PerSequence = 1,
    window_only: bool = False,
    **vision: Any,
) -> PrefillRequest:
    """Check the arguments of ``NativeModel.prefill``, which documents them, and pack them.

    Raises:
        ValueError, TypeError: A bad argument. The text names it, what was expected and what came.
    """
    if not isinstance(window_only, bool):
        raise TypeError(f"window_only: expected a bool, got {type(window_only).__name__}")
    given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
    check_dense({**given, "position_ids": position_ids, **vision})
    tokens = _check_tokens(target, input_ids, inputs_embeds)
    _check_vision_arguments(target.family, vision)
    cache = past_key_values
    if cache is not None:
        check_layers(cache)
        check_cache(cache, target.spec.num_layers)
    batch, columns = tokens.shape[:2]
    packed = pack_batch(batch, columns, past_slots(cache), attention_mask, target.device)
    rows = packed.pack(tokens)
    check_ids(target, rows)
    num_logits = per_sequence(logits_to_keep, packed.batch, "logits_to_keep")
    _check_at_most(num_logits, packed.tokens, "logits_to_keep")
    spans = _spans_of(target.family, vision, packed)
    rows_at_full_depth = _boundary(target.plan, boundary, packed)
    if spans:
        rows_at_full_depth = [max(pair) for pair in zip(rows_at_full_depth, num_logits, strict=True)]
        rows_at_full_depth = snap_to_span_start(rows_at_full_depth, packed.tokens, spans)
    if cache is None:
        cache = new_cache(target.config)
    check_windows(cache, target.spec.window, packed.slots)
    if packed.slot_table is not None and has_window(cache):
        raise ValueError(
            "attention_mask: expected consecutive real tokens in every sequence with a sliding-window cache "
            "(it keeps the last slots, masked or not), got holes"
        )
    return PrefillRequest(
        rows=rows,
        packed=packed,
        positions=_positions(target, position_ids, packed),
        cache=cache,
        boundary=rows_at_full_depth,
        num_logits=num_logits,
        output_shape=(packed.batch, num_logits[0]) if is_int(logits_to_keep) else (sum(num_logits),),
        spans=spans,
        arguments={
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            **vision,
        },
        window_only=window_only,
    )


def check_device_and_dtype(target: LoadedModel, name: str, tokens: torch.Tensor) -> None:
    """Raise ValueError unless ids or embeddings are on the model's device, and embeddings of its dtype and size."""
    if tokens.device != target.device:
        raise ValueError(f"{name}: expected device {target.device} like the model, got {tokens.device}")
    if name == "inputs_embeds":
        hidden_size = target.spec.hidden_size
        if tokens.ndim != 3 or tokens.shape[-1] != hidden_size:
            raise ValueError(f"{name}: expected shape [batch, tokens, {hidden_size}], got {list(tokens.shape)}")
        if tokens.dtype != target.dtype:
            raise ValueError(f"{name}: expected dtype {target.dtype} like the model, got {tokens.dtype}")
        return
    if tokens.ndim != 2:
        raise ValueError(f"{name}: expected shape [batch, tokens], got {list(tokens.shape)}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 or int32 ids, got {tokens.dtype}")


def check_ids(target: LoadedModel, rows: torch.Tensor) -> None:
    """Raise ValueError for packed ids outside the vocabulary. Padding, which is not packed, may hold any id.

    The id that stands for an image in a vision-language model may lie outside; its wrapper replaces it.
    """
    if rows.is_floating_point():
        return
    if rows.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # reading the ids would synchronise; the operator clamps them and reports them to a later call
    image_token = getattr(target.config, "image_token_id", None) if target.family.vision is not None else None
    if image_token is not None:
        rows = torch.where(rows == image_token, 0, rows)
    low, high = torch.stack(rows.aminmax()).tolist()
    size = target.spec.vocab_size
    if low < 0 or high >= size:
        raise ValueError(f"input_ids: expected ids from 0 to {size - 1}, got {low if low < 0 else high}")


def _check_tokens(target: Target, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """Return the one of ids and embeddings that was given, after checking device, dtype and shape."""
    if (input_ids is None) == (inputs_embeds is None):
        found = "none" if input_ids is None else "both"
        raise ValueError(f"input_ids: expected exactly one of input_ids and inputs_embeds, got {found}")
    name, tokens = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    if not isinstance(tokens, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tokens).__name__}")
    check_device_and_dtype(target, name, tokens)
    return tokens


def _check_vision_arguments(family: Family, given: Mapping[str, Any]) -> None:
    """Raise TypeError for an argument that the family's vision wrapper does not take."""
    known = family.vision.arguments if family.vision is not None else frozenset()
    unknown = sorted(set(given) - known)
    if unknown:
        raise TypeError(f"{unknown[0]}: expected no such argument for a {family.model_type}, got one")


def _spans_of(family: Family, vision: Mapping[str, Any], packed: PackedBatch) -> Spans:
    """Return the new tokens that attend to each other in both directions; none in most families."""
    name = family.vision.spans_argument if family.vision is not None else None
    return [] if name is None else bidirectional_spans(name, vision.get(name), packed)


def _boundary(plan: Plan, boundary: PerSequence | None, packed: PackedBatch) -> list[int]:
    """Return the boundary rows of each sequence: those given, else the plan's, at most the sequence's tokens."""
    if boundary is None:
        return [min(plan.boundary, tokens) for tokens in packed.tokens]
    values = per_sequence(boundary, packed.batch, "boundary")
    _check_at_most(values, packed.tokens, "boundary")
    return values


def _positions(target: Target, position_ids: torch.Tensor | None, packed: PackedBatch) -> torch.Tensor:
    """Return packed positions on the model's device: those given, else counted over the real tokens."""
    if position_ids is None:
        return packed.positions().to(target.device)
    if not isinstance(position_ids, torch.Tensor):
        raise TypeError(f"position_ids: expected a tensor, got {type(position_ids).__name__}")
    if position_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"position_ids: expected int64 or int32, got {position_ids.dtype}")
    check_device(position_ids, target.device, "position_ids")
    batch, columns, mrope = packed.batch, packed.columns, target.family.uses_mrope
    if target.family.vision is not None and position_ids.shape[-1] == packed.slots:
        position_ids = position_ids[..., -columns:]  # a vision wrapper also takes positions that begin with the past
    axes = position_ids.unbind() if position_ids.ndim == 3 and mrope else (position_ids,)
    # transformers itself passes four axes: positions of text, then time, height and width.
    if len(axes) not in (1, 3, 4) or tuple(axes[0].shape) not in ((batch, columns), (1, columns)):
        shapes = dict.fromkeys([f"[{batch}, {columns}]", f"[1, {columns}]"] + [f"[3, {batch}, {columns}]"] * mrope)
        raise ValueError(f"position_ids: expected shape {' or '.join(shapes)}, got {list(position_ids.shape)}")
    return packed.pack_positions(position_ids[-3:] if len(axes) > 1 else position_ids).to(target.device)


def _check_at_most(values: list[int], tokens: list[int], name: str) -> None:
    """Raise ValueError for a sequence whose value exceeds its number of new tokens."""
    for i, (value, limit) in enumerate(zip(values, tokens, strict=True)):
        if value > limit:
            raise ValueError(f"{name}: expected at most {limit} (the new tokens) for sequence {i}, got {value}")
