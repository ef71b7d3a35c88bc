"""Notice a process that was forked from one with running OpenMP threads: its next parallel loop would wait forever.

``fork`` copies the thread that calls it and no other. The OpenMP runtime of the child still counts on the threads of
its parent, and the stock forward hangs there as a native prefill does. Nothing can be detected of a parent that has run
only torch's own operators on several threads.
"""

from __future__ import annotations

import os

import torch

_has_threads = False  # whether this process has run native work on several threads
_lost_threads = False  # whether it was forked from a process that had


def _note_fork() -> None:
    global _lost_threads
    _lost_threads |= _has_threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def check_threads() -> None:
    """Check that native work on the CPU may use as many threads as torch is set to. Call it before such work.

    Raises:
        RuntimeError: The process was forked from one that had run native work on several threads, and torch may still
            use more than one.
    """
    global _has_threads
    if torch.get_num_threads() == 1:
        return
    if _lost_threads:
        raise RuntimeError(
            "pop_ext: a prefill on several threads would hang in this process, which was forked after its parent had "
            "run one (as the stock forward would): start processes by spawn "
            '(multiprocessing.get_context("spawn")), or call torch.set_num_threads(1) in the child first'
        )
    _has_threads = True
