"""Turn one score per layer into a plan that omits the layers of the lowest scores."""

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
    """Return the plan that omits the layers of the lowest scores.

    Args:
        scores: One score per layer. A lower score means that the layer matters less.
        origin: Model, method and samples of the scores.
        count: Number of layers to omit.
        fraction: Fraction of the layers to omit, in place of ``count``. With neither, a third is omitted.
        contiguous: True to omit consecutive layers, those of the lowest sum. False to choose each layer on its own.
        boundary: As for ``Plan``.
        min_tokens: As for ``Plan``.

    Returns:
        The plan. Its origin is ``origin`` with ", contiguous" or ", free" added to the method.

    Raises:
        ValueError: As for ``Plan.last``.
        TypeError: As for ``Plan.last``, or ``contiguous`` is not a bool.
    """
    if not isinstance(contiguous, bool):
        raise TypeError(f"contiguous: expected a bool, got {type(contiguous).__name__}")
    deepest = Plan.last(len(scores), count, fraction, boundary=boundary, min_tokens=min_tokens)
    omit = _lowest_run(scores, len(deepest.omit)) if contiguous else _lowest(scores, len(deepest.omit))
    method = f"{origin.method}, {'contiguous' if contiguous else 'free'}"
    return Plan(len(scores), omit, boundary, min_tokens, origin=dataclasses.replace(origin, method=method))


# Of layers with equal scores the deeper ones are omitted, because fewer layers read their output.


def _lowest(scores: Sequence[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda layer: (scores[layer], -layer))[:count]


def _lowest_run(scores: Sequence[float], count: int) -> range:
    starts = range(len(scores) - count, -1, -1)
    start = min(starts, key=lambda begin: math.fsum(scores[begin : begin + count]))
    return range(start, start + count)
