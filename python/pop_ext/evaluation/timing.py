"""Time prefills of the stock model, of the native full prefill and of each plan, in turn."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from pop_ext import _core
from pop_ext.evaluation.arms import FITTED, FULL, POP, Arm, make_arms
from pop_ext.hf.enable import enabled
from pop_ext.hf.load import load
from pop_ext.hf.modules import input_device
from pop_ext.methods.calibration import stock_evaluation, stock_model
from pop_ext.plans.plan import Plan
from pop_ext.utils.progress import Progress, reporting

STOCK, NATIVE_FULL = "Hugging Face full", "native full"
"""Names of the two arms without a plan."""
WARM_UPS = 2
"""Rounds before the timed ones."""


class SpeedRange(NamedTuple):
    """A speed-up over the timed rounds.

    Attributes:
        low: Lower quartile.
        median: Median.
        high: Upper quartile.
    """

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> SpeedRange:
        """Return the range of one ratio for each round."""
        median = statistics.median(ratios)
        if len(ratios) < 2:
            return cls(median, median, median)
        low, _, high = statistics.quantiles(ratios, method="inclusive")
        return cls(low, median, high)


class Prefiller(Protocol):
    """A model whose prefill is timed."""

    def prefill(self, input_ids: torch.Tensor, *, boundary: int) -> Any:
        """Prefill ``input_ids`` int [batch, T]; the result has ``logits`` [batch, 1, vocab]."""


def time_plans(
    model: Any,
    plans: Sequence[Plan],
    lengths: Sequence[int],
    *,
    repeats: int = 7,
    fits: bool = False,
    progress: Progress = False,
) -> list[dict[str, Any]]:
    """Time the first token by prompt length, for the stock model, the native full prefill and each plan.

    The arms take turns within each round. Prompts are random ids at batch 1.

    Args:
        model: Hugging Face model of a native family.
        plans: Plans of one depth, at least one. Duplicates are timed once.
        lengths: Prompt lengths in tokens.
        repeats: Number of timed rounds, after two to warm up.
        fits: Time each fitted plan with its projections, too. They change weights and not work, so that otherwise
            projections are ignored.
        progress: True for a progress bar, or a callback that takes (rounds done, their number).

    Returns:
        One dict per arm and length: ``arm``, ``tokens``, ``seconds`` (one value per round) and ``flops``. Native arms
        also have ``omit``, ``boundary``, ``plan`` and ``extra_bytes``, the memory of the folded weights.

    Raises:
        UnsupportedModelError: The model has no native form. It is a ValueError.
        ValueError: The plans differ in depth, or there is none.
    """
    model = stock_model(model)
    arms = [arm for arm in make_arms(plans, [POP, FITTED] if fits else [POP]) if arm.kind != FULL]
    full = load(model, Plan(plans[0].num_layers, ()))
    timed = [(NATIVE_FULL, full.plan), *((arm.name, arm.plan) for arm in arms)]
    natives = {_weights_of(full.plan): full}  # plans that differ only in their boundary share one set of folded weights
    for _, plan in timed:
        if _weights_of(plan) not in natives:
            natives[_weights_of(plan)] = load(model, plan)
    device = input_device(model)
    found = []
    with (
        stock_evaluation(model),
        torch.no_grad(),
        reporting(progress, "timing", len(lengths) * (WARM_UPS + repeats)) as advance,
    ):
        for tokens in lengths:
            generator = torch.Generator("cpu").manual_seed(0)
            ids = torch.randint(0, full.spec.vocab_size, (1, tokens), generator=generator, device="cpu").to(device)
            calls: list[tuple[dict[str, Any], Callable[[], Any]]] = [
                (_facts(STOCK, tokens, None, _stock_flops(full.spec, tokens)), partial(_stock, model, ids)),
            ]
            for name, plan in timed:
                native = natives[_weights_of(plan)]
                facts = _facts(name, tokens, plan, _flops(full.spec, plan, tokens))
                facts["extra_bytes"] = native.extra_bytes
                calls.append((facts, partial(_native, native, ids, min(plan.boundary, tokens))))
            for number in range(WARM_UPS + repeats):
                for facts, call in calls:
                    seconds = _seconds(call)
                    if number >= WARM_UPS:
                        facts["seconds"].append(round(seconds, 7))
                advance(1)
            found += [facts for facts, _ in calls]
    return found


def portable_speedup(model: Any, plan: Plan, tokens: int, *, repeats: int = 7) -> float:
    """Time a prefill by the portable backend against the stock forward, on random ids at batch 1.

    Args:
        model: Hugging Face model that the portable backend runs.
        plan: The plan; its ``min_tokens`` is ignored.
        tokens: Prompt length.
        repeats: Number of timed rounds, in which the two take turns, after two to warm up.

    Returns:
        The speed-up over the stock forward: the median over rounds of the ratio of their times.

    Raises:
        UnsupportedModelError: The portable backend does not run the model. It is a ValueError.
    """
    model = stock_model(model)
    vocabulary, plan = model.get_input_embeddings().weight.shape[0], plan.replace(min_tokens=0)
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, tokens), generator=generator, device="cpu").to(input_device(model))
    call, ratios = partial(_stock, model, ids), []
    with torch.no_grad():
        for _ in range(WARM_UPS + repeats):
            with stock_evaluation(model):
                stock = _seconds(call)
            with stock_evaluation(model), enabled(model, plan, strict=True, backend="portable"):
                ratios.append(stock / _seconds(call))
    return statistics.median(ratios[WARM_UPS:])


def _weights_of(plan: Plan) -> tuple[tuple[int, ...], str | None]:
    """Return what the folded weights of a plan depend on."""
    return plan.omit, None if plan.projections is None else plan.projections.digest


def speedup(timings: Sequence[dict[str, Any]], arm: str, tokens: int, baseline: str = NATIVE_FULL) -> float | None:
    """Return the speed-up of an arm over a baseline: the median over rounds of the ratio of their times.

    Args:
        timings: Result of ``time_plans``.
        arm: Name of the arm.
        tokens: Prompt length.
        baseline: Name of the baseline arm.

    Returns:
        The factor, or None if one of the two was not timed.
    """
    found = speed_range(timings, arm, tokens, baseline)
    return None if found is None else found.median


def speed_range(
    timings: Sequence[dict[str, Any]], arm: str, tokens: int, baseline: str = NATIVE_FULL
) -> SpeedRange | None:
    """Return the median and the quartiles of an arm's speed-up over the rounds.

    The arguments are those of ``speedup``. None if one of the two arms was not timed.
    """
    both = [next((t for t in timings if t["arm"] == name and t["tokens"] == tokens), None) for name in (baseline, arm)]
    if both[0] is None or both[1] is None:
        return None
    return SpeedRange.of(
        [reference / own for reference, own in zip(both[0]["seconds"], both[1]["seconds"], strict=True)]
    )


def median_ms(timings: Sequence[dict[str, Any]], arm: str, tokens: int) -> float | None:
    """Return the median time of an arm in milliseconds, or None if it was not timed at that length."""
    seconds = next((t["seconds"] for t in timings if t["arm"] == arm and t["tokens"] == tokens), None)
    return None if seconds is None else 1e3 * statistics.median(seconds)


def plan_arm(omit: Sequence[int], boundary: int) -> str:
    """Return the name that ``time_plans`` gives to a plan's arm."""
    return Arm(POP, Plan(max(omit, default=0) + 2, omit, boundary)).name


def _facts(name: str, tokens: int, plan: Plan | None, flops: float) -> dict[str, Any]:
    members: dict[str, Any] = {"arm": name, "tokens": tokens, "seconds": [], "flops": flops}
    if plan is not None:
        members |= {"omit": list(plan.omit), "boundary": plan.boundary, "plan": json.loads(plan.to_json())}
    return members


def _stock(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1]
    return logits


def _native(native: Prefiller, ids: torch.Tensor, boundary: int) -> torch.Tensor:
    logits: torch.Tensor = native.prefill(ids, boundary=boundary).logits[0, -1]
    return logits


def _stock_flops(spec: Any, tokens: int) -> float:
    return float(_core.stock_cost(spec, [_core.SequenceShape(tokens, boundary=1)])["flops"])


def _flops(spec: Any, plan: Plan, tokens: int) -> float:
    rows = [_core.SequenceShape(tokens, boundary=min(plan.boundary, tokens))]
    return float(_core.plan_cost(spec, plan, rows)["flops"])


def _seconds(call: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    call().argmax().item()  # synchronises a GPU
    return time.perf_counter() - start
