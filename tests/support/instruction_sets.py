"""The instruction sets that CPU kernels are compiled for; run a test file again on the lower ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pop_ext  # noqa: F401  (registers torch.ops.pop)
import torch

ISAS = ["baseline", "avx2", "avx512_bf16"]
"""From the lowest to the highest."""


def lesser() -> list[str]:
    """Return the sets below that of this process."""
    return ISAS[: ISAS.index(torch.ops.pop.cpu_isa())]


def has_avx512_bf16() -> bool:
    """Return whether the processor has AVX-512 BF16, regardless of POP_CPU_ISA and of emulation."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def report() -> str:
    """Return a line with the sets that this run tests, and those that the processor or POP_CPU_ISA excludes."""
    best = torch.ops.pop.cpu_isa()
    untested = ISAS[ISAS.index(best) + 1 :] + ([] if has_avx512_bf16() else ["prepacked weights"])
    return f"instruction sets: {', '.join([*lesser(), best])}; not run here: {', '.join(untested) or 'none'}"


def assert_lesser_sets_pass(selection: str, *tests: str) -> None:
    """Run the tests `selection` (pytest's -k) of files or node ids in a new process on each lower set."""
    for isa in lesser():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection, *tests]
        done = subprocess.run(command, env={**os.environ, "POP_CPU_ISA": isa}, capture_output=True, text=True)
        assert done.returncode == 0, isa + "\n" + done.stdout[-4000:] + done.stderr[-4000:]
