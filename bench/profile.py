"""Measure the stages of a native prefill: ``python bench/run.py --profile``.

``pop::prefill`` opens a profiler range for each stage of each layer; the ranges of the head and of the whole call are
added here. torch.profiler reports their times: on a CPU those of the ranges, on CUDA those of the kernels launched
within them. On CUDA the profiler slows the host down, so the whole call is timed without it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import torch
from pop_ext import _core
from pop_ext.hf.load import load
from pop_ext.hf.loaded import ROUNDED
from pop_ext.hf.native_model import NativeModel
from pop_ext.plans.plan import Plan
from torch.profiler import ProfilerActivity, profile, record_function

from bench.arms import NATIVE_FULL, plan_name, sequence_shapes
from bench.host_times import HostTimes, host_times
from bench.measure import WallClock, interleave, synchronize
from bench.rates import measure_bandwidth, peak_rate, reference_gemms, rounded_gemms
from bench.report import table

LAYER_STAGES = ("qkv", "rope_cache_write", "attention", "o_proj", "mlp")
"""Stages of a layer, in this order."""
HEAD = "lm_head"
CALL = "call"
"""Name of the range around a whole call."""
ONCE_STAGES = ("build_row_tables", "embed", "kv_project", "final_norm", HEAD)
STAGES = ("build_row_tables", "embed", *LAYER_STAGES, "kv_project", "boundary", "final_norm", HEAD)
REST = "rest"
"""Name of the time outside the stages: checks, cache, and on CUDA the time in which no kernel of a stage runs."""


@dataclass(frozen=True)
class Stage:
    """A stage, summed over all layers that have it.

    Attributes:
        seconds: median over the profiled calls.
        flops: by the cost model; None if it does not model the stage.
        bytes: by the cost model, else by `moved_bytes`; None if neither models the stage, and where its weights are
            in 8 bits.
        rounded_flops: those of ``flops`` that are products in 8 bits.
    """

    name: str
    seconds: float
    flops: float | None = None
    bytes: float | None = None
    rounded_flops: float = 0.0


@dataclass
class StageProfile:
    """The profile of one arm's call.

    Attributes:
        name: name of the arm.
        seconds: median of the whole call.
        stages: in the order of a call; the last one, ``REST``, is the remainder of ``seconds``.
        peak: FLOP/s of matrix products in this run; None: unknown.
        bandwidth: bytes per second of memory in this run; None: unknown.
        host: host times of a call of the enabled model.
        products: "fp8" or "int8" if its products are in 8 bits; else None.
        rounded_peak: operations per second of such products in this run; None: unknown.
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
    products: str | None = None
    rounded_peak: float | None = None

    def share_of_peak(self, stage: Stage) -> float | None:
        """Return a stage's speed as a share of its bound: of both limits, the one that takes longer."""
        if stage.seconds <= 0 or not self.peak or not self.bandwidth or not (stage.flops or stage.bytes):
            return None
        if stage.rounded_flops and not self.rounded_peak:
            return None
        computing = ((stage.flops or 0.0) - stage.rounded_flops) / self.peak
        if self.rounded_peak:
            computing += stage.rounded_flops / self.rounded_peak
        return max(computing, (stage.bytes or 0.0) / self.bandwidth) / stage.seconds


class _Probe:
    """Profiles calls of one prefill.

    Attributes:
        calls: seconds of each call.
        stages: for each call, stage -> seconds.
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
        """Call it twice, untimed."""
        for _ in range(2):
            self.run()

    def sample(self) -> None:
        """Profile one call; on CUDA a second call is timed without the profiler.

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


def profile_plans(
    model: Any, input_ids: torch.Tensor, plans: Sequence[Plan], rounds: int = 5, products: str | None = None
) -> list[StageProfile]:
    """Profile one prompt under several plans, relative to the peaks of this device in the same run.

    Args:
        model: a Hugging Face model of a native family.
        input_ids: ``[batch, tokens]``.
        plans: executed as given.
        rounds: number of rounds; each profiles one call of every plan, and times matrix products and memory.
        products: "fp8" or "int8" for products in 8 bits.

    Raises:
        RuntimeError: the profiler did not see the stages.
    """
    options: dict[str, Any] = {} if products is None else {products: True}
    probes = [_Probe(load(model, plan, **options), input_ids) for plan in plans]
    native = probes[0].native
    shape = native.spec, input_ids.numel(), native.dtype, native.device
    plain = reference_gemms(*shape)
    rounded = [] if products is None else rounded_gemms(*shape, products)
    gemms = [*plain, *rounded]
    for item in (*gemms, *probes):
        item.warm_up()
    bandwidths = []
    for turn in range(rounds):
        interleave(gemms[:: -1 if turn % 2 else 1], WallClock(native.device), repeats=1)
        rates = measure_bandwidth(native.device)
        if rates:
            bandwidths.append(max(rates.values()))
        for probe in probes if turn % 2 == 0 else reversed(probes):
            probe.sample()
    peak, bandwidth = peak_rate(plain), statistics.median(bandwidths) if bandwidths else None
    found = []
    for probe in probes:
        result = _profile_of(probe, input_ids, peak, bandwidth, peak_rate(rounded))
        result.host = host_times(model, result.plan, input_ids, products=products)
        found.append(result)
    return found


