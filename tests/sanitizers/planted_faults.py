"""Show that sanitizers catch a fault of each kind (planted_faults.cpp). Run by make asan and make tsan."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pop_ext
import pytest
import torch

BUILD = Path(pop_ext.__file__).parents[2].name
ISAS = ["amx", "avx512_bf16", "avx2", "baseline"]
RACE = """
from threads import run_threads
run_threads(*[lambda: torch.ops.pop.planted_race(5_000_000)] * 2)
"""

RACE_OF_WORKERS = """
torch.set_num_threads(2)
torch.ops.pop.planted_race_of_workers(5_000_000)
"""
NO_FAULT = """
torch.set_num_threads(2)
for times in range(100):
    assert torch.ops.pop.planted_no_race(times) == 3 * times
torch.ops.pop.planted_overflow(0)
torch.ops.pop.planted_race(1000)
"""

asan = pytest.mark.skipif(BUILD != "asan", reason="needs make asan")
tsan = pytest.mark.skipif(BUILD != "tsan", reason="needs make tsan")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process with the sanitizer's environment of this one."""
    support = Path(__file__).parents[1] / "support"
    paths = os.pathsep.join([os.environ["PYTHONPATH"], str(support)])
    return subprocess.run(
        [sys.executable, "-c", f"import pop_ext, torch\n{code}\nprint('went on')"],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )


def assert_reported(code: str, *texts: str, **environment: str) -> None:
    """Check that the process ends with a failure, and prints every text on standard error."""
    done = run(code, **environment)
    assert done.returncode != 0, done.stdout + done.stderr[-4000:]
    for text in texts:
        assert text in done.stderr, done.stderr[-8000:]


@asan
@pytest.mark.parametrize("elements", [1, 7, 64, 1001])
def test_a_read_beyond_a_tensor_is_reported(elements):
    code = f"torch.ops.pop.planted_over_read(torch.ones({elements}))"
    assert_reported(code, "heap-buffer-overflow", "planted_over_read")


@asan
@pytest.mark.parametrize("isa", ISAS)
def test_a_read_beyond_a_row_is_reported_in_the_kernels_of_each_instruction_set(isa):
    code = "torch.ops.pop.planted_kernel_over_read(torch.ones(96))"
    assert_reported(code, "heap-buffer-overflow", f"pop::cpu::{isa}", POP_CPU_ISA=isa)


@asan
def test_an_overflow_of_an_integer_is_reported():
    assert_reported("torch.ops.pop.planted_overflow(1)", "signed integer overflow", "planted_overflow")


@tsan
@pytest.mark.parametrize("code", [RACE, RACE_OF_WORKERS], ids=["callers", "workers"])
def test_a_race_of_two_threads_is_reported(code):
    assert_reported(code, "ThreadSanitizer: data race", "planted_race")


def test_the_same_operators_are_silent_where_there_is_no_fault():
    done = run(NO_FAULT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "went on" in done.stdout
    assert "Sanitizer" not in done.stderr


def test_the_plants_are_in_no_ordinary_build():
    assert hasattr(torch.ops.pop, "planted_race") == (BUILD in ("asan", "tsan"))
