"""A case: one model, batch and length, every arm in turn."""

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

from bench.arms import HF_COMPILE, HF_EAGER, NATIVE_FULL, Arm, find, make_arms
from bench.measure import MIN_REPEATS, Summary, WallClock, error_line, interleave, paired_ratio
from bench.memory import measure_memory, release_memory
from bench.rates import Gemm, peak_rate, reference_gemms
from bench.shapes import BenchModel

_LARGEST_ERROR = 0.1  # RMS difference of full-depth logits to hf-eager's; rounding stays far below
_LARGEST_ERROR_FP8 = 0.4  # the same, of products in 8-bit floats


@dataclass(frozen=True)
class Settings:
    """How cases are run.

    Attributes:
        repeats: rounds.
        warmup: calls of each arm before them; the last one is also watched for its memory.
        compile_mode: of hf-compile; None leaves that arm out.
        via: how native arms are called (``bench.arms``).
        tunings: options of the backend that make arms of their own (``bench.arms``).
        copies: so do these copies of weights ("fp8", "prepack").
        quiet: no progress bar.
    """

    repeats: int = 11
    warmup: int = 2
    compile_mode: str | None = None
    via: str = "enable"
    tunings: tuple[Mapping[str, int], ...] = ()
    copies: tuple[str, ...] = ()
    quiet: bool = False


@dataclass(frozen=True)
class Comparison:
    """One arm against a baseline.

    Attributes:
        speedup: ratio of medians, baseline by arm.
        paired: median of the ratios of each round.
        ceiling: FLOPs of the baseline by FLOPs of the arm.
    """

    arm: str
    baseline: str
    speedup: float
    paired: float
    ceiling: float

    @property
    def share(self) -> float:
        """Of the ceiling."""
        return self.speedup / self.ceiling


@dataclass
class Case:
    """What was measured."""

    model: BenchModel
    spec: _core.ModelSpec
    batch: int
    tokens: int
    dtype: torch.dtype
    arms: list[Arm]
    gemms: list[Gemm]
    rounds: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.model.name}, batch {self.batch}, {self.tokens} tokens, {dtype}"

    @property
    def peak(self) -> float | None:
        """FLOP/s of the best product of this run."""
        return peak_rate(self.gemms)

    def baseline(self) -> Arm | None:
        """The faster of the Hugging Face arms, or native-full if none ran."""
        stock = [arm for arm in self.arms if arm.name in (HF_EAGER, HF_COMPILE) and arm.samples and not arm.failed]
        if not stock:
            return find(self.arms, NATIVE_FULL)
        return min(stock, key=lambda arm: Summary.of(arm.samples).median)

    def compare(self, arm: Arm, baseline: Arm) -> Comparison | None:
        """None where one of them has no figure."""
        if arm.failed or baseline.failed or not arm.samples or not baseline.samples:
            return None
        medians = [Summary.of(samples.samples).median for samples in (baseline, arm)]
        paired = paired_ratio(baseline.samples, arm.samples)
        return Comparison(arm.name, baseline.name, medians[0] / medians[1], paired, baseline.flops / arm.flops)

    def comparisons(self) -> list[Comparison]:
        """Every arm against every baseline: the Hugging Face arms and native-full."""
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
    """Prepares, checks and times all arms.

    Args:
        model: the stock model.
        spec: its shape.
        batch: sequences.
        tokens: of each.
        plans: of the pruned arms.
        settings: how.
        budget: seconds for all of it; past them no further round starts once a few are done. None: all rounds.
        arms_of: makes the arms.
    """
    started = time.monotonic()
    device = next(model.model.parameters()).device
    dtype = next(model.model.parameters()).dtype
    ids = torch.randint(0, spec.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    how = (settings.compile_mode, settings.via, settings.tunings, settings.copies)
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
    if case.rounds < MIN_REPEATS:
        why = "as asked for" if settings.repeats < MIN_REPEATS else "the time budget was spent"
        case.warnings.append(f"only {case.rounds} repeats ({why}), fewer than {MIN_REPEATS}: indicative figures")
    for arm in arms:
        arm.call = None  # lets go of the folded weights
    return case


def _warm_up(arm: Arm, clock: WallClock, calls: int, device: torch.device, bar: ProgressBar) -> torch.Tensor | None:
    """Runs an arm before its figures count, and returns the logits of its last call; None when it failed."""
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
                release_memory(device)  # of a call that ran out of it
        bar.advance(label=f"{arm.name}, warm-up")
    return outputs[0].logits.detach().float().cpu() if outputs and arm.failed is None else None


def _check_logits(arm: Arm, logits: torch.Tensor, expected: torch.Tensor) -> None:
    """A fast arm that computes something else is a failed arm."""
    if not bool(logits.isfinite().all()) and bool(expected.isfinite().all()):
        arm.failed = "logits are not finite"
        return
    if logits.shape != expected.shape:
        arm.failed = f"logits: expected shape {list(expected.shape)}, got {list(logits.shape)}"
        return
    arm.error = float((logits - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    if arm.full_depth and not arm.error <= (_LARGEST_ERROR_FP8 if arm.copies == "fp8" else _LARGEST_ERROR):
        arm.failed = f"logits differ from {HF_EAGER}'s by {100 * arm.error:.1f} % (RMS), at full depth"


def _announce(case: Case, settings: Settings, budget: float | None, started: float, bar: ProgressBar) -> None:
    """Says how long the rounds will take, by the last warm-up call of each arm."""
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
    """A model that could not be loaded, for the report."""
    return {"model": name, "failed": error_line(error)}
