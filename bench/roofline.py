"""Bound the time of a prefill by the machine's peaks: a stage takes at least as long as its FLOPs or its bytes do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
