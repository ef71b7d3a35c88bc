"""Measure the host time around the operator in a call of an enabled model; a device idles during the part before."""

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
    """Seconds of the parts of one call, medians over calls.

    Attributes:
        before: until ``pop::prefill`` is called: classifying the call, packing, RoPE tables, cache, and on a CPU
            validating the model's modules and weights.
        inside: in the operator; on CUDA it launches kernels and does not wait for them.
        after: head, cache state and output; on CUDA also validating the model. The device computes meanwhile.
    """

    before: float
    inside: float
    after: float


def host_times(
    model: Any, plan: Plan, input_ids: torch.Tensor, calls: int = 5, products: str | None = None
) -> HostTimes:
    """Time calls that start on an idle device.

    Args:
        model: a Hugging Face model of a native family, enabled or not.
        plan: executed as given; its ``min_tokens`` is ignored.
        input_ids: ``[batch, tokens]``, on the model's device.
        calls: number of timed calls; an untimed one comes first.
        products: "fp8" or "int8" if its products are in 8 bits.
    """
    samples = []
    options: dict[str, Any] = {} if products is None else {products: True}
    with enabled(model, plan.replace(min_tokens=0), strict=True, **options), torch.no_grad():
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
    """Record when ``torch.ops.pop.prefill`` is entered and left within the block (``time.perf_counter``)."""
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
