"""What pruning is held against, in plain PyTorch: its parts left out one at a time, and layers dropped altogether.

One uncached stock forward over prompt and continuation gives all rows of a teacher-forced continuation; what an
omitted layer does to which rows is all that differs. ``tests/test_ablations.py`` holds each against another form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from pop_ext.hf.restore import replaced_forward
from pop_ext.methods.calibration import decoder_layers, output_hidden_states, stock_evaluation
from pop_ext.methods.gates import last_logits
from pop_ext.plans.plan import Plan

NO_KV, NO_BOUNDARY, DROPPED = "no-kv", "no-boundary", "dropped"
"""The ablations; ``docs/evaluation.md`` defines them."""
ABLATIONS = (NO_KV, NO_BOUNDARY, DROPPED)

LayerForward = Callable[..., Any]


def stock_logits(model: Any, ids: Tensor, keep: int) -> Tensor:
    """Logits [batch, keep, vocab] of the last rows of ``ids`` [batch, T] by the stock forward, at full depth."""
    with stock_evaluation(model), torch.no_grad():
        return last_logits(model, ids, keep)


def ablated_logits(model: Any, kind: str, plan: Plan, context: Tensor, continuation: Tensor) -> Tensor:
    """Logits [batch, n, vocab] that predict a continuation after a prompt that an ablation encodes.

    Args:
        model: any Hugging Face decoder with eager or sdpa attention, enabled or not.
        kind: ``NO_KV``, ``NO_BOUNDARY`` or ``DROPPED``.
        plan: its layers, and for ``NO_KV`` its boundary.
        context: int [batch, prompt], without padding.
        continuation: int [batch, n]; its last token is not read.

    Raises:
        ValueError: an unknown kind, or a mask that is not of four dimensions.
    """
    prompt = context.shape[1]
    if kind == NO_KV:
        make = _without_context(max(0, prompt - plan.boundary))
    elif kind == NO_BOUNDARY:
        make = _held_back(prompt)
    elif kind == DROPPED:
        make = _passed_by
    else:
        raise ValueError(f"kind: expected one of {', '.join(ABLATIONS)}, got {kind!r}")
    ids = torch.cat([context, continuation[:, :-1]], dim=1)
    layers = decoder_layers(model)
    with stock_evaluation(model), torch.no_grad(), ExitStack() as stack:
        for index in plan.omit:
            stack.enter_context(replaced_forward(layers[index], make(layers[index].forward)))
        return last_logits(model, ids, continuation.shape[1])


def _passed_by(forward: LayerForward) -> LayerForward:
    """A layer that is not there."""
    return lambda hidden_states, *_, **__: hidden_states


def _held_back(rows: int) -> Callable[[LayerForward], LayerForward]:
    """A layer of which the first ``rows`` leave their K and V, and nothing else."""

    def make(forward: LayerForward) -> LayerForward:
        def held_back(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            output = output_hidden_states(forward(hidden_states, *args, **kwargs))
            return torch.cat([hidden_states[:, :rows], output[:, rows:]], dim=1)

        return held_back

    return make


def _without_context(rows: int) -> Callable[[LayerForward], LayerForward]:
    """A layer that never sees the first ``rows``: they pass it by, and no other row can attend to them in it."""

    def make(forward: LayerForward) -> LayerForward:
        def without_context(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            inner = {name: _rows_from(name, value, rows) for name, value in kwargs.items()}
            output = output_hidden_states(forward(hidden_states[:, rows:], *args, **inner))
            return torch.cat([hidden_states[:, :rows], output], dim=1)

        return without_context

    return make


def _rows_from(name: str, value: Any, first: int) -> Any:
    """What of a layer's argument belongs to the rows from ``first`` on."""
    if value is None:
        return None
    if name == "position_embeddings":
        return tuple(part[:, first:] for part in value)
    if name == "attention_mask":
        if not isinstance(value, Tensor) or value.ndim != 4:
            raise ValueError(f"attention_mask: expected none or [batch, heads, T, T] in a layer, got {value!r:.60}")
        return value[:, :, first:, first:]
    if name == "position_ids":
        return value[:, first:]
    if name == "cache_position":
        return value[first:]
    return value


def group_by_shape(pairs: Sequence[tuple[Tensor, Tensor]], batch_size: int) -> list[list[int]]:
    """Indices of pairs (prompt, continuation) in batches of equal lengths: what needs no padding."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        shapes.setdefault((len(context), len(continuation)), []).append(index)
    return [group[i : i + batch_size] for group in shapes.values() for i in range(0, len(group), batch_size)]
