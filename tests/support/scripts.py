"""Run scripts of tests/support in a process of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent


def build_library(source: str, folder: Path) -> str:
    """Compile a C++ file of tests/support to a library to preload, and return its path."""
    compiler = shutil.which("c++")
    assert compiler, "expected a C++ compiler, as for the build"
    library = folder / f"lib{Path(source).stem}.so"
    subprocess.run(
        [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", "-o", library, SUPPORT / source, "-ldl"], check=True
    )
    return str(library)


def start_support(script: str, *arguments: str, timeout: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of tests/support on one thread, to its end, whatever that is."""
    paths = os.pathsep.join([str(SUPPORT), *sys.path])
    return subprocess.run(
        [sys.executable, str(SUPPORT / script), *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_support(script: str, *arguments: str, **environment: str) -> str:
    """Run a script of tests/support, which must succeed, and return what it prints."""
    done = start_support(script, *arguments, timeout=900, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
