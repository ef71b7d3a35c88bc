"""Run a case: one model, batch size and length, with all arms in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pop_ext import _core
from pop_ext.plans.plan import Plan
from pop_ext.utils.progress import ProgressBar
from pop_ext.utils.roofline import Peaks

from bench.arms import HF_COMPILE, HF_EAGER, NATIVE_FULL, Arm, find, make_arms
from bench.measure import MIN_REPEATS, Summary, WallClock, error_line, interleave, paired_ratio
from bench.memory import measure_memory, release_memory
from bench.rates import Gemm, measure_bandwidth, peak_rate, reference_gemms
from bench.shapes import BenchModel

_LARGEST_ERROR = 0.1  # of ``Arm.error`` at full depth; rounding stays far below it
_LARGEST_ERROR_8_BITS = 0.4  # the same, with products in 8 bits


@dataclass(frozen=True)
class Settings:
    """Settings that all cases of a run share.

    Attributes:
        repeats: number of timed rounds.
        warmup: untimed calls of each arm before them; the last one also measures memory.
        compile_mode: mode of hf-compile; None: no such arm.
        via: how native arms are called, as in `make_arms`.
        tunings: backend options that get arms of their own, as in `make_arms`.
        copies: copies of weights that get arms of their own, as in `make_arms`.
        graphs: whether prefills as CUDA graphs get arms of their own.
        quiet: show no progress bar.
    """

    repeats: int = 11
    warmup: int = 2
    compile_mode: str | None = None
    via: str = "enable"
    tunings: tuple[Mapping[str, int], ...] = ()
    copies: tuple[str, ...] = ()
    graphs: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Comparison:
    """An arm compared with a baseline.

    Attributes:
        speedup: median of the baseline divided by the median of the arm.
        paired: median over rounds of the same ratio.
        ceiling: FLOPs of the baseline divided by FLOPs of the arm.
        roofline: least time of the baseline divided by the least time of the arm, by FLOPs and bytes at the peaks of
            this run; None if a peak is unknown.
    """

    arm: str
    baseline: str
    speedup: float
    paired: float
    ceiling: float
    roofline: float | None = None

    @property
    def share_of_roofline(self) -> float | None:
        """Measured speed-up as a share of the roofline."""
        return None if self.roofline is None else self.speedup / self.roofline

    @property
    def share(self) -> float:
        """Measured speed-up as a share of the ceiling."""
        return self.speedup / self.ceiling


@dataclass
class Case:
    """A case and its measurements."""

    model: BenchModel
    spec: _core.ModelSpec
    batch: int
    tokens: int
    dtype: torch.dtype
    arms: list[Arm]
    gemms: list[Gemm]
    bandwidth: float | None = None  # bytes/s of a large copy or read in this run
    rounds: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.model.name}, batch {self.batch}, {self.tokens} tokens, {dtype}"

    @property
    def peak(self) -> float | None:
        """FLOP/s of the fastest matrix product of this run."""
        return peak_rate(self.gemms)

    @property
    def peaks(self) -> Peaks | None:
        """Both peaks of this run; None if one is unknown."""
        return Peaks(self.peak, self.bandwidth) if self.peak and self.bandwidth else None

    def baseline(self) -> Arm | None:
        """Return the faster of the Hugging Face arms; native-full if none of them ran."""
        stock = [arm for arm in self.arms if arm.name in (HF_EAGER, HF_COMPILE) and arm.samples and not arm.failed]
        if not stock:
            return find(self.arms, NATIVE_FULL)
        return min(stock, key=lambda arm: Summary.of(arm.samples).median)

    def compare(self, arm: Arm, baseline: Arm) -> Comparison | None:
        """Compare two arms; None if one of them has no samples."""
        if arm.failed or baseline.failed or not arm.samples or not baseline.samples:
            return None
        medians = [Summary.of(samples.samples).median for samples in (baseline, arm)]
        paired = paired_ratio(baseline.samples, arm.samples)
        ceiling, roofline = baseline.flops / arm.flops, None
        if self.peaks is not None:
            roofline = self.peaks.roofline(arm.cost, baseline.cost)
        return Comparison(arm.name, baseline.name, medians[0] / medians[1], paired, ceiling, roofline)

    def comparisons(self) -> list[Comparison]:
        """Compare every arm with every baseline: the Hugging Face arms and native-full."""
        names = (HF_EAGER, HF_COMPILE, NATIVE_FULL)
        baselines = [arm for arm in self.arms if arm.name in names]
        order = {name: index for index, name in enumerate(names)}
        found = [
            self.compare(arm, baseline)
            for baseline in baselines
            for arm in self.arms
            if order.get(arm.name, len(order)) > order[baseline.name]
        ]
        return [comparison for comparison in found if comparison is not None]


def run_case(
    model: BenchModel,
    spec: _core.ModelSpec,
    batch: int,
    tokens: int,
    plans: Sequence[Plan],
    settings: Settings,
    budget: float | None = None,
    arms_of: Callable[..., list[Arm]] = make_arms,
) -> Case:
    """Prepare, check and time all arms.

    Args:
        model: the stock model.
        spec: its shape.
        batch: number of sequences.
        tokens: length of each sequence.
        plans: plans of the pruned arms.
        settings: settings of the run.
        budget: seconds for the whole case; once they are spent, no round starts beyond the fewest. None: no limit.
        arms_of: builds the arms.
    """
    started = time.monotonic()
    device = next(model.model.parameters()).device
    dtype = next(model.model.parameters()).dtype
    ids = torch.randint(0, spec.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    how = (settings.compile_mode, settings.via, settings.tunings, settings.copies, settings.graphs)
    arms = arms_of(model.model, spec, ids, plans, *how)
    gemms = reference_gemms(spec, batch * tokens, dtype, device)
    case = Case(model, spec, batch, tokens, dtype, arms, gemms)
    timed = [*arms, *gemms]
    clock = WallClock(device)
    steps = len(arms) * settings.warmup + settings.repeats * len(timed)
    with ProgressBar(case.title, steps, quiet=settings.quiet) as bar:
        bar.log(case.title)
        expected: torch.Tensor | None = None
        for arm in arms:
            logits = _warm_up(arm, clock, settings.warmup, device, bar)
            if arm.name == HF_EAGER:
                expected = logits
            elif logits is not None and expected is not None:
                _check_logits(arm, logits, expected)
        for gemm in gemms:
            gemm.warm_up()
        _announce(case, settings, budget, started, bar)
        deadline = None if budget is None else started + budget
        case.rounds = interleave(
            timed, clock, settings.repeats, deadline, step=lambda item: bar.advance(label=item.name)
        )
    case.bandwidth = max(measure_bandwidth(device).values(), default=None)
    if case.rounds < MIN_REPEATS:
        why = "as asked for" if settings.repeats < MIN_REPEATS else "the time budget was spent"
        case.warnings.append(f"only {case.rounds} repeats ({why}), fewer than {MIN_REPEATS}: indicative figures")
    for arm in arms:
        arm.call = None  # frees the folded weights
    return case


def _warm_up(arm: Arm, clock: WallClock, calls: int, device: torch.device, bar: ProgressBar) -> torch.Tensor | None:
    """Call an arm untimed and measure its memory. Return the logits of the last call; None if the arm failed."""
    arm.prepare()
    outputs: list[Any] = []

    def call() -> Any:
        outputs[:] = [arm.run()]
        return outputs[0]

    def call_watched() -> None:
        arm.memory = measure_memory(call, device)

    for index in range(calls):
        if arm.failed is None:
            outputs.clear()
            seconds = arm.attempt(partial(clock.time, call_watched if index == calls - 1 else call))
            arm.warmup = arm.warmup if seconds is None else (*arm.warmup, seconds)
            if arm.failed is not None:
                outputs.clear()
                release_memory(device)  # a failed call may have run out of memory
        bar.advance(label=f"{arm.name}, warm-up")
    return outputs[0].logits.detach().float().cpu() if outputs and arm.failed is None else None


def _check_logits(arm: Arm, logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Set an arm's error, and mark it as failed if it computes something else than hf-eager."""
    if not bool(logits.isfinite().all()) and bool(expected.isfinite().all()):
        arm.failed = "logits are not finite"
        return
    if logits.shape != expected.shape:
        arm.failed = f"logits: expected shape {list(expected.shape)}, got {list(logits.shape)}"
        return
    arm.error = float((logits - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    if arm.full_depth and not arm.error <= (_LARGEST_ERROR_8_BITS if arm.copies in ("fp8", "int8") else _LARGEST_ERROR):
        arm.failed = f"logits differ from {HF_EAGER}'s by {100 * arm.error:.1f} % (RMS), at full depth"


def _announce(case: Case, settings: Settings, budget: float | None, started: float, bar: ProgressBar) -> None:
    """Print how long the rounds will take, estimated from the last warm-up call of each arm."""
    for arm in case.arms:
        if arm.failed:
            bar.log(f"  {arm.name} failed: {arm.failed}")
    seconds = settings.repeats * sum(arm.warmup[-1] for arm in case.arms if arm.warmup and not arm.failed)
    limit = ""
    if budget is not None:
        left = max(0.0, budget - (time.monotonic() - started))
        limit = f"; {left:.0f} s are left, so there will be fewer" if seconds > left else ""
    bar.log(f"  {settings.repeats} rounds take about {seconds:.0f} s{limit}")


def failed_model(name: str, error: Exception) -> dict[str, str]:
    """Return the report's entry for a model that could not be loaded."""
    return {"model": name, "failed": error_line(error)}
