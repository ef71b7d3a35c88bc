"""What the cost model allows: the ratio of a request's work at full depth to its work under a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pop_ext import _core
from pop_ext.plans.plan import Plan
from pop_ext.utils.roofline import Peaks

Work = Callable[[dict[str, Any]], float]


@dataclass(frozen=True)
class Request:
    """The shape of a request.

    Attributes:
        tokens: length of the prompt.
        output_tokens: number of tokens to generate; the prefill gives the first.
        chunk: most rows of a prompt in one step (``max_num_batched_tokens``).
        concurrency: requests that decode in one step.
    """

    tokens: int
    output_tokens: int
    chunk: int
    concurrency: int = 1


@dataclass(frozen=True)
class Ceilings:
    """Most times as fast as plain that POP can be, by FLOPs or by the roofline.

    Attributes:
        prefill: of the prefill alone: time to first token.
        request: of the whole request, the decoding steps included, which are the same: processor time, throughput.
    """

    prefill: float
    request: float


def ceilings(spec: _core.ModelSpec, plan: Plan, request: Request, work: Work) -> Ceilings:
    """Return the ceilings of a request.

    Prompts are cut into chunks as if each were alone. Requests that are prefilled together share steps and are cut
    elsewhere, which moves a few boundary rows.

    Args:
        work: ``flops``, or ``least_seconds`` of the peaks.
    """
    full, pruned = (prefill_work(spec, one, request, work) for one in (None, plan))
    decode = decode_work(spec, request, work)
    return Ceilings(full / pruned, (full + decode) / (pruned + decode))


def prefill_work(spec: _core.ModelSpec, plan: Plan | None, request: Request, work: Work) -> float:
    """Return the work of the prefill of one prompt, at full depth (None) or under a plan."""
    total = 0.0
    for past, tokens in _chunks(request):
        if plan is None:
            total += work(_core.stock_cost(spec, [_core.SequenceShape(tokens, past=past)]))
            continue
        boundary = tokens if tokens < plan.min_tokens else min(plan.boundary, tokens)
        total += work(_core.plan_cost(spec, plan, [_core.SequenceShape(tokens, past=past, boundary=boundary)]))
    return total


def decode_work(spec: _core.ModelSpec, request: Request, work: Work) -> float:
    """Return the work of the tokens after the first, for one of ``concurrency`` requests that decode together."""
    steps, count = request.output_tokens - 1, request.concurrency
    if steps == 0:
        return 0.0
    # Cost is linear in the length of the past, so the middle one stands for all steps.
    past = request.tokens + (steps - 1) // 2
    return steps * work(_core.stock_cost(spec, [_core.SequenceShape(1, past=past)] * count)) / count


def flops(cost: dict[str, Any]) -> float:
    """Return the FLOPs of a cost."""
    return float(cost["flops"])


def roofline(peaks: Peaks) -> Work:
    """Return the function from a cost to its least seconds at these peaks."""
    return peaks.least_seconds


def _chunks(request: Request) -> Iterator[tuple[int, int]]:
    """Yield (past, rows) of the steps of a prompt."""
    for past in range(0, request.tokens, request.chunk):
        yield past, min(request.chunk, request.tokens - past)