def _profile_of(
    probe: _Probe, input_ids: torch.Tensor, peak: float | None, bandwidth: float | None, rounded_peak: float | None
) -> StageProfile:
    native, plan = probe.native, probe.native.plan
    batch, tokens = input_ids.shape
    cost = _core.plan_cost(native.spec, plan, sequence_shapes(batch, tokens, plan))["stages"]
    moved = moved_bytes(native.spec, plan, batch * tokens, native.dtype.itemsize)
    name = plan_name(plan) if plan.omit else NATIVE_FULL
    result = StageProfile(
        name if native.products is None else f"{name} {native.products}",
        batch,
        tokens,
        plan,
        statistics.median(probe.calls),
        peak=peak,
        bandwidth=bandwidth,
        products=native.products,
        rounded_peak=rounded_peak,
    )
    for stage in STAGES:
        taken = statistics.median(sample.get(stage, 0.0) for sample in probe.stages)
        if taken > 0:
            counted = cost.get(stage, {})
            flops, size = counted.get("flops"), counted.get("bytes", moved.get(stage))
            rounded = rounded_share(native.spec, stage, native.products) * (flops or 0.0)
            result.stages.append(Stage(stage, taken, flops, None if rounded else size, rounded))
    rest = result.seconds - sum(stage.seconds for stage in result.stages)
    result.stages.append(Stage(REST, max(0.0, rest)))
    return result


def rounded_share(spec: _core.ModelSpec, stage: str, products: str | None) -> float:
    """Return the share of a stage's FLOPs in retained layers that are products in 8 bits."""
    if stage in ("o_proj", "mlp"):
        return float(products is not None)
    if stage != "qkv" or products is None:
        return 0.0
    rows = {".q_proj": spec.q_dim, ".k_proj": spec.kv_dim, ".v_proj": spec.kv_dim}
    rounded = sum(count for slot, count in rows.items() if products == "fp8" or slot in ROUNDED)
    return rounded / sum(rows.values())


def moved_bytes(spec: _core.ModelSpec, plan: Plan, rows: int, element: int) -> dict[str, float]:
    """Return the bytes that stages without products read and write, each operand once, for rows without a past.

    Omitted layers and the last layer write their caches in the stage kv_project. Their few boundary rows are not
    counted.

    Args:
        spec: shape of the model.
        plan: the plan.
        rows: rows of the prompt.
        element: bytes of an element.
    """
    through = set(range(spec.num_layers - 1)) - set(plan.omit)
    return {
        "embed": 2.0 * rows * spec.hidden_size * element,
        "rope_cache_write": 2.0 * rows * len(through) * (spec.q_dim + 2 * spec.kv_dim) * element,
    }


@contextmanager
def _head_as_a_stage(native: NativeModel) -> Iterator[None]:
    """Open a profiler range around the head within the block; Python calls the head after the operator."""
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
    """Sum the seconds of each stage over layers.

    Args:
        ranges: ``(stage, seconds)``, in the order of a call.
        plan: plan of the call.

    Raises:
        RuntimeError: the stages are not those of a call under this plan.
    """
    sums: dict[str, float] = {}
    counts = dict.fromkeys(LAYER_STAGES, 0)
    for stage, seconds in ranges:
        if stage in counts:
            # Layers run in order, and each has every stage once: the count of a stage is the index of its layer.
            layer = counts[stage]
            counts[stage] += 1
            stage = "boundary" if layer in plan.omit else stage
        sums[stage] = sums.get(stage, 0.0) + seconds
    if set(counts.values()) != {plan.num_layers}:
        raise RuntimeError(f"profiler: expected {plan.num_layers} ranges of each stage of a layer, got {counts}")
    return sums


def _microseconds(event: Any, on_gpu: bool) -> float:
    """Return a range's time; on CUDA that of the kernels launched in it, by its operators as well."""
    return float(event.device_time_total if on_gpu else event.cpu_time_total)


def profile_text(found: StageProfile) -> str:
    """Format a profile as a table."""
    header = ["stage", "us", "share", "rate", "unit", "of peak"]
    lines = [
        f"{found.name}, batch {found.batch}, {found.tokens} tokens: {1e6 * found.seconds:,.0f} us a call",
        "",
        table(header, [_cells(found, stage) for stage in found.stages]),
    ]
    if found.rounded_peak is not None:
        lines.append(f"peak of {found.products} products: {found.rounded_peak / 1e9:,.0f} Gop/s")
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
    """Format a stage's GFLOP/s; GB/s if it is bound by memory."""
    flops, moved = stage.flops or 0.0, stage.bytes or 0.0
    if stage.seconds <= 0 or not (flops or moved):
        return None, ""
    bound = found.peak and found.bandwidth and moved / found.bandwidth > flops / found.peak
    in_bytes = bound or not flops
    return (moved if in_bytes else flops) / stage.seconds, "GB/s" if in_bytes else "GFLOP/s"


def profile_json(model: str, dtype: str, found: Sequence[StageProfile]) -> list[dict[str, Any]]:
    """Return profiles as JSON values."""
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
            "products": item.products,
            "rounded_peak_op_per_s": item.rounded_peak,
            "bandwidth_bytes_per_s": item.bandwidth,
            "host_seconds": None if item.host is None else asdict(item.host),
            "stages": [
                {
                    "name": stage.name,
                    "seconds": stage.seconds,
                    "share": stage.seconds / item.seconds,
                    "flops": stage.flops,
                    "rounded_flops": stage.rounded_flops,
                    "bytes": stage.bytes,
                    "share_of_peak": item.share_of_peak(stage),
                }
                for stage in item.stages
            ],
        }
        for item in found
    ]
