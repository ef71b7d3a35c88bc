"""Test prefills in a forked child: an error where they would hang, and results where they would not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

SCRIPT = Path(__file__).parents[1] / "support" / "forked.py"
RUNS = ("native.prefill", "an enabled model", "load")
OPERATORS = ("prefill", "load", "fold_kv", "linear", "rms_norm", "add_rms_norm", "gated_act", "quantize_rows")
OTHERS = (
    *("reference.prefill", "importance", "fit", "explain"),
    *("portable forward", "portable score", "portable explain", "portable enable"),
)


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    run = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    return dict(line.split(": ", 1) for line in run.stdout.splitlines())


@pytest.mark.parametrize("run", RUNS)
def test_a_child_of_a_parent_with_threads_raises_instead_of_waiting_forever(printed, run):
    text = printed[f"2 2 {run}"]
    assert text.startswith("RuntimeError: pop_ext: a prefill on several threads would hang in this process")
    assert 'get_context("spawn")' in text
    assert "torch.set_num_threads(1)" in text


@pytest.mark.parametrize("run", RUNS)
def test_a_child_with_one_thread_prefills(printed, run):
    assert printed[f"2 1 {run}"] == printed["expected"]


@pytest.mark.parametrize("run", RUNS)
def test_a_child_of_a_parent_with_one_thread_prefills_on_several(printed, run):
    assert printed[f"1 2 {run}"] == printed["expected"]


@pytest.mark.parametrize("name", [*(f"pop.{name}" for name in OPERATORS), *OTHERS])
def test_operators_and_other_entries_raise_in_a_child_with_several_threads_alone(printed, name):
    assert printed[f"2 2 {name}"].startswith("RuntimeError: pop")
    assert "would hang" in printed[f"2 2 {name}"]
    assert "torch.set_num_threads(1)" in printed[f"2 2 {name}"]
    assert printed[f"2 1 {name}"] == "done"
