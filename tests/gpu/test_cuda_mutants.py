"""Planted faults of cuda_mutants.py fit the sources, and the page has their table. `make cuda-mutants` runs them."""

from __future__ import annotations

from pathlib import Path

import cuda_mutants
import pytest
from planted_cuda_faults import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_fault_changes_its_source(mutant, tmp_path):
    source = cuda_mutants.planted(mutant, tmp_path)
    assert source.is_file()
    assert (tmp_path / "cuda" / mutant.file).read_text() != (cuda_mutants.ROOT / "cuda" / mutant.file).read_text()


def test_the_page_says_of_each_planted_fault_what_catches_it():
    rows = [line.strip("|").split(" | ") for line in cuda_mutants.on_page().splitlines() if line.startswith("| ")][1:]
    results = {name.strip(): what.partition(":")[0].strip() for name, what in rows}
    assert set(results) == {mutant.name for mutant in MUTANTS}
    assert set(results.values()) <= {"checks", "races", "machine code", "nothing"}  # and no timeout
    assert cuda_mutants.on_page() == cuda_mutants.table(results)
    assert {name for name, what in results.items() if what == "nothing"} <= {m.name for m in MUTANTS if m.why_not}


def program(folder: Path, *lines: str) -> Path:
    """Return a program in the place of the kernel checks."""
    path = folder / "checks"
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("line", "expected"), [("exit 0", "passed"), ("exit 1", "failed"), ("kill -SEGV $$", "failed")]
)
def test_a_wrong_result_and_a_crash_fail(line, expected, tmp_path):
    assert cuda_mutants.outcome(program(tmp_path, line), ("a check",)) == expected


def test_a_run_that_does_not_end_is_a_timeout_and_not_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_mutants, "SECONDS", 0.2)
    assert cuda_mutants.outcome(program(tmp_path, "exec sleep 20"), ("a check",)) == "timeout"


def with_outcomes(monkeypatch, *results: str) -> None:
    """Let the three that look at a source have these outcomes."""
    whats = ("checks", "races", "machine code")
    monkeypatch.setattr(cuda_mutants, "outcomes", lambda *arguments: zip(whats, results, strict=True))


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        (("failed", "failed", "passed"), "checks"),
        (("timeout", "failed", "passed"), "races"),
        (("timeout", "passed", "passed"), "timeout"),
        (("passed", "timeout", "failed"), "machine code"),
        (("passed", "passed", "passed"), "nothing"),
    ],
)
def test_a_timeout_does_not_count_as_caught(results, expected, monkeypatch):
    with_outcomes(monkeypatch, *results)
    assert cuda_mutants.caught_by(MUTANTS[0]) == expected
    assert cuda_mutants.uncaught(MUTANTS[0], expected) is (expected in ("timeout", "nothing"))


@pytest.mark.parametrize("result", ["failed", "timeout"])
def test_no_mutant_is_tried_if_a_check_does_not_pass_without_a_fault(result, monkeypatch, capsys):
    with_outcomes(monkeypatch, "passed", result, "passed")
    monkeypatch.setattr(cuda_mutants.cuda_tools, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_mutants.cuda_tools, "find_cuobjdump", lambda: ("cuobjdump", {}))
    monkeypatch.setattr(cuda_mutants, "caught_by", lambda mutant: pytest.fail("tried"))
    monkeypatch.setattr("sys.argv", ["cuda_mutants.py", "--only", "gated_act"])
    assert cuda_mutants.main() == 1
    assert f"FAILED: without a fault: races of gated_act.cu (gated_act): {result}" in capsys.readouterr().out
