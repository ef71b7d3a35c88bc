"""Second turns of dialogues: a prompt and its answer in the cache, and then a second prefill over that cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pop_ext import reference
from pop_ext.evaluation.ablations import DROPPED
from pop_ext.evaluation.arms import FITTED, FULL, POP, Arm, arm_logits
from pop_ext.evaluation.prompts import PromptSet
from pop_ext.hf.compat import cache_of, with_cache
from pop_ext.hf.enable import enabled
from pop_ext.hf.load import load
from pop_ext.hf.modules import input_device
from pop_ext.methods.calibration import stock_evaluation
from pop_ext.plans.plan import Plan

SECOND_TURN_KINDS = (FULL, POP, FITTED, DROPPED)
"""Kinds of arms that are measured on second turns. The other ablations define no cache to continue from."""

Prefill = Callable[[Tensor, Any, int, int], tuple[Tensor, Any]]
"""Prefills int [1, T] over a cache or None, with a boundary and a number of rows whose logits are wanted; returns
logits [1, rows, vocab] and the cache with T more positions."""


def set_logits(model: Any, arm: Arm, prompts: PromptSet, batch_size: int, backend: str) -> Iterator[tuple[int, Tensor]]:
    """Yield the index of each prompt of a set and the logits that predict its continuation, in any order.

    In dialogues the first prompt is prefilled under the arm's plan, the stock model reads the first answer as in
    decode, and the tokens of the second turn are prefilled under the plan over that cache.

    Args:
        model: Stock model.
        arm: The arm; for dialogues of one of ``SECOND_TURN_KINDS``.
        prompts: The set.
        batch_size: Prompts per forward. Dialogues run one by one where a plan prefills them.
        backend: As of ``backend_of``.

    Yields:
        (index of the prompt, logits [n, vocab] for the n tokens of its continuation).
    """
    if not prompts.first_turns:
        yield from arm_logits(model, arm, prompts.pairs, batch_size, backend)
        return
    dialogues = list(zip(prompts.first_turns, prompts.pairs, strict=True))
    if arm.kind in (FULL, DROPPED):  # one depth for all tokens: the turns are one sequence
        pairs = [(torch.cat([*first, new]), value) for first, (new, value) in dialogues]
        yield from arm_logits(model, arm, pairs, batch_size, backend)
        return
    prefill = _prefill_of(model, arm.plan, backend)
    device = input_device(model)
    for index, ((prompt, said), (new, value)) in enumerate(dialogues):
        _, cache = prefill(prompt[None].to(device), None, min(arm.plan.boundary, len(prompt)), 1)
        with stock_evaluation(model), torch.no_grad():
            cache = cache_of(model(input_ids=said[None].to(device), **with_cache(model, cache)))
        rows = torch.cat([new, value[:-1]])[None].to(device)
        boundary = min(arm.plan.boundary - 1 + len(value), rows.shape[1])  # as in score
        logits, _ = prefill(rows, cache, boundary, len(value))
        yield index, logits[0]


def _prefill_of(model: Any, plan: Plan, backend: str) -> Prefill:
    if backend == "native":
        return partial(_native_prefill, load(model, plan))
    if backend == "portable":
        return partial(_portable_prefill, model, plan)
    return partial(_reference_prefill, model, plan)


def _native_prefill(native: Any, ids: Tensor, cache: Any, boundary: int, rows: int) -> tuple[Tensor, Any]:
    out = native.prefill(ids, past_key_values=cache, boundary=boundary, logits_to_keep=rows)
    return out.logits, out.past_key_values


def _portable_prefill(model: Any, plan: Plan, ids: Tensor, cache: Any, boundary: int, rows: int) -> tuple[Tensor, Any]:
    past, pruned = {} if cache is None else with_cache(model, cache), rows < ids.shape[1]
    plan = plan.replace(boundary=boundary, min_tokens=0)
    with stock_evaluation(model), torch.no_grad(), enabled(model, plan, strict=pruned, backend="portable"):
        out = model(input_ids=ids, use_cache=True, logits_to_keep=rows, **past)
    return out.logits, cache_of(out)


def _reference_prefill(model: Any, plan: Plan, ids: Tensor, cache: Any, boundary: int, rows: int) -> tuple[Tensor, Any]:
    with stock_evaluation(model), torch.no_grad():
        return reference.prefill(model, ids, plan, rows, past_key_values=cache, boundary=boundary)
