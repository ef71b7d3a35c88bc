"""Peak memory of one call, above what was resident before it."""

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
_RESET_PEAK = "5"  # proc(5): resets VmHWM to the current VmRSS


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one call.

    Attributes:
        peak_extra: most that was resident above the level before the call, K/V cache included.
        kv_cache: of ``peak_extra``, what the returned cache holds.
        method: "kernel peak" (VmHWM), "sampled" (VmRSS every millisecond) or "allocator" (CUDA).
    """

    peak_extra: int
    kv_cache: int
    method: str

    @property
    def working(self) -> int:
        """``peak_extra`` without the K/V cache."""
        return max(0, self.peak_extra - self.kv_cache)


def measure_memory(call: Callable[[], Any], device: torch.device) -> MemoryUse | None:
    """Runs ``call`` once; None where the system does not tell what it took.

    Memory that a library has kept from earlier calls counts as resident before this one.
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
    before = _resident("VmRSS")
    if _reset_peak(before):
        output = call()
        return MemoryUse(_resident("VmHWM") - before, kv_cache_bytes(output), "kernel peak")
    with _sampled() as samples:
        output = call()
    return MemoryUse(max(samples) - before, kv_cache_bytes(output), "sampled")


def kv_cache_bytes(output: Any) -> int:
    """Bytes of the K/V cache in what a prefill returned."""
    layers = getattr(cache_of(output), "layers", None) or []
    return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None)


def release_memory(device: torch.device) -> None:
    """Gives memory that nobody uses back to the system, so that it does not hide what a call needs."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes(device: torch.device) -> int | None:
    """Memory that a new model may take; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _reset_peak(resident: int) -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return 0 < _resident("VmHWM") <= resident + 2**22


@contextmanager
def _sampled() -> Iterator[list[int]]:
    samples = [_resident("VmRSS")]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            samples.append(_resident("VmRSS"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
        samples.append(_resident("VmRSS"))
