"""What the host does around the operator in a call of an enabled model: a device waits for what comes before it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pop_ext.hf.enable import enabled
from pop_ext.plans.plan import Plan

from bench.measure import synchronize


@dataclass(frozen=True)
class HostTimes:
    """Seconds of one call, medians.

    Attributes:
        before: until ``pop::prefill`` is called: what kind of call it is, packing, RoPE, cache, and on a CPU the look
            at the model's modules and weights.
        inside: of the operator; on CUDA it launches and does not wait.
        after: the head, the cache's new state and the output; on CUDA also the look, all beside what was launched.
    """

    before: float
    inside: float
    after: float


def host_times(model: Any, plan: Plan, input_ids: torch.Tensor, calls: int = 5) -> HostTimes:
    """Times calls that start on an idle device.

    Args:
        model: a Hugging Face model of a native family, enabled or not.
        plan: executed as given, whatever its ``min_tokens``.
        input_ids: ``[batch, tokens]``, on the model's device.
        calls: timed ones, after another.
    """
    samples = []
    with enabled(model, plan.replace(min_tokens=0), strict=True), torch.no_grad():
        for _ in range(1 + calls):
            synchronize(input_ids.device)
            with _operator_seen() as seen:
                start = time.perf_counter()
                output = model(input_ids, logits_to_keep=1)
                end = time.perf_counter()
            del output
            entered, left = seen
            samples.append((entered - start, left - entered, end - left))
    return HostTimes(*(statistics.median(column) for column in zip(*samples[1:], strict=True)))


@contextmanager
def _operator_seen() -> Iterator[list[float]]:
    """When ``torch.ops.pop.prefill`` was entered and left within the block."""
    prefill, seen = torch.ops.pop.prefill, []

    def timed(*arguments: Any) -> torch.Tensor:
        seen.append(time.perf_counter())
        hidden: torch.Tensor = prefill(*arguments)
        seen.append(time.perf_counter())
        return hidden

    torch.ops.pop.prefill = timed
    try:
        yield seen
    finally:
        torch.ops.pop.prefill = prefill
