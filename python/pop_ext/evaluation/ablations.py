"""Ablations of pruning in plain PyTorch: without its KV projection, without boundary rows, or with layers dropped.

One uncached stock forward over prompt and continuation gives all rows of a teacher-forced continuation. The ablations
differ only in how an omitted layer treats which rows. ``tests/evaluation/test_ablations.py`` compares each of them with
an independent implementation.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from pop_ext.hf.restore import replaced_forward
from pop_ext.methods.calibration import decoder_layers, output_hidden_states, stock_evaluation, with_hidden_states
from pop_ext.methods.gates import last_logits
from pop_ext.plans.plan import Plan
from pop_ext.utils.tensors import is_out_of_memory

NO_KV, NO_BOUNDARY, DROPPED = "no-kv", "no-boundary", "dropped"
ABLATIONS = (NO_KV, NO_BOUNDARY, DROPPED)
"""The ablations; docs/evaluation.md defines them."""

LayerForward = Callable[..., Any]


def stock_logits(model: Any, ids: Tensor, keep: int) -> Tensor:
    """Return the stock model's logits of the last rows, at full depth also for an enabled model.

    Args:
        model: Hugging Face decoder.
        ids: int [batch, T].
        keep: Number of last rows.

    Returns:
        [batch, keep, vocab].
    """
    with stock_evaluation(model), torch.no_grad():
        return last_logits(model, ids, keep)


def ablated_logits(model: Any, kind: str, plan: Plan, context: Tensor, continuation: Tensor) -> Tensor:
    """Return the logits that predict a continuation after a prompt that an ablation encodes.

    Args:
        model: Hugging Face decoder with eager or sdpa attention, enabled or not.
        kind: ``NO_KV``, ``NO_BOUNDARY`` or ``DROPPED``.
        plan: Plan whose layers are omitted. Only ``NO_KV`` reads its boundary.
        context: Prompts, int [batch, prompt], without padding.
        continuation: int [batch, n]. Its last token is not read, because nothing follows it.

    Returns:
        [batch, n, vocab].

    Raises:
        ValueError: ``kind`` is unknown, or the model's attention mask does not have four dimensions.
    """
    prompt = context.shape[1]
    if kind == NO_KV:
        make = _hide_rows(max(0, prompt - plan.boundary))
    elif kind == NO_BOUNDARY:
        make = keep_kv_only(prompt)
    elif kind == DROPPED:
        make = _skip_layer
    else:
        raise ValueError(f"kind: expected one of {', '.join(ABLATIONS)}, got {reprlib.repr(kind)}")
    ids = torch.cat([context, continuation[:, :-1]], dim=1)
    layers = decoder_layers(model)
    with stock_evaluation(model), torch.no_grad(), ExitStack() as stack:
        if kind == NO_KV:
            stack.enter_context(_errors_of_cut_layers())
        for index in plan.omit:
            stack.enter_context(replaced_forward(layers[index], make(layers[index].forward)))
        return last_logits(model, ids, continuation.shape[1])


@contextmanager
def _errors_of_cut_layers() -> Iterator[None]:
    """Name the ablation in what a layer raises that cannot run on its last rows alone, such as one with ALiBi."""
    try:
        yield
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"kinds: expected none of no-kv for this model, whose layers need all rows, got {error}"
        raise ValueError(reason) from error


# Each of these takes the number of context rows, or nothing, and wraps the forward of an omitted layer.


def _skip_layer(forward: LayerForward) -> LayerForward:
    """Return the input unchanged, for all rows. The layer runs only to show the form of what it returns."""

    def skip_layer(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return with_hidden_states(forward(hidden_states, *args, **kwargs), hidden_states)

    return skip_layer


def keep_kv_only(rows: int) -> Callable[[LayerForward], LayerForward]:
    """Undo the residual update of the first ``rows``, which leaves only their K and V for later rows to attend to."""

    def make(forward: LayerForward) -> LayerForward:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = forward(hidden_states, *args, **kwargs)
            kept = torch.cat([hidden_states[..., :rows, :], output_hidden_states(output)[..., rows:, :]], dim=-2)
            return with_hidden_states(output, kept)

        return run

    return make


def _hide_rows(rows: int) -> Callable[[LayerForward], LayerForward]:
    """Run the layer without the first ``rows``: they skip it, and no other row can attend to them in it."""

    def make(forward: LayerForward) -> LayerForward:
        def hide_rows(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            inner = {name: _slice_rows(name, value, rows) for name, value in kwargs.items()}
            output = forward(hidden_states[..., rows:, :], *args, **inner)
            all_rows = torch.cat([hidden_states[..., :rows, :], output_hidden_states(output)], dim=-2)
            return with_hidden_states(output, all_rows)

        return hide_rows

    return make


def _slice_rows(name: str, value: Any, first: int) -> Any:
    """Return the part of a layer's keyword argument that belongs to the rows from ``first`` on."""
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


def group_by_shape(pairs: Sequence[tuple[Tensor, ...]], batch_size: int) -> list[list[int]]:
    """Group pairs of equal lengths into batches, so that none needs padding.

    Args:
        pairs: (prompt, continuation) each, or more parts.
        batch_size: Largest number of pairs in a batch.

    Returns:
        The indices of the pairs in each batch.
    """
    shapes: dict[tuple[int, ...], list[int]] = {}
    for index, parts in enumerate(pairs):
        shapes.setdefault(tuple(map(len, parts)), []).append(index)
    return [group[i : i + batch_size] for group in shapes.values() for i in range(0, len(group), batch_size)]
