"""Run jobs in concurrent threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch


def run_threads(*jobs: Callable[[], Any]) -> list[Any]:
    """Start the jobs together, each in a thread, and return their results; raise the first error of a job."""
    barrier = threading.Barrier(len(jobs))
    results: list[Any] = [None] * len(jobs)

    def run(index: int) -> None:
        torch.set_num_threads(1)
        barrier.wait()
        try:
            results[index] = jobs[index]()
        except BaseException as error:
            results[index] = error

    workers = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # switch threads often, so that every interleaving is likely
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
