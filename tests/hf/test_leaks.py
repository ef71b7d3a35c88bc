"""No public entry keeps memory: the bytes of malloc, counted over calls in a process of their own."""

from __future__ import annotations

import json
import sys

import pytest

from scripts import run_support


@pytest.mark.skipif(sys.platform != "linux", reason="counts with glibc's mallinfo2")
def test_no_public_entry_keeps_memory():
    printed = run_support(
        "bytes_per_call.py", "200", PYTHONMALLOC="malloc", GLIBC_TUNABLES="glibc.malloc.tcache_count=0"
    )
    # A string that an operator returned would cost 48 bytes a call. Tensors fragment the heap by less.
    kept = json.loads(printed.splitlines()[-1])
    assert len(kept) > 25
    assert {name: value for name, value in kept.items() if value >= 24} == {}
