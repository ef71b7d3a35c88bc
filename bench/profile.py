"""Where the time of a native prefill goes, stage by stage: ``python bench/run.py --profile``.

``pop::prefill`` opens a profiler range for each stage of each layer; the head and the whole call get theirs here.
torch.profiler gives their times: on a CPU those of the ranges, on CUDA those of the kernels that were launched inside,
where the profiler slows the host down, so that the whole call is one timed without it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import torch
from pop_ext import _core
from pop_ext.native import NativeModel, load
from pop_ext.plan import Plan
from torch.profiler import ProfilerActivity, profile, record_function

from bench.arms import NATIVE_FULL, plan_name, sequence_shapes
from bench.host_times import HostTimes, host_times
from bench.measure import WallClock, interleave, synchronize
from bench.rates import measure_bandwidth, peak_rate, reference_gemms
from bench.report import table

LAYER_STAGES = ("qkv", "rope_cache_write", "attention", "o_proj", "mlp")
"""What each layer does, in this order."""
HEAD = "lm_head"
CALL = "call"
"""The range around a whole call."""
ONCE_STAGES = ("build_row_tables", "embed", "kv_project", "final_norm", HEAD)
STAGES = ("build_row_tables", "embed", *LAYER_STAGES, "kv_project", "boundary", "final_norm", HEAD)
REST = "rest"
"""Outside of the stages: checks, cache, on CUDA also the time that no kernel of a stage runs."""


@dataclass(frozen=True)
class Stage:
    """A stage, over all layers that have it.

    Attributes:
        seconds: median over the profiled calls.
        flops, bytes: by the cost model, where it knows none by ``moved_bytes``; None where neither does.
    """

    name: str
    seconds: float
    flops: float | None = None
    bytes: float | None = None


@dataclass
class StageProfile:
    """One call, taken apart.

    Attributes:
        name: of the arm.
        seconds: of the whole call; median.
        stages: in the order of a call; what is left of ``seconds`` is the last one, ``REST``.
        peak: FLOP/s that matrix products reach in this run; None: unknown.
        bandwidth: bytes per second that memory reaches in this run; None: unknown.
        host: what the host does in a call of the enabled model.
    """

    name: str
    batch: int
    tokens: int
    plan: Plan
    seconds: float
    stages: list[Stage] = field(default_factory=list)
    peak: float | None = None
    bandwidth: float | None = None
    host: HostTimes | None = None

    def share_of_peak(self, stage: Stage) -> float | None:
        """Of what bounds it: of both limits the one that would take longer."""
        if stage.seconds <= 0 or not self.peak or not self.bandwidth or not (stage.flops or stage.bytes):
            return None
        return max((stage.flops or 0.0) / self.peak, (stage.bytes or 0.0) / self.bandwidth) / stage.seconds


class _Probe:
    """Calls of one prefill that are taken apart.

    Attributes:
        calls: seconds of each call.
        stages: stage -> seconds, of each call.
    """

    def __init__(self, native: NativeModel, input_ids: torch.Tensor) -> None:
        self.native = native
        self.calls: list[float] = []
        self.stages: list[dict[str, float]] = []
        self._input_ids = input_ids
        self._clock = WallClock(native.device)

    def run(self) -> Any:
        return self.native.prefill(self._input_ids)

    def warm_up(self) -> None:
        """Twice, untimed."""
        for _ in range(2):
            self.run()

    def sample(self) -> None:
        """One call; on CUDA two, for the whole one is timed without the profiler.

        Raises:
            RuntimeError: the profiler did not see the stages.
        """
        on_gpu = self.native.device.type == "cuda"
        whole = self._clock.time(self.run) if on_gpu else None
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as seen, _head_as_a_stage(self.native):
            with record_function(f"pop::{CALL}"):
                self.run()
            synchronize(self.native.device)
        names = {f"pop::{stage}" for stage in (*LAYER_STAGES, *ONCE_STAGES, CALL)}
        ranges = [event for event in seen.events() if event.name in names and event.device_type.name == "CPU"]
        ranges.sort(key=lambda event: event.time_range.start)
        times = [(event.name.removeprefix("pop::"), _microseconds(event, on_gpu) / 1e6) for event in ranges]
        self.stages.append(stage_sums((item for item in times if item[0] != CALL), self.native.plan))
        self.calls.append(dict(times)[CALL] if whole is None else whole)


def profile_plans(model: Any, input_ids: torch.Tensor, plans: Sequence[Plan], rounds: int = 5) -> list[StageProfile]:
    """Profiles of one prompt under several plans, held against what this device reaches now.

    Args:
        model: a Hugging Face model of a native family.
        input_ids: ``[batch, tokens]``.
        plans: executed as given.
        rounds: each takes one call of every plan apart, and times the products and the memory they are held against.

    Raises:
        RuntimeError: the profiler did not see the stages.
    """
    probes = [_Probe(load(model, plan), input_ids) for plan in plans]
    native = probes[0].native
    products = reference_gemms(native.spec, input_ids.numel(), native.dtype, native.device)
    for item in (*products, *probes):
        item.warm_up()
    bandwidths = []
    for turn in range(rounds):
        interleave(products[:: -1 if turn % 2 else 1], WallClock(native.device), repeats=1)
        rates = measure_bandwidth(native.device)
        if rates:
            bandwidths.append(max(rates.values()))
        for probe in probes if turn % 2 == 0 else reversed(probes):
            probe.sample()
    peak, bandwidth = peak_rate(products), statistics.median(bandwidths) if bandwidths else None
    found = [_profile_of(probe, input_ids, peak, bandwidth) for probe in probes]
    for item in found:
        item.host = host_times(model, item.plan, input_ids)
    return found


def _profile_of(probe: _Probe, input_ids: torch.Tensor, peak: float | None, bandwidth: float | None) -> StageProfile:
    native, plan = probe.native, probe.native.plan
    batch, tokens = input_ids.shape
    cost = _core.plan_cost(native.spec, plan, sequence_shapes(batch, tokens, plan))["stages"]
    moved = moved_bytes(native.spec, plan, batch * tokens, native.dtype.itemsize)
    name = plan_name(plan) if plan.omit else NATIVE_FULL
    result = StageProfile(name, batch, tokens, plan, statistics.median(probe.calls), peak=peak, bandwidth=bandwidth)
    for stage in STAGES:
        taken = statistics.median(sample.get(stage, 0.0) for sample in probe.stages)
        if taken > 0:
            counted = cost.get(stage, {})
            result.stages.append(Stage(stage, taken, counted.get("flops"), counted.get("bytes", moved.get(stage))))
    rest = result.seconds - sum(stage.seconds for stage in result.stages)
    result.stages.append(Stage(REST, max(0.0, rest)))
    return result


def moved_bytes(spec: _core.ModelSpec, plan: Plan, rows: int, element: int) -> dict[str, float]:
    """Bytes that stages without products read and write, each operand once, for ``rows`` rows without a past.

    Omitted layers and the last one write their caches in the stage kv_project; of their few other rows none is counted.
    """
    through = set(range(spec.num_layers - 1)) - set(plan.omit)
    return {
        "embed": 2.0 * rows * spec.hidden_size * element,
        "rope_cache_write": 2.0 * rows * len(through) * (spec.q_dim + 2 * spec.kv_dim) * element,
    }


@contextmanager
def _head_as_a_stage(native: NativeModel) -> Iterator[None]:
    """A range of the profiler around the head, which Python calls after the operator."""
    logits_of = native.logits_of

    def in_a_range(hidden: torch.Tensor) -> torch.Tensor:
        with record_function(f"pop::{HEAD}"):
            return logits_of(hidden)

    native.logits_of = in_a_range  # type: ignore[method-assign]
    try:
        yield
    finally:
        del native.logits_of


def stage_sums(ranges: Iterable[tuple[str, float]], plan: Plan) -> dict[str, float]:
    """Sums ``(stage, seconds)`` in the order of a call.

    Raises:
        RuntimeError: other stages than those of a call under this plan.
    """
    sums: dict[str, float] = {}
    counts = dict.fromkeys(LAYER_STAGES, 0)
    for stage, seconds in ranges:
        if stage in counts:
            # Layers come in order, each with every stage once: so the count of a stage is the layer's number.
            layer = counts[stage]
            counts[stage] += 1
            stage = "boundary" if layer in plan.omit else stage
        sums[stage] = sums.get(stage, 0.0) + seconds
    if set(counts.values()) != {plan.num_layers}:
        raise RuntimeError(f"profiler: expected {plan.num_layers} ranges of each stage of a layer, got {counts}")
    return sums


def _microseconds(event: Any, on_gpu: bool) -> float:
    """On CUDA the time of the kernels launched inside the range, by it and by the operators that it calls."""
    return float(event.device_time_total if on_gpu else event.cpu_time_total)


def profile_text(found: StageProfile) -> str:
    """The table of one profile."""
    header = ["stage", "us", "share", "rate", "unit", "of peak"]
    lines = [
        f"{found.name}, batch {found.batch}, {found.tokens} tokens: {1e6 * found.seconds:,.0f} us a call",
        "",
        table(header, [_cells(found, stage) for stage in found.stages]),
    ]
    if found.host is not None:
        before, inside, after = (f"{1e6 * seconds:,.0f}" for seconds in astuple(found.host))
        lines.append(f"host, enabled model: {before} us before the operator, {inside} us in it, {after} us after it")
    return "\n".join(lines)


def _cells(found: StageProfile, stage: Stage) -> list[str]:
    share = found.share_of_peak(stage)
    rate, unit = _rate(found, stage)
    return [
        stage.name,
        f"{1e6 * stage.seconds:,.0f}",
        f"{100 * stage.seconds / found.seconds:.1f} %",
        "-" if rate is None else f"{rate / 1e9:,.1f}",
        unit,
        "-" if share is None else f"{100 * share:.1f} %",
    ]


def _rate(found: StageProfile, stage: Stage) -> tuple[float | None, str]:
    """GFLOP/s, or GB/s for a stage that memory bounds."""
    flops, moved = stage.flops or 0.0, stage.bytes or 0.0
    if stage.seconds <= 0 or not (flops or moved):
        return None, ""
    bound = found.peak and found.bandwidth and moved / found.bandwidth > flops / found.peak
    in_bytes = bound or not flops
    return (moved if in_bytes else flops) / stage.seconds, "GB/s" if in_bytes else "GFLOP/s"


def profile_json(model: str, dtype: str, found: Sequence[StageProfile]) -> list[dict[str, Any]]:
    """Profiles as plain data."""
    return [
        {
            "model": model,
            "dtype": dtype,
            "arm": item.name,
            "batch": item.batch,
            "tokens": item.tokens,
            "omit": list(item.plan.omit),
            "boundary": item.plan.boundary,
            "seconds": item.seconds,
            "gemm_peak_flop_per_s": item.peak,
            "bandwidth_bytes_per_s": item.bandwidth,
            "host_seconds": None if item.host is None else asdict(item.host),
            "stages": [
                {
                    "name": stage.name,
                    "seconds": stage.seconds,
                    "share": stage.seconds / item.seconds,
                    "flops": stage.flops,
                    "bytes": stage.bytes,
                    "share_of_peak": item.share_of_peak(stage),
                }
                for stage in item.stages
            ],
        }
        for item in found
    ]
