"""Pages name existing tests for what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"


def rows(page: str, title: str) -> list[list[str]]:
    section = (DOCS / page).read_text(encoding="utf-8").split(f"## {title}")[1].split("\n## ")[0]
    table = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in table[2:]]


@pytest.mark.parametrize(
    ("page", "title", "least"), [("calls.md", "What each way to call", 12), ("notes/reliability.md", "Faults", 20)]
)
def test_every_row_of_a_table_names_tests_that_exist(page, title, least):
    defined = {
        name for path in TESTS.glob("*/test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(rows(page, title)) >= least
    for row in rows(page, title):
        named = re.findall(r"`(test_\w+)`", row[-1])
        assert named, row
        assert set(named) <= defined, row
