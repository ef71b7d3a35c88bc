"""Print the bytes of malloc that each public entry keeps a call: ``python bytes_per_call.py CALLS``.

The calls come in five rounds, and the round that kept the fewest counts: a leak shows in every round, a table that
grows does not. Set PYTHONMALLOC=malloc, so that Python's objects are counted, and
GLIBC_TUNABLES=glibc.malloc.tcache_count=0, so that blocks which a thread keeps for its next calls are not.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys

import torch
from public_entries import public_entries

ROUNDS = 5


class _MallocInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


_LIBC = ctypes.CDLL(None)
_LIBC.mallinfo2.restype = _MallocInfo


def bytes_in_use() -> int:
    """Return the bytes that malloc has handed out in this process, large blocks included."""
    gc.collect()
    info = _LIBC.mallinfo2()
    return int(info.uordblks + info.hblkhd)


@torch.no_grad()
def main() -> None:
    """Measure and print one JSON object: entry -> bytes a call."""
    torch.set_num_threads(1)
    calls, kept = int(sys.argv[1]) // ROUNDS, {}
    for name, call in public_entries().items():
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
