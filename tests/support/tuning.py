"""The switches of the backends (`torch.ops.pop.tune`), for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tuned(**options: int) -> Iterator[None]:
    """Sets every option, and puts it back at the end."""
    before = {option: torch.ops.pop.tune(option, value) for option, value in options.items()}
    try:
        yield
    finally:
        for option, value in before.items():
            torch.ops.pop.tune(option, value)
