"""Numbers on a command line that a bench cannot use are refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import continuous_batching, int8, interrupts, portable

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("bench", "option", "least"),
    [
        (int8, "--rounds", 1),
        (int8, "--rows", 1),
        (int8, "--tokens", 2),
        (portable, "--rounds", 1),
        (portable, "--lengths", 2),
        (continuous_batching, "--lengths", 2),
        (continuous_batching, "--prompts", 1),
        (continuous_batching, "--rounds", 1),
        (interrupts, "--tokens", 2),
        (interrupts, "--signals", 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("text", ["least - 1", "many"])
def test_numbers_are_checked(bench, option, least, text, monkeypatch, capsys):
    text = text.replace("least - 1", str(least - 1))
    monkeypatch.setattr(sys, "argv", ["bench", option, text])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert f"argument {option}: expected an integer from {least}, got {text}" in capsys.readouterr().err
