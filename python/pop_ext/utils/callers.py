"""Find the caller of pop_ext, for warnings that point to it."""

from __future__ import annotations

import inspect
import warnings

# A warning points to the nearest frame outside these packages.
_NOT_THE_CALLER = ("pop_ext", "torch", "transformers", "contextlib")


def warn_caller(text: str) -> None:
    """Warn with a ``UserWarning`` on the line that called pop_ext; the commands print it on one line."""
    warnings.warn(f"pop_ext: {text}", stacklevel=caller_level())


def caller_level() -> int:
    """Return the ``stacklevel`` that puts a warning of the calling function on the line that called pop_ext."""
    frame = inspect.currentframe()
    level = 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_CALLER:
        frame = frame.f_back
        level += 1
    return level
