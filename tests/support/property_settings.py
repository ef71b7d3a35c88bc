"""Settings of hypothesis for property tests: profiles "ci", the default, and "long", with POP_LONG=1 (`make long`).

"ci" draws the same examples in every run of the same code. "long" draws new ones from a seed, which pytest prints if
a test fails and takes as `--hypothesis-seed`. Both print a line `@reproduce_failure(...)` for a failing example.
"""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

LONG = os.environ.get("POP_LONG", "0") not in ("", "0")
TIMES = 15
"""Examples of a property in "long" for one in "ci"."""

set_hypothesis_home_dir(Path(__file__).resolve().parents[2] / "build" / "hypothesis")
COMMON = {
    "deadline": None,  # the first example of a model builds it
    "database": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("ci", derandomize=True, **COMMON)
settings.register_profile("long", derandomize=False, **COMMON)
PROFILE = settings.get_profile("long" if LONG else "ci")


def examples(count: int) -> settings:
    """Return settings for `count` examples in "ci", and TIMES as many in "long"."""
    return settings(PROFILE, max_examples=count * TIMES if LONG else count)
