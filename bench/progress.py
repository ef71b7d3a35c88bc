"""Progress on stderr: rich's bar if rich is installed, else plain lines."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """A progress bar: ``with Progress("demo, 512 tokens", 30) as bar: bar.step("hf-eager")``.

    Attributes:
        steps: number of steps; may be set later.
    """

    def __init__(self, title: str, steps: int = 0, quiet: bool = False) -> None:
        self._title = title
        self.steps = steps
        self._done = 0
        self._rich: Any = None
        if quiet or not sys.stderr.isatty():
            self._mode = "quiet" if quiet else "lines"
            return
        self._mode = "carriage"
        try:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress
        except ImportError:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        self._rich = RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._mode = "rich"

    def __enter__(self) -> Progress:
        if self._rich is not None:
            self._rich.start()
            self._task = self._rich.add_task(self._title, total=self.steps)
        elif self._mode == "lines":
            print(f"{self._title} ...", file=sys.stderr, flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self._mode == "carriage":
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def step(self, label: str) -> None:
        """Count a finished step and show its label."""
        self._done += 1
        if self._rich is not None:
            self._rich.update(self._task, total=self.steps, completed=self._done, description=f"{self._title}: {label}")
        elif self._mode == "carriage":
            share = 100 * self._done // max(1, self.steps)
            print(f"\r\x1b[K{self._title}: {share} % ({label})", end="", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._rich is not None:
            self._rich.console.print(text, highlight=False)
        elif self._mode != "quiet":
            print(("\r\x1b[K" if self._mode == "carriage" else "") + text, file=sys.stderr, flush=True)
