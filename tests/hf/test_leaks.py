"""No public entry keeps memory: the bytes of malloc, counted over calls in a process of their own."""

from __future__ import annotations

import json
import sys

import pytest

from scripts import build_library, run_support


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library over glibc's malloc")
def test_no_public_entry_keeps_memory(tmp_path):
    library = build_library("count_allocations.cpp", tmp_path)
    printed = run_support(
        "bytes_per_call.py", "50", PYTHONMALLOC="malloc", LD_PRELOAD=library, COUNT_ALLOCATIONS=library
    )
    kept = json.loads(printed.splitlines()[-1])
    assert len(kept) > 25
    assert {name: value for name, value in kept.items() if value >= 16} == {}  # the smallest block of a leak
