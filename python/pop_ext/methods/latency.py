"""Plans by measured time: as few omitted layers as a budget allows, and from which length on pruning pays."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pop_ext.hf.native_model import load
from pop_ext.plans.origin import origin_of
from pop_ext.plans.plan import Plan
from pop_ext.utils.progress import Progress, reporting

REPEATS = 5


class Prefiller(Protocol):
    """A model whose prefill is timed."""

    def prefill(self, input_ids: Tensor) -> Any:
        """Prefill ``input_ids`` int [batch, T]; the result has ``logits`` [batch, 1, vocab]."""


class BudgetedPlan(NamedTuple):
    """What ``plan_within`` returns.

    Attributes:
        plan: the plan of the fewest omitted layers that kept the budget; its origin names it.
        budget: seconds that a prefill may take.
        measured: omitted layers -> median seconds of a prefill, of each number that was tried.
    """

    plan: Plan
    budget: float
    measured: dict[int, float]


def plan_within(
    model: Any,
    choose: Callable[[int], Plan],
    *,
    seconds: float | None = None,
    speedup: float | None = None,
    tokens: int = 2048,
    batch: int = 1,
    repeats: int = REPEATS,
    progress: Progress = False,
) -> BudgetedPlan:
    """The plan of the fewest omitted layers whose native prefill, measured here and now, keeps a budget.

    The number of layers is found by bisection: a prefill that omits more is taken to be no slower.

    Args:
        model: a Hugging Face model of a native family.
        choose: from a number of layers to a plan that omits so many: ``imp.plan``, or
            ``functools.partial(Plan.last, depth)``.
        seconds: that a prefill may take; or
        speedup: over the native full prefill, measured in the same run.
        tokens, batch: shape of the prompts that are timed, of random ids.
        repeats: timed prefills of each plan, after one to warm up; medians count.
        progress: True for a bar, or a callback told (plans timed, None).

    Raises:
        UnsupportedModelError (a ValueError): the model has no native form.
        ValueError, TypeError: a bad argument, or a budget that not even one retained layer keeps; both are named.
    """
    budget = _check_budget(seconds, speedup)
    for name, value in (("tokens", tokens), ("batch", batch), ("repeats", repeats)):
        _check_positive(name, value)
    full = load(model, choose(0))
    depth, ids = full.spec.num_layers, _random_ids(full.spec.vocab_size, batch, tokens, full.device)
    measured: dict[int, float] = {}
    with reporting(progress, "timing plans", None) as advance:

        def seconds_of(count: int) -> float:
            if count not in measured:
                measured[count] = _median_seconds(full if count == 0 else load(model, choose(count)), ids, repeats)
                advance(1)
            return measured[count]

        unpruned = seconds_of(0)
        limit = unpruned / budget if seconds is None else budget
        low, high = 0, depth - 1  # the answer lies between; high is known to keep the budget
        if seconds_of(high) > limit:
            name, least = ("seconds", "at least") if speedup is None else ("speedup", "at most")
            found = seconds_of(high) if speedup is None else unpruned / seconds_of(high)
            raise ValueError(f"{name}: expected {least} {found:.4g} ({high} of {depth} layers omitted), got {budget}")
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if seconds_of(middle) <= limit else (middle + 1, high)
    chosen = choose(high)
    origin = chosen.origin or origin_of(model, "deepest")
    method = f"{origin.method}; the fewest within {limit:.4g} s for {batch} x {tokens} tokens"
    return BudgetedPlan(chosen.replace(origin=dataclasses.replace(origin, method=method)), limit, measured)


def shortest_paying(
    model: Any,
    plan: Plan,
    lengths: Sequence[int] = (16, 32, 64, 128, 256, 512, 1024),
    *,
    batch: int = 1,
    repeats: int = REPEATS,
    progress: Progress = False,
) -> int | None:
    """From which prompt length on the plan's prefill is faster than the native full one: what ``min_tokens`` is for.

    Args:
        lengths: prompt lengths that are timed, the two arms in turn.
        progress: True for a bar, or a callback told (lengths timed, all of them).

    Returns:
        the first of ``lengths`` from which on every one was faster pruned; None where the longest was not.
    """
    for name, value in (("batch", batch), ("repeats", repeats), *(("lengths", length) for length in lengths)):
        _check_positive(name, value)
    full, pruned = load(model, Plan.last(plan.num_layers, 0)), load(model, plan)
    paying = None
    ordered = sorted(set(lengths), reverse=True)
    with reporting(progress, "timing lengths", len(ordered)) as advance:
        for length in ordered:
            ids = _random_ids(full.spec.vocab_size, batch, length, full.device)
            rounds = [(_seconds(full, ids), _seconds(pruned, ids)) for _ in range(repeats + 1)]
            advance(1)
            of_full, of_pruned = zip(*rounds[1:], strict=True)  # the first warms up
            if statistics.median(of_pruned) >= statistics.median(of_full):
                break
            paying = length
    return paying


def _check_budget(seconds: float | None, speedup: float | None) -> float:
    given = {name: value for name, value in (("seconds", seconds), ("speedup", speedup)) if value is not None}
    if len(given) != 1:
        raise ValueError(f"seconds, speedup: expected exactly one of them, got {'both' if given else 'neither'}")
    [(name, value)] = given.items()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not value > 0:
        raise ValueError(f"{name}: expected more than 0, got {value!r}")
    return float(value)


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def _random_ids(vocab_size: int, batch: int, tokens: int, device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randint(0, vocab_size, (batch, tokens), generator=generator, device="cpu").to(device)


def _median_seconds(native: Prefiller, ids: Tensor, repeats: int) -> float:
    _seconds(native, ids)  # warms up
    return statistics.median(_seconds(native, ids) for _ in range(repeats))


def _seconds(native: Prefiller, ids: Tensor) -> float:
    start = time.perf_counter()
    native.prefill(ids).logits[0, -1].argmax().item()  # waits for a GPU
    return time.perf_counter() - start
