"""Progress of long-running calls: a bar on standard error, or a callback of the caller's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from types import TracebackType
from typing import Any

Callback = Callable[[int, int | None], None]
"""Called after each step with the steps done and their total, None if the total is unknown."""

Progress = bool | Callback
"""The ``progress`` argument of public functions: True for a bar, a callback, or False for neither."""


@contextmanager
def reporting(progress: Progress, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show or report the progress of the block; yield a function to call with the steps just done.

    Args:
        progress: True for a `ProgressBar`, a callback, or False for neither.
        title: Description of the work, shown beside the bar.
        total: Number of steps, None if unknown.

    Raises:
        TypeError: ``progress`` is neither a bool nor callable.
    """
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"progress: expected a bool or a callable, got {type(progress).__name__}")
    if isinstance(progress, bool):
        with ProgressBar(title, total, quiet=not progress) as bar:
            yield lambda steps: bar.advance(steps)
        return
    report, done = progress, 0

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        report(done, total)

    yield count


INTERVAL = 5.0
"""Seconds between two lines of progress where standard error is no terminal."""


class ProgressBar:
    """A progress bar on standard error: rich's if it is installed (extra ``cli``), else one line of plain text.

    It is drawn between steps only, because a drawing thread would disturb what is being timed. It is removed at the
    end. If standard error is no terminal, a plain line is printed after a step instead, at most one in ``INTERVAL``
    seconds, and one at the end of work that took longer.

    Example::

        with ProgressBar("timing", total=30) as bar:
            bar.advance(label="warm-up")

    Args:
        title: Description of the work, shown beside the bar.
        total: Number of steps, None if unknown.
        quiet: Draw and print nothing.

    Attributes:
        total: Number of steps; may be set once it is known.
        done: Number of steps done.
    """

    def __init__(self, title: str, total: int | None = None, *, quiet: bool = False) -> None:
        self.total, self.done = total, 0
        self._title, self._quiet = title, quiet
        self._draws = not quiet and sys.stderr.isatty()
        self._rich = _rich_progress() if self._draws else None
        self._label, self._shown = "", 0
        self._start = self._printed = monotonic()

    def __enter__(self) -> ProgressBar:
        if self._rich is not None:
            self._rich.start()
            self._task = self._rich.add_task(self._title, total=self.total)
            self._rich.refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self._draws:
            self._write("\r\x1b[K")
        elif kind is None and self._printed > self._start and self.done > self._shown:
            self._print_line()

    def advance(self, steps: int = 1, label: str = "") -> None:
        """Count ``steps`` more as done and redraw the bar, with ``label`` after the title."""
        self.done += steps
        self._label = label
        if not self._draws:
            if not self._quiet and monotonic() - self._printed >= INTERVAL:
                self._print_line()
            return
        text = f"{self._title}: {label}" if label else self._title
        if self._rich is not None:
            self._rich.update(self._task, total=self.total, completed=self.done, description=text, refresh=True)
        else:
            self._write(f"\r\x1b[K{text} {self._count()}")

    def log(self, text: str) -> None:
        """Print a line that stays, above the bar; also if standard error is no terminal."""
        if self._rich is not None:
            self._rich.console.print(text, highlight=False, markup=False)
        elif not self._quiet:
            self._write(f"\r\x1b[K{text}\n" if self._draws else f"{text}\n")

    def _count(self) -> str:
        return f"{self.done}/{'?' if self.total is None else self.total}"

    def _print_line(self) -> None:
        """Print title, label, steps and elapsed seconds on a line of its own."""
        self._printed, self._shown = monotonic(), self.done
        text = f"{self._title}: {self._label}" if self._label else self._title
        self._write(f"{text} {self._count()} ({self._printed - self._start:.0f} s)\n")

    @staticmethod
    def _write(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)


def _rich_progress() -> Any:
    """Return rich's progress display, None if rich is not installed."""
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
