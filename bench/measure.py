"""Clocks, interleaved rounds, and statistics of samples."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

MIN_REPEATS = 7  # with fewer, results are printed with a warning
FEWEST_REPEATS = 3  # run even if the time budget is spent


@dataclass
class Timed:
    """A call that is timed in turn with others.

    Attributes:
        name: its name in tables.
        call: the call; its result is freed after the clock has stopped.
        samples: seconds, one a round.
        failed: the reason why it has no samples; None if it did not fail.
    """

    name: str
    call: Callable[[], Any] | None = None
    samples: list[float] = field(default_factory=list)
    failed: str | None = None

    def run(self) -> Any:
        """Call it once.

        Raises:
            RuntimeError: ``call`` is not set.
        """
        if self.call is None:
            raise RuntimeError(f"{self.name}: expected something to run, got none")
        return self.call()

    def warm_up(self) -> None:
        """Call it once untimed, unless it failed."""
        if self.failed is None:
            self.attempt(self.run)

    def attempt(self, step: Callable[[], Any]) -> Any:
        """Return ``step()``. If it raises, set ``failed`` and return None."""
        try:
            return step()
        except Exception as error:  # an arm may raise anything; the others go on
            self.failed = error_line(error)
            return None


@dataclass(frozen=True)
class Summary:
    """Five numbers that summarise samples, in seconds."""

    repeats: int
    median: float
    q1: float
    q3: float
    minimum: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Summarise samples in seconds."""
        if len(samples) == 1:
            return cls(1, samples[0], samples[0], samples[0], samples[0])
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(len(samples), median, q1, q3, min(samples))


class Clock(Protocol):
    """Measures the seconds that one call takes."""

    def time(self, call: Callable[[], Any]) -> float: ...


class WallClock:
    """Host time of a call from an idle device to an idle device, as a user waits for it."""

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
    """Time of one call on cold caches: a buffer larger than the last-level cache is read before it.

    The buffer is not written: the cache would write it back during a call that moves less than the cache holds.

    On CUDA the time is that between two events on the current stream, and the call a graph (`captured`). It is the
    GPU's time alone: the host's work overlaps with the flush. Otherwise it is host time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Not zeros: the system may map all pages of zeros to one page.
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
    """A CUDA graph of ``call``, replayed when called. It keeps the memory of the call's result.

    Args:
        call: must have been called before.
        device: a CUDA device.

    Raises:
        RuntimeError: the call cannot be captured.
    """

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # libraries allocate their workspaces for each stream
            call()
        torch.cuda.synchronize(device)
        self._call = call
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = call()

    def __call__(self) -> None:
        self._graph.replay()


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Return the replay of a graph of the call on CUDA, else the call itself."""
    return Replay(call, device) if device.type == "cuda" else call


def tuned(call: Callable[[], Any], options: Mapping[str, int]) -> Callable[[], Any]:
    """Return the call under backend options of its thread (``torch.ops.pop.tune``), which are restored after it."""
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
    """Wait for the device; no-op on a CPU."""
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
    """Time every item once a round, so that a drift of the machine affects all of them alike.

    The order rotates by one each round, and every second round is reversed, so that no item always follows the same
    other one. An item that raises is marked as failed and skipped from then on.

    Args:
        timed: items; those that failed before are skipped.
        clock: measures a call.
        repeats: number of rounds.
        deadline: value of ``time.monotonic()`` after which no further round starts. None: no deadline.
        fewest: rounds that run regardless of the deadline.
        step: called after each sample.

    Returns:
        The number of rounds that ran.
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
    """Return the median of ``numerator[i] / denominator[i]`` over rounds: slow phases of the machine cancel out."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def error_line(error: BaseException) -> str:
    """Return an exception as one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]
