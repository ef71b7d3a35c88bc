"""Progress of what takes seconds: a bar, or a call of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int | None], None]
"""Told after each step how many are done, and of how many; None where nobody knows."""

Progress = bool | Report
"""True: a bar on standard error (needs rich, extra ``cli``); or a callback; False: nothing."""


@contextmanager
def reporting(progress: Progress, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Inside: what it gives is called with the number of steps that were just done.

    Raises:
        TypeError: ``progress`` is neither a bool nor callable.
        ImportError: a bar is wanted, and rich is missing.
    """
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"progress: expected a bool or a callable, got {type(progress).__name__}")
    if isinstance(progress, bool):
        if not progress:
            yield lambda steps: None
            return
        with _bar(what, total) as advance:
            yield advance
        return
    report, done = progress, 0

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        report(done, total)

    yield count


@contextmanager
def _bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining
    except ImportError as error:
        raise ImportError("progress: a bar needs rich: pip install 'pop_ext[cli]'", name=error.name) from None
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Remaining())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps: bar.advance(task, steps)
