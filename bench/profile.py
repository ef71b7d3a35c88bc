"""Where the time of a native prefill goes, stage by stage: ``python bench/run.py --profile``.

``pop::prefill`` opens a profiler range for each stage of each layer, and the head gets one here. torch.profiler gives
their times: on CUDA those of the kernels that were launched inside, on a CPU those of the ranges. The whole call is
timed without the profiler.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from bench.measure import WallClock, interleave
from bench.rates import measure_bandwidth, peak_rate, reference_gemms
from bench.report import table

LAYER_STAGES = ("qkv", "rope_cache_write", "attention", "o_proj", "mlp")
"""What each layer does, in this order."""
HEAD = "lm_head"
ONCE_STAGES = ("place_rows", "embed", "kv_project", "final_norm", HEAD)
STAGES = ("place_rows", "embed", *LAYER_STAGES, "kv_project", "boundary", "final_norm", HEAD)
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
        seconds: of the whole call, without the profiler; median.
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


def profile_prefill(
    name: str,
    native: NativeModel,
    input_ids: torch.Tensor,
    calls: int = 5,
    peak: float | None = None,
    bandwidth: float | None = None,
) -> StageProfile:
    """Profiles ``native.prefill(input_ids)``.

    Args:
        name: of the arm.
        native: the model and its plan.
        input_ids: ``[batch, tokens]``.
        calls: profiled calls, and as many timed ones.
        peak: FLOP/s to hold products against.
        bandwidth: bytes per second to hold what moves memory against.

    Raises:
        RuntimeError: the profiler did not see the stages.
    """
    batch, tokens = input_ids.shape

    def call() -> Any:
        return native.prefill(input_ids)

    for _ in range(2):
        call()
    clock = WallClock(native.device)
    seconds = statistics.median(clock.time(call) for _ in range(calls))
    samples = [_stage_seconds(call, native) for _ in range(calls)]
    cost = _core.plan_cost(native.spec, native.plan, sequence_shapes(batch, tokens, native.plan))["stages"]
    moved = moved_bytes(native.spec, native.plan, batch * tokens, native.dtype.itemsize)
    result = StageProfile(name, batch, tokens, native.plan, seconds, peak=peak, bandwidth=bandwidth)
    for stage in STAGES:
        taken = statistics.median(sample.get(stage, 0.0) for sample in samples)
        if taken > 0:
            counted = cost.get(stage, {})
            result.stages.append(Stage(stage, taken, counted.get("flops"), counted.get("bytes", moved.get(stage))))
    rest = seconds - sum(stage.seconds for stage in result.stages)
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


def profile_plans(model: Any, input_ids: torch.Tensor, plans: Sequence[Plan]) -> list[StageProfile]:
    """Profiles of one prompt under several plans, held against what this device reaches now.

    Raises:
        RuntimeError: as ``profile_prefill``.
    """
    native = load(model, plans[0])
    kind = native.dtype, native.device
    products = reference_gemms(native.spec, input_ids.numel(), *kind)
    for product in products:
        product.warm_up()
    interleave(products, WallClock(native.device), repeats=5)
    peak, bandwidth = peak_rate(products), max(measure_bandwidth(native.device).values(), default=None)
    found = []
    for plan in plans:
        name = plan_name(plan) if plan.omit else NATIVE_FULL
        found.append(profile_prefill(name, load(model, plan), input_ids, peak=peak, bandwidth=bandwidth))
        found[-1].host = host_times(model, plan, input_ids)
    return found


def _stage_seconds(call: Callable[[], Any], native: NativeModel) -> dict[str, float]:
    """Stage -> seconds of one call; all that omitted layers do for boundary rows is the stage "boundary"."""
    on_gpu = native.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as seen, _head_as_a_stage(native.model):
        call()
        if on_gpu:
            torch.cuda.synchronize(native.device)
    names = {f"pop::{stage}" for stage in (*LAYER_STAGES, *ONCE_STAGES)}
    ranges = [event for event in seen.events() if event.name in names and event.device_type.name == "CPU"]
    ranges.sort(key=lambda event: event.time_range.start)
    return stage_sums(
        ((event.name.removeprefix("pop::"), _microseconds(event, on_gpu) / 1e6) for event in ranges),
        native.plan,
    )


@contextmanager
def _head_as_a_stage(model: Any) -> Iterator[None]:
    """A range of the profiler around the head, which Python calls after the operator."""
    ranges: list[record_function] = []

    def begin(*_: Any) -> None:
        ranges.append(record_function(f"pop::{HEAD}"))
        ranges[-1].__enter__()

    def end(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    head = model.lm_head
    hooks = [head.register_forward_pre_hook(begin), head.register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
