"""Growth of a process over mixed requests, from samples of its memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

PER_REQUEST = 24
"""Bytes in use that a request may add. The smallest leak is a block of 48."""
PER_RUN = 256 << 10
"""Bytes in use that the last quarter may have more than the second one, whatever grows and when."""
RESIDENT = 0.05
"""Part of the resident memory that the last quarter may have more than the second one."""
_WINDOW = 5


class Sample(NamedTuple):
    """One sample, after so many requests, in bytes."""

    requests: int
    in_use: int
    resident: int


def bytes_per_request(samples: Sequence[Sample]) -> float:
    """Return the bytes in use that a request adds.

    The least sample of each five counts, and of the slopes between these the median: what is made once, as by a first
    call of a kind, moves one slope, and a leak moves all of them. The first quarter is left out.
    """
    later = samples[len(samples) // 4 :]
    windows = [later[i : i + _WINDOW] for i in range(0, len(later) - _WINDOW + 1, _WINDOW)]
    least = [min(window, key=lambda sample: sample.in_use) for window in windows]
    slopes = [(b.in_use - a.in_use) / (b.requests - a.requests) for a, b in itertools.pairwise(least)]
    return float(np.median(slopes))


def growth_of(values: Sequence[int], of: Callable[[Sequence[int]], float] = min) -> int:
    """Return how much more the least of the last quarter is than the least of the second, or another measure of both.

    Resident memory is compared by its median: the system may take pages away for a while.
    """
    quarter = len(values) // 4
    return int(of(values[-quarter:]) - of(values[quarter : 2 * quarter]))


def fault_of(samples: Sequence[Sample]) -> str | None:
    """Return what grew too much, or None."""
    per_request, in_use = bytes_per_request(samples), growth_of([sample.in_use for sample in samples])
    resident = growth_of([sample.resident for sample in samples], np.median)
    if per_request > PER_REQUEST:
        return f"{per_request:.0f} bytes in use a request: expected at most {PER_REQUEST}"
    if in_use > PER_RUN:
        return f"{in_use} bytes in use: expected at most {PER_RUN}"
    if resident > RESIDENT * samples[len(samples) // 2].resident:
        return f"{resident} bytes of resident memory: expected at most {RESIDENT:.0%}"
    return None
