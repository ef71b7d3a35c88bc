"""The instruction sets that CPU kernels are compiled for, and a test file run again on the lesser ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pop_ext  # noqa: F401  (registers torch.ops.pop)
import torch

ISAS = ["baseline", "avx2", "avx512_bf16"]
"""From the least to the best."""


def lesser() -> list[str]:
    """Those below the one of this process."""
    return ISAS[: ISAS.index(torch.ops.pop.cpu_isa())]


def has_avx512_bf16() -> bool:
    """Of the processor, whatever POP_CPU_ISA says or emulates."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def report() -> str:
    """Which sets this run tests, and which the processor, or POP_CPU_ISA, keeps it from."""
    best = torch.ops.pop.cpu_isa()
    untested = ISAS[ISAS.index(best) + 1 :] + ([] if has_avx512_bf16() else ["prepacked weights"])
    return f"instruction sets: {', '.join([*lesser(), best])}; not run here: {', '.join(untested) or 'none'}"


def assert_lesser_sets_pass(selection: str, *tests: str) -> None:
    """The tests `selection` (pytest's -k) among files or node ids, in a process on each set below this one's."""
    for isa in lesser():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection, *tests]
        done = subprocess.run(command, env={**os.environ, "POP_CPU_ISA": isa}, capture_output=True, text=True)
        assert done.returncode == 0, isa + "\n" + done.stdout[-4000:] + done.stderr[-4000:]
