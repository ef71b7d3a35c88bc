"""Set options of the backends (`torch.ops.pop.tune`) within a block, for the thread that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tuned(**options: int) -> Iterator[None]:
    """Set the options, and restore them at the end of the block."""
    before = {option: torch.ops.pop.tune(option, value) for option, value in options.items()}
    try:
        yield
    finally:
        for option, value in before.items():
            torch.ops.pop.tune(option, value)
