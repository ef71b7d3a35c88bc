"""Each allocation of every public entry fails in turn: an error, no crash, and nothing has changed."""

from __future__ import annotations

import json
import sys

import pytest

from scripts import build_library, run_support


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
def test_every_allocation_may_fail(tmp_path):
    library = build_library("fail_allocations.cpp", tmp_path)
    lines = run_support("failing_allocations.py", LD_PRELOAD=library, FAIL_ALLOCATIONS=library).splitlines()
    assert [line for line in lines if line.startswith("FAULT")] == []
    entries = [json.loads(line) for line in lines]
    assert {entry["kind"] for entry in entries} == {"new", "tensor", "new of operators"}
    assert sum(entry["raised"] for entry in entries) > 3000
    assert len({entry["entry"] for entry in entries}) >= 30
