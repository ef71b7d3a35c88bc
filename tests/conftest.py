"""What every test stands on: one torch thread, a fixed seed, no network, and a closing count of what was skipped."""

from __future__ import annotations

import os
from collections import Counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download something fails at once

import instruction_sets
import pytest
import torch

NEEDS_GPU = "needs an NVIDIA GPU"


@pytest.fixture(autouse=True)
def one_thread_and_one_seed():
    """The models are tiny: more threads only wait for each other. A test may set its own number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items):
    """Tests marked `cuda` are skipped, under one reason, where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda") is not None:
            item.add_marker(pytest.mark.skip(reason=NEEDS_GPU))


def pytest_terminal_summary(terminalreporter):
    """Closes with `skips: none`, or a line `skips: <count> x <reason>` each, for .ci/run to compare with its list."""
    reasons = Counter(skip_reason(report) for report in terminalreporter.stats.get("skipped", []))
    terminalreporter.section("skips")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"skips: {count} x {reason}")
    if not reasons:
        terminalreporter.write_line("skips: none")
    terminalreporter.write_line(instruction_sets.report())


def skip_reason(report) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return " ".join(text.removeprefix("Skipped: ").split())
