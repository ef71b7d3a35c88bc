"""Time a call, for tests that do something while it runs: no number of seconds suits every machine."""

from __future__ import annotations

import time
from collections.abc import Callable


def seconds_of(call: Callable[[], object]) -> float:
    """Return how long a call takes: the least of three."""
    samples = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return min(samples)
