"""Planted faults of cuda_mutants.py fit the sources, and the page has their table. `make cuda-mutants` runs them."""

from __future__ import annotations

import cuda_mutants
import pytest
from cuda_mutants import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_fault_changes_its_source(mutant, tmp_path):
    source = cuda_mutants.planted(mutant, tmp_path)
    assert source.is_file()
    assert (tmp_path / "cuda" / mutant.file).read_text() != (cuda_mutants.ROOT / "cuda" / mutant.file).read_text()


def test_the_page_says_of_each_planted_fault_what_catches_it():
    rows = [line.strip("|").split(" | ") for line in cuda_mutants.on_page().splitlines() if line.startswith("| ")][1:]
    results = {name.strip(): what.partition(":")[0].strip() for name, what in rows}
    assert set(results) == {mutant.name for mutant in MUTANTS}
    assert set(results.values()) <= {"checks", "races", "machine code", "nothing"}
    assert cuda_mutants.on_page() == cuda_mutants.table(results)
    assert {name for name, what in results.items() if what == "nothing"} <= {m.name for m in MUTANTS if m.why_not}
