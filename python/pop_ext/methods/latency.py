"""Plans by measured time: the fewest omitted layers within a budget, and the prompt length from which pruning pays."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pop_ext.hf.load import load
from pop_ext.methods.calibration import longest_input
from pop_ext.plans.origin import origin_of
from pop_ext.plans.plan import Plan
from pop_ext.utils.progress import Progress, reporting

PAYS_FROM = (16, 32, 64, 128, 256, 512, 1024)
"""Default prompt lengths that are timed to find ``min_tokens``."""
REPEATS = 5
"""Default number of timed prefills for each plan."""


class Prefiller(Protocol):
    """A model whose prefill is timed."""

    def prefill(self, input_ids: Tensor) -> Any:
        """Prefill ``input_ids`` int [batch, T]; the result has ``logits`` [batch, 1, vocab]."""


class BudgetedPlan(NamedTuple):
    """A plan within a budget of time, as ``pop_ext.plan_within`` returns it.

    Attributes:
        plan: The plan with the fewest omitted layers within the budget. Its origin states the budget.
        budget: Seconds that a prefill may take.
        measured: Number of omitted layers -> median seconds of a prefill, for each number that was tried.
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
    """Find the fewest omitted layers whose native prefill, timed on this machine, stays within a budget.

    The number is found by bisection, which assumes that omitting more layers is never slower.

    Args:
        model: Hugging Face model of a native family.
        choose: Function from a number of layers to a plan that omits that many, such as the ``plan`` method of an
            importance or ``functools.partial(Plan.last, depth)``.
        seconds: Budget as the time of a prefill. Exactly one of ``seconds`` and ``speedup`` is required.
        speedup: Budget as a factor over the native full prefill, which is timed in the same run.
        tokens: Length of the prompts, which are random ids.
        batch: Number of prompts per prefill.
        repeats: Number of timed prefills for each plan, after one to warm up. The median counts.
        progress: True for a progress bar, or a callback that takes (plans timed, None).

    Returns:
        The plan, the budget in seconds and the times.

    Raises:
        UnsupportedModelError: The model has no native form. It is a ValueError.
        ValueError: An argument has a bad value, or even one retained layer exceeds the budget.
        TypeError: An argument has the wrong type.
    """
    budget = _check_budget(seconds, speedup)
    for name, value in (("tokens", tokens), ("batch", batch), ("repeats", repeats)):
        _check_positive(name, value)
    full = load(model, choose(0))
    depth, ids = full.spec.num_layers, random_ids(full.spec.vocab_size, batch, tokens, full.device)
    measured: dict[int, float] = {}
    with reporting(progress, "timing plans", None) as advance:

        def measured_at(count: int) -> float:
            if count not in measured:
                measured[count] = _median_seconds(full if count == 0 else load(model, choose(count)), ids, repeats)
                advance(1)
            return measured[count]

        unpruned = measured_at(0)
        limit = unpruned / budget if seconds is None else budget
        low, high = 0, depth - 1  # bounds of the answer; high is known to be within the budget
        if measured_at(high) > limit:
            name, least = ("seconds", "at least") if speedup is None else ("speedup", "at most")
            found = measured_at(high) if speedup is None else unpruned / measured_at(high)
            raise ValueError(f"{name}: expected {least} {found:.4g} ({high} of {depth} layers omitted), got {budget}")
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if measured_at(middle) <= limit else (middle + 1, high)
    chosen = choose(high)
    origin = chosen.origin or origin_of(model, "deepest")
    method = f"{origin.method}; the fewest within {limit:.4g} s for {batch} x {tokens} tokens"
    return BudgetedPlan(chosen.replace(origin=dataclasses.replace(origin, method=method)), limit, measured)


def with_min_tokens(model: Any, plan: Plan, lengths: Sequence[int], progress: Progress) -> Plan:
    """Time a plan at each prompt length, and set the shortest at which it is faster as its ``min_tokens``.

    Lengths that the model does not take are left out. If it is faster at none, ``min_tokens`` exceeds the longest
    length that was timed. Without a length the plan stays as it is.

    Args:
        model: Hugging Face model of a native family.
        plan: The plan.
        lengths: Prompt lengths to time.
        progress: As for ``shortest_paying``.
    """
    limit = longest_input(model)
    lengths = [length for length in lengths if not limit or length <= limit]
    if not lengths:
        return plan
    paying = shortest_paying(model, plan, lengths, progress=progress)
    return plan.replace(min_tokens=max(lengths) + 1 if paying is None else paying)


def shortest_paying(
    model: Any,
    plan: Plan,
    lengths: Sequence[int] = PAYS_FROM,
    *,
    batch: int = 1,
    repeats: int = REPEATS,
    progress: Progress = False,
) -> int | None:
    """Find the prompt length from which a plan's prefill is faster than the native full prefill.

    Use the result as ``min_tokens`` of the plan. Both prefills are timed in turn.

    Args:
        model: Hugging Face model of a native family.
        plan: The plan.
        lengths: Prompt lengths to time.
        batch: Number of prompts per prefill.
        repeats: Number of timed prefills for each length, after one to warm up. The median counts.
        progress: True for a progress bar, or a callback that takes (lengths timed, their number).

    Returns:
        The smallest of ``lengths`` for which it and every longer one were faster with the plan. None if the longest
        was not.

    Raises:
        UnsupportedModelError: The model has no native form. It is a ValueError.
        ValueError: An argument has a bad value.
        TypeError: An argument has the wrong type.
    """
    for name, value in (("batch", batch), ("repeats", repeats), *(("lengths", length) for length in lengths)):
        _check_positive(name, value)
    full, pruned = load(model, Plan.last(plan.num_layers, 0)), load(model, plan)
    paying = None
    ordered = sorted(set(lengths), reverse=True)
    with reporting(progress, "timing lengths", len(ordered)) as advance:
        for length in ordered:
            ids = random_ids(full.spec.vocab_size, batch, length, full.device)
            rounds = [(seconds_of(full, ids), seconds_of(pruned, ids)) for _ in range(repeats + 1)]
            advance(1)
            full_times, pruned_times = zip(*rounds[1:], strict=True)  # the first round warms up
            if statistics.median(pruned_times) >= statistics.median(full_times):
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


def random_ids(vocab_size: int, batch: int, tokens: int, device: torch.device) -> Tensor:
    """Return random ids int64 [batch, tokens], the same in every run."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randint(0, vocab_size, (batch, tokens), generator=generator, device="cpu").to(device)


def _median_seconds(native: Prefiller, ids: Tensor, repeats: int) -> float:
    seconds_of(native, ids)  # warm-up
    return statistics.median(seconds_of(native, ids) for _ in range(repeats))


def seconds_of(native: Prefiller, ids: Tensor) -> float:
    """Return the time of a prefill and of the choice of the first token."""
    start = time.perf_counter()
    native.prefill(ids).logits[0, -1].argmax().item()  # synchronises a GPU
    return time.perf_counter() - start
