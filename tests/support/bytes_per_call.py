"""Print the bytes of malloc that each public entry keeps a call: ``python bytes_per_call.py CALLS``.

The calls come in five rounds, and the round that kept the fewest counts: a leak shows in every round, a table that
grows does not. Preload count_allocations.cpp, named by COUNT_ALLOCATIONS, and set PYTHONMALLOC=malloc, so that Python's
objects are counted.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import sys
from collections.abc import Callable

import torch
from public_entries import public_entries

ROUNDS = 5
PLANTED = "planted leak"


_LIBRARY = ctypes.CDLL(os.environ["COUNT_ALLOCATIONS"])
_LIBRARY.bytes_in_use.restype = ctypes.c_int64


def bytes_in_use() -> int:
    """Return the bytes that malloc has handed out in this process.

    Not those of Python's cache of type attributes: it keeps names that were made for a look-up, until it is full.
    """
    gc.collect()
    sys._clear_type_cache()
    return int(_LIBRARY.bytes_in_use())


def planted() -> Callable[[], None]:
    """Return a call that keeps 48 bytes every fourth time."""
    malloc = ctypes.CDLL(None).malloc
    number = itertools.count()

    def call() -> None:
        if next(number) % 4 == 0:
            malloc(48)

    return call


@torch.no_grad()
def main() -> None:
    """Measure and print one JSON object: entry -> bytes a call."""
    torch.set_num_threads(1)
    calls, kept = int(sys.argv[1]) // ROUNDS, {}
    entries = {**public_entries(), PLANTED: planted()}
    gc.freeze()  # so that a collection only looks at what the calls made
    for name, call in entries.items():
        for _ in range(calls):
            call()
        grown = []
        for _ in range(ROUNDS):
            before = bytes_in_use()
            for _ in range(calls):
                call()
            grown.append((bytes_in_use() - before) / calls)
        kept[name] = round(max(0.0, min(grown)), 2)
    print(json.dumps(kept))


if __name__ == "__main__":
    main()
