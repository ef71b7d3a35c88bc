"""Compute a product in blocks several times under each of several numbers of threads; print how many results differ.

Each number keeps the threads of the one before: ``python changing_threads.py DTYPE 2 4 8``.
"""

from __future__ import annotations

import sys

import pop_ext  # noqa: F401  (registers torch.ops.pop)
import torch

torch.manual_seed(0)
torch.ops.pop.tune("gemm_blocks", 1)
dtype = getattr(torch, sys.argv[1])
x, weight = torch.randn(300, 2048).to(dtype), torch.randn(510, 2048).to(dtype)
for threads in map(int, sys.argv[2:]):
    torch.set_num_threads(threads)
    results = [torch.ops.pop.linear(x, weight) for _ in range(12)]
    print(threads, sum(not torch.equal(result, results[0]) for result in results))
