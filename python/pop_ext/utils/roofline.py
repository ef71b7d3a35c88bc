"""Bound the time of a prefill by the machine's peaks: a stage takes at least as long as its FLOPs or its bytes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

_SIDE = {"cpu": 1024, "cuda": 8192}  # of the products
_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}  # of what is copied, in float32: 64 MiB, 1 GiB


@dataclass(frozen=True)
class Peaks:
    """What the machine reached in this run.

    Attributes:
        flop_per_s: by the fastest matrix product.
        bytes_per_s: by a large copy or read.
    """

    flop_per_s: float
    bytes_per_s: float

    def least_seconds(self, cost: dict[str, Any]) -> float:
        """Return the least time of a prefill: for each stage the longer of its FLOPs and its bytes.

        Args:
            cost: ``flops`` and ``bytes`` of every stage, from ``_core.stock_cost`` or ``_core.plan_cost``.
        """
        stages = cost["stages"].values()
        return sum(max(one["flops"] / self.flop_per_s, one["bytes"] / self.bytes_per_s) for one in stages)

    def roofline(self, cost: dict[str, Any], baseline: dict[str, Any]) -> float:
        """Return the least time of a baseline divided by that of a prefill: what the speed-up can be at these peaks."""
        return self.least_seconds(baseline) / self.least_seconds(cost)

    def __str__(self) -> str:
        return f"{self.flop_per_s / 1e9:,.0f} GFLOP/s and {self.bytes_per_s / 1e9:,.1f} GB/s"


def measure_peaks(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> Peaks:
    """Measure both peaks in about a second: square products of a dtype, and a large copy and read.

    On a CPU the product is that of native prefills, and of 16-bit weights also that of float32, to which such a prefill
    widens them where that is faster. ``bench/run.py`` measures more shapes, for longer.
    """
    side, elements = (sizes.get(device.type, sizes["cpu"]) for sizes in (_SIDE, _ELEMENTS))

    def product(dtype: torch.dtype, call: Callable[..., Any]) -> Callable[[], Any]:
        a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
        return lambda: call(a, b)

    products = [product(dtype, torch.ops.pop.linear if device.type == "cpu" else F.linear)]
    if device.type == "cpu":
        products.append(product(torch.float32, F.linear))
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    size = source.nbytes
    moved = {2 * size: lambda: target.copy_(source), size: lambda: source.sum()}
    with torch.no_grad():
        return Peaks(
            max(2.0 * side**3 / _least_seconds(call, device, repeats) for call in products),
            max(count / _least_seconds(call, device, repeats) for count, call in moved.items()),
        )


def _least_seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the shortest of some runs, after one to warm up."""

    def seconds() -> float:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    seconds()
    return min(seconds() for _ in range(repeats))
