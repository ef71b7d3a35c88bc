"""No public entry keeps memory: the bytes of malloc, counted over calls in a process of their own."""

from __future__ import annotations

import json
import random
import sys

import pytest
from growth import Sample, fault_of

from scripts import build_library, run_support

LIMIT = 4
"""Bytes a call."""


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library over glibc's malloc")
def test_no_public_entry_keeps_memory(tmp_path):
    library = build_library("count_allocations.cpp", tmp_path)
    printed = run_support(
        "bytes_per_call.py", "50", PYTHONMALLOC="malloc", LD_PRELOAD=library, COUNT_ALLOCATIONS=library
    )
    kept = json.loads(printed.splitlines()[-1])
    assert len(kept) > 40
    assert kept.pop("planted leak") >= 2 * LIMIT  # 48 bytes, the smallest block of a leak, every fourth call
    assert {name: value for name, value in kept.items() if value >= LIMIT} == {}


@pytest.mark.parametrize("minutes", [1, 2, 60])
def test_a_soak_of_any_length_finds_a_leak_of_48_bytes_a_request_and_none_without(minutes):
    noise = random.Random(0)

    def samples(leak: int) -> list[Sample]:
        """Return memory that changes between two states, and takes 50 kB more once."""
        requests = [round(23 * minutes * i) for i in range(100)]
        found = []
        for i, n in enumerate(requests):
            other = noise.choice([0, 0, 42_500]) + noise.randint(0, 900) + 50_000 * (i > 40)
            found.append(Sample(n, 10**6 + leak * n + other, 10**8))
        return found

    assert fault_of(samples(0)) is None
    assert "a request: expected at most 24" in str(fault_of(samples(48)))
    grown = [sample._replace(resident=10**8 + 10**7 * (i > 60)) for i, sample in enumerate(samples(0))]
    assert "resident" in str(fault_of(grown))
    steps = [sample._replace(in_use=sample.in_use + 2 * 10**5 * (i // 20)) for i, sample in enumerate(samples(0))]
    assert "bytes in use: expected" in str(fault_of(steps))
