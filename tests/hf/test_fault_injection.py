"""Each allocation of every public entry fails in turn: an error, no crash, and nothing has changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from scripts import SUPPORT, run_support


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
def test_every_allocation_may_fail(tmp_path):
    compiler = shutil.which("c++")
    assert compiler, "a C++ compiler, as for the build"
    library = tmp_path / "libfail_allocations.so"
    source = SUPPORT / "fail_allocations.cpp"
    subprocess.run([compiler, "-O1", "-std=c++20", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    printed = run_support("failing_allocations.py", LD_PRELOAD=str(library), FAIL_ALLOCATIONS=str(library))
    lines = printed.splitlines()
    assert [line for line in lines if line.startswith("FAULT")] == []
    entries = [json.loads(line) for line in lines]
    assert {entry["kind"] for entry in entries} == {"new", "tensor", "new of operators"}
    assert sum(entry["raised"] for entry in entries) > 1500
