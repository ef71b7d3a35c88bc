"""docs/calls.md names existing tests for what it says."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs" / "calls.md"


def rows() -> list[list[str]]:
    section = DOCUMENT.read_text(encoding="utf-8").split("## What each way to call")[1].split("\n## ")[0]
    table = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in table[2:]]


def test_every_row_of_the_table_of_calls_names_tests_that_exist():
    defined = {
        name for path in TESTS.glob("*/test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(rows()) >= 12
    for row in rows():
        named = re.findall(r"`(test_\w+)`", row[-1])
        assert named, row
        assert set(named) <= defined, row
