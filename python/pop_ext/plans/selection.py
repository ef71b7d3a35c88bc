"""From a score a layer to a plan: the layers that matter least."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import SupportsIndex

from pop_ext.plans.origin import Origin
from pop_ext.plans.plan import Plan


def ranked_plan(
    scores: Sequence[float],
    origin: Origin,
    count: SupportsIndex | None = None,
    fraction: float | None = None,
    *,
    contiguous: bool,
    boundary: SupportsIndex = 1,
    min_tokens: SupportsIndex = 0,
) -> Plan:
    """Omits the layers of the lowest scores; how many, as for ``Plan.last``.

    Args:
        scores: one a layer; the lower, the less the layer matters.
        origin: model, method and samples of the scores.
        contiguous: consecutive layers with the lowest sum, instead of each for itself.

    Raises:
        ValueError, TypeError: as for ``Plan.last``.
    """
    if not isinstance(contiguous, bool):
        raise TypeError(f"contiguous: expected a bool, got {type(contiguous).__name__}")
    deepest = Plan.last(len(scores), count, fraction, boundary=boundary, min_tokens=min_tokens)
    omit = _lowest_run(scores, len(deepest.omit)) if contiguous else _lowest(scores, len(deepest.omit))
    method = f"{origin.method}, {'contiguous' if contiguous else 'free'}"
    return Plan(len(scores), omit, boundary, min_tokens, origin=dataclasses.replace(origin, method=method))


# Of equal layers the deeper ones go: nothing that reads them comes after.


def _lowest(scores: Sequence[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda layer: (scores[layer], -layer))[:count]


def _lowest_run(scores: Sequence[float], count: int) -> range:
    starts = range(len(scores) - count, -1, -1)
    start = min(starts, key=lambda begin: math.fsum(scores[begin : begin + count]))
    return range(start, start + count)
