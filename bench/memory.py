"""Measure the peak memory of one call, above the memory that was resident before it."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pop_ext.hf.compat import cache_of

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): this value resets VmHWM to the current VmRSS


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one call, in bytes.

    Attributes:
        peak_extra: peak above the level before the call, K/V cache included.
        kv_cache: the part of ``peak_extra`` that the returned K/V cache holds.
        method: "kernel peak" (VmHWM), "sampled" (VmRSS every millisecond) or "allocator" (CUDA).
    """

    peak_extra: int
    kv_cache: int
    method: str

    @property
    def working(self) -> int:
        """Peak without the K/V cache."""
        return max(0, self.peak_extra - self.kv_cache)


def measure_memory(call: Callable[[], Any], device: torch.device) -> MemoryUse | None:
    """Call ``call`` once and measure it; return None if the system does not report memory.

    Memory that a library keeps from earlier calls counts as resident before this one.
    """
    release_memory(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        output = call()
        torch.cuda.synchronize(device)
        return MemoryUse(torch.cuda.max_memory_allocated(device) - before, kv_cache_bytes(output), "allocator")
    if not _STATUS.exists():
        call()
        return None
    before = resident_bytes()
    if _reset_peak(before):
        output = call()
        return MemoryUse(resident_bytes("VmHWM") - before, kv_cache_bytes(output), "kernel peak")
    with _sampled() as samples:
        output = call()
    return MemoryUse(max(samples) - before, kv_cache_bytes(output), "sampled")


def kv_cache_bytes(output: Any) -> int:
    """Return the bytes of the K/V cache in a prefill's output."""
    layers = getattr(cache_of(output), "layers", None) or []
    return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None)


def release_memory(device: torch.device) -> None:
    """Return unused memory to the system, so that a call cannot reuse it unnoticed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes(device: torch.device) -> int | None:
    """Return the bytes that a new model may use; None if the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def resident_bytes(field: str = "VmRSS") -> int:
    """Return VmRSS or VmHWM of this process in bytes; 0 if the system does not report it."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _reset_peak(resident: int) -> bool:
    """Reset VmHWM to the current level; return whether that worked."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return 0 < resident_bytes("VmHWM") <= resident + 2**22


@contextmanager
def _sampled() -> Iterator[list[int]]:
    """Sample VmRSS every millisecond within the block."""
    samples = [resident_bytes()]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            samples.append(resident_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
        samples.append(resident_bytes())
