"""The progress bar on a terminal with rich and without it, and off a terminal."""

from __future__ import annotations

import io
import sys

import pytest
from pop_ext.utils.progress import ProgressBar, reporting


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self) -> bool:
        return True


def terminal_as_stderr(monkeypatch):
    """Replace standard error by a terminal. Call it in a test, not in a fixture: pytest replaces it after fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    return stream


def without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)


def test_rich_draws_the_bar_on_a_terminal(monkeypatch):
    terminal = terminal_as_stderr(monkeypatch)
    with reporting(True, "scoring", 3) as advance:
        advance(2)
        assert "scoring" in terminal.getvalue()
        assert "2/3" in terminal.getvalue()


def test_the_bar_is_drawn_between_steps_only(monkeypatch):
    terminal = terminal_as_stderr(monkeypatch)
    with ProgressBar("scoring", 3) as bar:
        assert bar._rich.live._refresh_thread is None
        bar.advance(label="first")
        assert "scoring: first" in terminal.getvalue()


def test_without_rich_the_bar_is_one_line_of_text(monkeypatch):
    terminal = terminal_as_stderr(monkeypatch)
    without_rich(monkeypatch)
    with ProgressBar("scoring") as bar:
        bar.advance(2, "first")
        bar.log("a note")
        bar.total = 4
        bar.advance()
    shown = [line.rpartition("\x1b[K")[2] for line in terminal.getvalue().split("\r") if line]
    assert shown == ["scoring: first 2/?", "a note\n", "scoring 3/4", ""]


@pytest.mark.parametrize("rich", [True, False])
def test_off_a_terminal_only_notes_are_printed(rich, monkeypatch, capsys):
    if not rich:
        without_rich(monkeypatch)
    with ProgressBar("scoring", 3) as bar:
        bar.advance()
        bar.log("[a] note")
    assert capsys.readouterr().err == "[a] note\n"


def slow_clock(monkeypatch, seconds):
    """Let that many seconds pass at each look at the clock."""
    now = iter(range(0, 10**6, seconds))
    monkeypatch.setattr("pop_ext.utils.progress.monotonic", lambda: float(next(now)))


def test_off_a_terminal_slow_steps_print_lines(monkeypatch, capsys):
    slow_clock(monkeypatch, 3)
    with ProgressBar("scoring", 4) as bar:  # 0 s
        bar.advance()  # 3 s: too early
        bar.advance(label="second")  # 6 s, printed at 9 s
        bar.advance(label="third")  # 12 s: too early
        bar.advance(label="last")  # 15 s, printed at 18 s
    with ProgressBar("timing", 3) as bar:  # 21 s
        bar.advance()  # 24 s: too early
        bar.advance()  # 27 s, printed at 30 s
        bar.advance()  # 33 s: too early, so at the end, at 36 s
    lines = ["scoring: second 2/4 (9 s)", "scoring: last 4/4 (18 s)", "timing 2/3 (9 s)", "timing 3/3 (15 s)"]
    assert capsys.readouterr().err.splitlines() == lines


def test_off_a_terminal_a_quiet_or_failed_bar_ends_without_a_line(monkeypatch, capsys):
    slow_clock(monkeypatch, 9)
    with ProgressBar("scoring", 1, quiet=True) as bar:
        bar.advance()

    def fail():
        with reporting(True, "fitting", 2) as advance:
            advance(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert capsys.readouterr().err.splitlines() == ["fitting 1/2 (18 s)"]


def test_a_quiet_bar_prints_nothing(monkeypatch):
    terminal = terminal_as_stderr(monkeypatch)
    with ProgressBar("scoring", 3, quiet=True) as bar:
        bar.advance()
        bar.log("a note")
    with reporting(False, "scoring", 3) as advance:
        advance(1)
    assert terminal.getvalue() == ""


def test_a_callback_is_told_steps_done_and_total():
    told = []
    with reporting(lambda *done: told.append(done), "scoring", None) as advance:
        advance(2)
        advance(1)
    assert told == [(2, None), (3, None)]
