"""The instruction sets that CPU kernels are compiled for; run a test file again on the lower ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pop_ext  # noqa: F401  (registers torch.ops.pop)
import torch

ISAS = ["baseline", "avx2", "avx512_bf16", "amx"]
"""From the lowest to the highest."""
INT8_ISAS = ["baseline", "avx2", "avx_vnni", "avx512_vnni", "amx"]
"""The same of products of 8-bit integers."""


def lesser() -> list[str]:
    """Return the sets below that of this process."""
    return ISAS[: ISAS.index(torch.ops.pop.cpu_isa())]


def lesser_int8() -> list[str]:
    """Return the sets of int8 below that of this process that it can run."""
    below = INT8_ISAS[: INT8_ISAS.index(torch.ops.pop.int8_isa())]
    return [isa for isa in below if isa != "avx_vnni" or _runs("avx_vnni")]


def _runs(isa: str) -> bool:
    """Return whether POP_CPU_ISA may name this set here: a processor with AVX-512 VNNI may lack AVX-VNNI."""
    script = "import pop_ext, torch; torch.ops.pop.int8_isa()"
    environment = {**os.environ, "POP_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True).returncode == 0


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
    int8 = [*lesser_int8(), torch.ops.pop.int8_isa()]
    untested += [f"{isa} of int8" for isa in INT8_ISAS if isa not in int8]
    tested = f"{', '.join([*lesser(), best])}; of int8: {', '.join(int8)}"
    return f"instruction sets: {tested}; not run here: {', '.join(untested) or 'none'}"


def assert_lesser_sets_pass(selection: str, *tests: str) -> None:
    """Run the tests `selection` (pytest's -k) of files or node ids in a new process on each lower set."""
    _assert_pass(lesser(), selection, *tests)


def assert_lesser_int8_sets_pass(selection: str, *tests: str) -> None:
    """The same on each lower set of int8."""
    _assert_pass(lesser_int8(), selection, *tests)


def _assert_pass(isas: list[str], selection: str, *tests: str) -> None:
    for isa in isas:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection, *tests]
        done = subprocess.run(command, env={**os.environ, "POP_CPU_ISA": isa}, capture_output=True, text=True)
        assert done.returncode == 0, isa + "\n" + done.stdout[-4000:] + done.stderr[-4000:]
