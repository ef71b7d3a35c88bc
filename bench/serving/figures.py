"""The figures of a round and of a cell: time to first token, time per output token, throughput, processor time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.measure import Summary, paired_ratio
from bench.serving.ceilings import Ceilings, Request

PLAIN, POP = "plain", "pop"
ARMS = (PLAIN, POP)


@dataclass(frozen=True)
class Round:
    """One round of one arm: every request of it, as vLLM's load generator times them.

    Attributes:
        seconds: from the first request sent to the last token received.
        processor_s: processor time of the server's processes in that time.
        prompt_tokens: of each request.
        output_tokens: of each request.
        ttft_s: seconds from sending a request to its first token.
        latency_s: seconds from sending a request to its last token.
    """

    seconds: float
    processor_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_s: list[float]
    latency_s: list[float]

    @property
    def requests(self) -> int:
        """Number of requests."""
        return len(self.ttft_s)

    @property
    def tpot_s(self) -> list[float]:
        """Seconds per output token after the first, of each request; empty if there is one token."""
        steps = self.output_tokens - 1
        if steps == 0:
            return []
        return [(last - first) / steps for first, last in zip(self.ttft_s, self.latency_s, strict=True)]

    def figures(self) -> dict[str, float]:
        """Return this round's figure for each name in ``COST`` and ``RATE`` that it has."""
        found = {
            "processor_s": self.processor_s / self.requests,
            "ttft_s": statistics.median(self.ttft_s),
            "e2e_s": statistics.median(self.latency_s),
            "requests_per_s": self.requests / self.seconds,
            "prompt_tokens_per_s": self.requests * self.prompt_tokens / self.seconds,
        }
        return found | ({"tpot_s": statistics.median(self.tpot_s)} if self.tpot_s else {})


COST = ("processor_s", "ttft_s", "tpot_s", "e2e_s")
"""Figures of which less is better: processor time of a request, and medians of its times."""
RATE = ("requests_per_s", "prompt_tokens_per_s")
"""Figures of which more is better."""


@dataclass
class Cell:
    """One length of prompts at one concurrency.

    Attributes:
        request: the shape of its requests.
        ceilings: "flops" and, if the peaks were measured, "roofline".
        rounds: name of the arm -> its rounds, paired by index.
        warm_up: the same of the rounds before.
        failed: the reason why it has no figures; None if it did not fail.
    """

    request: Request
    ceilings: dict[str, Ceilings]
    rounds: dict[str, list[Round]] = field(default_factory=lambda: {name: [] for name in ARMS})
    warm_up: dict[str, list[Round]] = field(default_factory=lambda: {name: [] for name in ARMS})
    failed: str | None = None

    def samples(self, arm: str, name: str) -> list[float]:
        """Return a figure of every round of an arm; empty if it has none."""
        return [figures[name] for one in self.rounds[arm] if name in (figures := one.figures())]

    def summary(self, arm: str, name: str) -> Summary | None:
        """Summarise a figure over the rounds of an arm; None if it has none."""
        samples = self.samples(arm, name)
        return Summary.of(samples) if samples else None

    def ttft_percentile(self, arm: str, share: float) -> float:
        """Return a percentile of the time to first token over the requests of all rounds."""
        return percentile([value for one in self.rounds[arm] for value in one.ttft_s], share)

    def ratio(self, name: str) -> Ratio | None:
        """Return how many times as good as plain POP is; None if the figure is missing."""
        plain, pop = (self.samples(arm, name) for arm in ARMS)
        if not plain:
            return None
        better, worse = (plain, pop) if name in COST else (pop, plain)
        rounds = [a / b for a, b in zip(better, worse, strict=True)]
        return Ratio(paired_ratio(better, worse), Summary.of(rounds), rounds)

    def ceiling(self, name: str, kind: str = "flops") -> float | None:
        """Return the ceiling of a ratio; None for the time per output token, which POP leaves as it is."""
        found = self.ceilings.get(kind)
        if found is None or name == "tpot_s":
            return None
        return found.prefill if name == "ttft_s" else found.request

    def share(self, name: str, kind: str = "flops") -> float | None:
        """Return which part of its ceiling a ratio reaches."""
        ratio, ceiling = self.ratio(name), self.ceiling(name, kind)
        return None if ratio is None or ceiling is None else ratio.median / ceiling


@dataclass(frozen=True)
class Ratio:
    """Plain by POP, or POP by plain for a rate, round by round.

    Attributes:
        median: median over the rounds.
        spread: its quartiles.
        rounds: the ratio of each round.
    """

    median: float
    spread: Summary
    rounds: list[float]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` of the values lie, by linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def cell_json(cell: Cell) -> dict[str, Any]:
    """Return a cell as JSON values, with every round and request."""
    facts: dict[str, Any] = {
        "tokens": cell.request.tokens,
        "output_tokens": cell.request.output_tokens,
        "chunk": cell.request.chunk,
        "concurrency": cell.request.concurrency,
        "failed": cell.failed,
        "ceilings": {kind: {"prefill": c.prefill, "request": c.request} for kind, c in cell.ceilings.items()},
        "arms": {arm: _arm_json(cell, arm) for arm in ARMS},
        "ratios": {},
    }
    if cell.failed is None:
        facts["ratios"] = {name: found for name in (*COST, *RATE) if (found := _ratio_json(cell, name)) is not None}
    return facts


def _arm_json(cell: Cell, arm: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "rounds": [_round_json(one) for one in cell.rounds[arm]],
        "warm_up": [_round_json(one) for one in cell.warm_up[arm]],
    }
    if not cell.rounds[arm]:
        return facts
    for name in (*COST, *RATE):
        if (summary := cell.summary(arm, name)) is not None:
            facts[name] = {"median": summary.median, "q1": summary.q1, "q3": summary.q3, "min": summary.minimum}
    return facts | {"ttft_p50_s": cell.ttft_percentile(arm, 0.5), "ttft_p99_s": cell.ttft_percentile(arm, 0.99)}


def _round_json(one: Round) -> dict[str, Any]:
    return {
        "seconds": one.seconds,
        "processor_s": one.processor_s,
        "ttft_s": one.ttft_s,
        "latency_s": one.latency_s,
        **{f"{name}_of_round": value for name, value in one.figures().items()},
    }


def _ratio_json(cell: Cell, name: str) -> dict[str, Any] | None:
    ratio = cell.ratio(name)
    if ratio is None:
        return None
    return {
        "median": ratio.median,
        "q1": ratio.spread.q1,
        "q3": ratio.spread.q3,
        "rounds": ratio.rounds,
        "ceiling": cell.ceiling(name),
        "share_of_ceiling": cell.share(name),
        "roofline": cell.ceiling(name, "roofline"),
        "share_of_roofline": cell.share(name, "roofline"),
    }
