"""Clocks, interleaved repeats, and what is said about samples."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

MIN_REPEATS = 7  # fewer make a figure that is printed with a warning
FEWEST_REPEATS = 3  # not even a spent time budget goes below


@dataclass
class Timed:
    """Something that is timed in turn with others.

    Attributes:
        name: what the table calls it.
        call: runs it once; what it returns is dropped after the clock has stopped.
        samples: seconds, one a round.
        failed: why it has no figure; None if it has.
    """

    name: str
    call: Callable[[], Any] | None = None
    samples: list[float] = field(default_factory=list)
    failed: str | None = None

    def run(self) -> Any:
        """Runs it once.

        Raises:
            RuntimeError: there is nothing to run.
        """
        if self.call is None:
            raise RuntimeError(f"{self.name}: expected something to run, got none")
        return self.call()

    def warm_up(self) -> None:
        """Runs it once untimed, unless it failed."""
        if self.failed is None:
            self.attempt(self.run)

    def attempt(self, step: Callable[[], Any]) -> Any:
        """``step()``, or None with ``failed`` set when it raises."""
        try:
            return step()
        except Exception as error:  # whatever an arm raises is its result
            self.failed = error_line(error)
            return None


@dataclass(frozen=True)
class Summary:
    """Samples in five numbers, in seconds."""

    repeats: int
    median: float
    q1: float
    q3: float
    minimum: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        if len(samples) == 1:
            return cls(1, samples[0], samples[0], samples[0], samples[0])
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(len(samples), median, q1, q3, min(samples))


class Clock(Protocol):
    """Seconds that one call takes."""

    def time(self, call: Callable[[], Any]) -> float: ...


class WallClock:
    """Host time from an idle device to an idle device: what a user waits for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def time(self, call: Callable[[], Any]) -> float:
        synchronize(self._device)
        start = time.perf_counter()
        result = call()
        synchronize(self._device)
        elapsed = time.perf_counter() - start
        del result
        return elapsed


class KernelClock:
    """Time of one call on cold caches: before it, a buffer larger than the last-level cache is read.

    Not written: what lay in the cache would be written back within the time of a call that moves less than it holds.

    On CUDA between two events on the current stream, of a graph of the call (``captured``): what the GPU needs, without
    the host, whose work overlaps with the flush. Else on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Ones: pages of zeros may all be one page.
        self._flush = torch.ones((256 if device.type == "cuda" else 96) * 2**18, dtype=torch.int32, device=device)

    def time(self, call: Callable[[], Any]) -> float:
        self._flush.amax()
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = call()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end) / 1e3
        else:
            start = time.perf_counter()
            result = call()
            elapsed = time.perf_counter() - start
        del result
        return elapsed


class Replay:
    """Replays a CUDA graph of ``call``, which was called before; what it made stays as long as this does.

    Raises:
        RuntimeError: a call that cannot be captured.
    """

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # libraries make what they keep for each stream
            call()
        torch.cuda.synchronize(device)
        self._call = call
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = call()

    def __call__(self) -> None:
        self._graph.replay()


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """On CUDA the replay of a graph of the call, else the call itself."""
    return Replay(call, device) if device.type == "cuda" else call


def tuned(call: Callable[[], Any], options: Mapping[str, int]) -> Callable[[], Any]:
    """The call under options of a backend (``torch.ops.pop.tune``), which are put back after it."""
    if not options:
        return call

    def run() -> Any:
        before = {name: torch.ops.pop.tune(name, value) for name, value in options.items()}
        try:
            return call()
        finally:
            for name, value in before.items():
                torch.ops.pop.tune(name, value)

    return run


def synchronize(device: torch.device) -> None:
    """Waits for the device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    timed: Sequence[Timed],
    clock: Clock,
    repeats: int,
    deadline: float | None = None,
    fewest: int = FEWEST_REPEATS,
    step: Callable[[Timed], None] | None = None,
) -> int:
    """Times every item once a round, so that drift of the machine meets all of them alike.

    The order rotates by one each round and every second round is reversed: no item always follows the same other.
    An item that raises is marked as failed and left out from then on.

    Args:
        timed: items; those already failed are skipped.
        clock: how a call is timed.
        repeats: rounds.
        deadline: ``time.monotonic()`` after which no further round starts. None: none.
        fewest: rounds that run whatever the deadline.
        step: called after each sample.

    Returns:
        Rounds that ran.
    """
    longest = 0.0
    for done in range(repeats):
        start = time.monotonic()
        if deadline is not None and done >= fewest and start + longest > deadline:
            return done
        turn = done % max(1, len(timed))
        order = [*timed[turn:], *timed[:turn]]
        for item in order if done % 2 == 0 else reversed(order):
            if item.failed is None:
                item.attempt(partial(_sample, item, clock))
            if step is not None:
                step(item)
        longest = max(longest, time.monotonic() - start)
    return repeats


def _sample(item: Timed, clock: Clock) -> None:
    item.samples.append(clock.time(item.run))


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of ``numerator[i] / denominator[i]``: a slow phase of the machine cancels out."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def error_line(error: BaseException) -> str:
    """An exception as one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]
