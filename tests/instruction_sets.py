"""The instruction sets that CPU kernels are compiled for, and a test file run again on a lesser one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

ISAS = ["baseline", "avx2", "avx512_bf16"]
"""From the least to the best."""


def assert_passes_on(isa: str, path: str, selection: str) -> None:
    """The tests `selection` (pytest's -k) of a file, in a process on that set; skips where this one has no better."""
    if ISAS.index(isa) >= ISAS.index(torch.ops.pop.cpu_isa()):
        pytest.skip(f"this process runs on no more than {isa}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection, path]
    done = subprocess.run(command, env={**os.environ, "POP_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
