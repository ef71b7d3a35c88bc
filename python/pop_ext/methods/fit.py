"""Fit K/V projections for the layers that a plan omits: least squares, then training (docs/fitting.md)."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor

from pop_ext.hf.modules import find_decoder_modules
from pop_ext.methods.calibration import Batches, check_batches, count_sequences, stock_evaluation, stock_model
from pop_ext.methods.defaults import LEARNING_RATE, STEPS
from pop_ext.methods.distill import Training, distill
from pop_ext.methods.fit_arguments import Task, check_held, check_lambdas, check_tasks, check_training, hold_out_tasks
from pop_ext.methods.fit_moments import HOLD_EVERY, MomentsReader, PlanReading
from pop_ext.methods.ridge import RunMoments, RunSolution
from pop_ext.methods.student import Example, Student
from pop_ext.plans.origin import origin_of
from pop_ext.plans.plan import Plan
from pop_ext.plans.projections import FitReport, Projections, sample_weights
from pop_ext.reference.checks import check_plan
from pop_ext.utils.progress import Progress, reporting

WEIGHTINGS = ("attention", "uniform")
"""Ways to weigh calibration rows."""


Plans = TypeVar("Plans", Plan, Sequence[Plan])
"""A plan, or several."""


def fit(
    model: Any,
    plan: Plans,
    batches: Batches,
    *,
    method: str = "ridge",
    tasks: Sequence[Task] = (),
    holdout: Batches | None = None,
    lambdas: Sequence[float] | None = None,
    weighting: str = "attention",
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    resume: str | PathLike[str] | None = None,
    progress: Progress = False,
) -> Plans:
    """Fit K/V projections for the omitted layers of a plan, for a better first token at the same cost.

    The context rows of an omitted layer project K and V from the hidden state ``h`` of the last retained layer, which
    is not the hidden state that its weights were trained on.

    "ridge" solves a ridge regression for each omitted layer on calibration prompts, from the normalised ``h`` of the
    pruned model to the K (before its norm and RoPE) and V of the full model. The ridge pulls towards the layer's own
    projection. A row counts as much as later rows attend to it. All layers of a run share one Gram matrix. Lambda is
    chosen by the next-token loss on the continuations of held-out prompts, with the plan's boundary before each
    continuation.

    "distill" goes on from there, and trains the K and V matrices by the KL divergence to the full model on the rows
    after the context rows. All other weights are frozen. Held-out sequences and tasks choose the number of steps; if
    none helps, the ridge stays.

    Args:
        model: Hugging Face decoder with separate K and V projections, or with a fused ``qkv_proj``, enabled or not, in
            float32, bfloat16 or float16, on any device. It is left unchanged.
        plan: Plan that omits at least one layer. Projections that it already has are ignored. Several plans in a
            sequence are fitted in one reading of ``batches`` and ``tasks``, which takes most of the time of a ridge.
        batches: Iterable of input_ids, int [batch, T], without padding, read once. Each batch takes one forward, and
            one more for each plan with several runs. Until a sequence is held out, the last of each takes its own.
        method: "ridge" or "distill".
        tasks: Pairs (prompt, answer) of ids, int [n] each, without padding, such as
            ``pop_ext.evaluation.retrieval_pairs`` makes. Their answers count like continuations. With "distill" every
            eighth is held out, or the last one of fewer, but not a single one.
        holdout: Iterable like ``batches``, of other sequences. None holds out every eighth sequence of the batches,
            or the last one of fewer than eight, and does not fit on it.
        lambdas: Ridges > 0 to choose from, relative to the mean diagonal of the Gram matrix. Infinity stands for the
            original projections. None for ``LAMBDAS``. With a single value "ridge" holds nothing out.
        weighting: "attention" weighs each row by the attention that the last quarter of the sequence, at most 64
            tokens, pays to it in the full model, averaged over the layers of the run. The full model then runs with
            eager attention, which holds heads * T^2 attention weights of one layer at a time. "uniform" weighs all
            rows alike.
        steps: Largest number of training steps. A step reads four sequences of text and four tasks, whatever batches
            they come in.
        learning_rate: Largest learning rate of Adam, after a warm-up and before a cosine.
        seed: Seed of the order of sequences and of where they are split.
        resume: File that takes the state of the training at each judgement. A stopped training goes on from it. For
            a single plan.
        progress: True for a progress bar, or a callback that takes (steps done, their number or None). A step is a
            sequence read, a held-out sequence scored for one lambda, or a training step.

    Returns:
        The plan with ``projections`` in the model's dtype, and an origin that states how they were made. Of several
        plans a list in their order, each as if it had been fitted by itself.

    Raises:
        ValueError: An argument has a bad value. The plan omits nothing. There is no sequence, none to hold out, or
            none longer than the boundary. Hidden states, K, V or a loss are not finite. The model's K and V are no
            plain projections, or its eager attention returns no weights. The file of ``resume`` is of another fit.
        TypeError: An argument has the wrong type.

    Source: docs/fitting.md; POP (arXiv 2602.03295) for the independent KV projection.
    """
    model, ridges = stock_model(model), check_lambdas(lambdas)
    plans = _check_plans(plan, model, weighting)
    training = check_training(method, steps, learning_rate, seed, resume)
    if resume is not None and not isinstance(plan, Plan):
        raise ValueError(f"resume: expected None with several plans, which would share one file, got {resume!r}")
    pairs = check_tasks(tasks, model, max(one.boundary for one in plans))
    held: list[Tensor] = []
    if holdout is not None:
        held = [ids for batch in check_batches(holdout, model, least=4) for ids in batch.split(1)]
    holds = len(ridges) > 1 or training is not None
    split = holdout is None and holds
    kept, spare = (pairs, []) if training is None else hold_out_tasks(pairs)
    after = len(plans) * (0 if training is None else training.steps)
    total = _count_steps(batches, len(held), len(ridges) * len(plans) if len(ridges) > 1 else 0, split)
    total = None if total is None else total + len(kept) + after
    with stock_evaluation(model), torch.no_grad(), reporting(progress, "fit", total) as advance:
        reader = MomentsReader(model, plans, held if split else None, weighting, advance, training is not None)
        reader.read(batches)
        reader.read_tasks(kept)
        chosen, fitted = "lambda" if len(ridges) > 1 else "steps", []
        count = reader.sequences - len(kept)
        # All of them now, so that a bad boundary does not cost the fits of other plans.
        judged = [check_held(held, one.boundary, count, chosen) if holds else [] for one in plans]
        for number, (reading, judges) in enumerate(zip(reader.readings, judged, strict=True)):
            solved = _best_solution(reader, reading, ridges, judges, len(kept), advance)
            if training is not None:
                say = _speaker(progress, "" if isinstance(plan, Plan) else f"plan {number + 1} of {len(plans)}, ")
                solved = _distilled(model, solved, reading, judges, spare, training, advance, say)
                reading.examples.clear()  # their memory
            fitted.append(solved)
    return fitted[0] if isinstance(plan, Plan) else fitted  # type: ignore[return-value]


def _speaker(progress: Progress, prefix: str) -> Callable[[str], None]:
    """Return what prints a line about the training, after ``prefix``, if a progress bar is asked for."""
    if progress is not True:
        return lambda _: None
    return lambda text: print(prefix + text, file=sys.stderr, flush=True)


def _check_plans(plan: Any, model: Any, weighting: str) -> list[Plan]:
    """Check plans and weighting, and return the plans without projections."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    if isinstance(plan, Plan):
        return [_check_plan("plan", plan, model)]
    if isinstance(plan, (str, bytes)) or not isinstance(plan, Sequence):
        raise TypeError(f"plan: expected a pop_ext.Plan or a sequence of them, got {type(plan).__name__}")
    if not plan:
        raise ValueError("plan: expected at least one plan, got none")
    return [_check_plan(f"plan[{number}]", one, model) for number, one in enumerate(plan)]


def _check_plan(name: str, plan: Any, model: Any) -> Plan:
    """Check a plan, called ``name`` in errors, and return it without projections."""
    if not isinstance(plan, Plan):
        raise TypeError(f"{name}: expected a pop_ext.Plan, got {type(plan).__name__}")
    plan = plan.replace(projections=None)
    check_plan(plan, find_decoder_modules(model).layers, model.config)
    if not plan.omit:
        raise ValueError(f"{name}: expected at least one omitted layer to fit, got none")
    return plan


def _best_solution(
    reader: MomentsReader,
    reading: PlanReading,
    ridges: Sequence[float],
    held: list[Tensor],
    tasks: int,
    advance: Callable[[int], None],
) -> Plan:
    """Return a plan with the ridge solution of the lowest held-out loss, with a complete report and origin.

    Args:
        reader: What was read for all plans.
        reading: What was read for this plan.
        ridges: Lambdas to choose from.
        held: Held-out sequences; none of them is used for a single lambda.
        tasks: Number of tasks that were read.
        advance: Called with the sequences just scored.
    """
    layers = find_decoder_modules(reader.model).layers
    samples = {layer: sample_weights(layers[layer]) for layer in reading.plan.omit}
    losses: list[tuple[float, float, float]] = []
    if len(ridges) > 1:
        student = Student(reader.model, reading.plan)
        examples = [student.example(ids) for ids in held]
        for ridge in ridges:
            solved, _ = _solve(reader, reading, ridge, samples)
            losses.append((ridge, *_held_out_loss(student, solved, examples, advance)))
    best = _best_ridge(losses) if losses else ridges[0]
    return _with_report(
        reader.model, *_solve(reader, reading, best, samples), reading.moments, losses, len(held), tasks
    )


def _distilled(
    model: Any,
    plan: Plan,
    reading: PlanReading,
    texts: list[Tensor],
    tasks: list[Task],
    training: Training,
    advance: Callable[[int], None],
    say: Callable[[str], None],
) -> Plan:
    """Return a fitted plan whose matrices were trained further.

    Args:
        model: Stock model inside ``stock_evaluation``.
        plan: The plan with its ridge.
        reading: States of the sequences to train on.
        texts: Held-out sequences [1, T].
        tasks: Held-out tasks.
        training: As for ``distill``, like the others.
        advance: Called with the steps just done.
        say: Called with a line for each judgement.
    """
    assert plan.projections is not None
    assert plan.origin is not None
    assert reading.student is not None
    start, dtype = plan.projections, _dtype(model)
    held = [reading.student.example(ids) for ids in texts]
    held += [reading.student.example(torch.cat(pair)[None], len(pair[1])) for pair in tasks]
    examples = [one for one in reading.examples if one.answer or one.ids.shape[1] - one.rows > plan.boundary]
    if not examples:
        raise ValueError(f"batches: expected sequences longer than the boundary {plan.boundary} and a continuation")
    with torch.enable_grad():
        trained, history = distill(model, plan, start.matrices, examples, held, training, advance, say)
    best = min(history, key=lambda one: one.divergence)
    report = dataclasses.replace(
        start.report,
        method="distill",
        steps=best.step,
        training=tuple((one.step, one.kl, _nan(one.task_kl), _nan(one.exact)) for one in history),
    )
    matrices = {layer: matrix.to(dtype).cpu().contiguous() for layer, matrix in trained.items()}
    for layer, matrix in matrices.items():
        if not matrix.isfinite().all():
            raise ValueError(
                f"learning_rate: expected one whose matrices {str(dtype).removeprefix('torch.')} can hold, got "
                f"{training.learning_rate:g} (layer {layer})"
            )
    origin = dataclasses.replace(plan.origin, fit=report.describe())
    return plan.replace(projections=Projections(matrices, start.samples, report), origin=origin)


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _count_steps(batches: Batches, held: int, ridges: int, split: bool) -> int | None:
    """Return the number of progress steps: sequences to read, and held-out sequences to score for each ridge.

    Args:
        batches: The calibration batches.
        held: Number of sequences in ``holdout``.
        ridges: Number of times that a held-out sequence is scored.
        split: True if sequences of the batches are held out.

    Returns:
        The number, or None if the batches can only be counted by reading them.
    """
    count = count_sequences(batches)
    if count is None:
        return None
    inner = max(count // HOLD_EVERY, int(count > 1)) if split else 0
    return count - inner + (held or inner) * ridges


def _solve(
    reader: MomentsReader, reading: PlanReading, ridge: float, samples: dict[int, Tensor]
) -> tuple[Plan, list[RunSolution]]:
    """Solve every run with one ridge.

    Args:
        reader: What was read for all plans.
        reading: Moments of every run of the plan.
        ridge: Lambda.
        samples: Layer -> ``sample_weights`` of it.

    Returns:
        The plan with its projections in the model's dtype, and the solution of each run.
    """
    solutions, dtype = [run.solve(ridge) for run in reading.moments], _dtype(reader.model)
    matrices = {
        layer: (run.layers[layer].original.double() + change).to(dtype).cpu().contiguous()
        for run, solution in zip(reading.moments, solutions, strict=True)
        for layer, change in solution.changes.items()
    }
    for layer, matrix in matrices.items():
        if not matrix.isfinite().all():
            raise ValueError(
                f"lambdas: expected a ridge whose projections {str(dtype).removeprefix('torch.')} can hold, got "
                f"{ridge:g} (layer {layer})"
            )
    weighting = "attention" if reader.by_attention else "uniform"
    report = FitReport(ridge, reader.sequences, reading.moments[0].rows, weighting=weighting)
    return reading.plan.replace(projections=Projections(matrices, samples, report)), solutions


def _best_ridge(losses: list[tuple[float, float, float]]) -> float:
    """Return the ridge of the lowest finite loss."""
    finite = [row for row in losses if math.isfinite(row[1])]
    if not finite:
        raise ValueError(f"holdout: expected finite losses, got {', '.join(f'{loss:g}' for _, loss, _ in losses)}")
    return min(finite, key=lambda row: row[1])[0]


def _with_report(
    model: Any,
    plan: Plan,
    solutions: list[RunSolution],
    moments: list[RunMoments],
    losses: list[tuple[float, float, float]],
    held: int,
    tasks: int,
) -> Plan:
    """Return the fitted plan with a complete report and origin."""
    assert plan.projections is not None
    report = dataclasses.replace(
        plan.projections.report,
        tasks=tasks,
        condition=tuple(solution.condition for solution in solutions),
        losses=tuple(losses),
        holdout=held,
        residuals={
            layer: run.residuals(layer, change)
            for run, solution in zip(moments, solutions, strict=True)
            for layer, change in solution.changes.items()
        },
    )
    found, known = origin_of(model, ""), plan.origin
    origin = dataclasses.replace(found, method=None) if known is None else known
    origin = dataclasses.replace(
        origin, config_hash=found.config_hash, fit=report.describe(), fit_samples=report.sequences
    )
    return plan.replace(origin=origin, projections=dataclasses.replace(plan.projections, report=report))


def _dtype(model: Any) -> torch.dtype:
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


def _held_out_loss(
    student: Student, plan: Plan, held: list[Example], advance: Callable[[int], None]
) -> tuple[float, float]:
    """Score a fitted plan on the continuations of held-out sequences.

    Args:
        student: Student of the plan.
        plan: The plan with its projections.
        held: States of the full model on single sequences.
        advance: Called with the sequences just scored.

    Returns:
        The mean loss in nats per token, and its standard error.
    """
    assert plan.projections is not None
    found = []
    for example in held:
        rows = example.rows
        logits = student.logits(example, example.ids.shape[1] - rows, rows, plan.projections.matrices)
        log_p = logits[0].log_softmax(-1)
        found.append(-log_p.gather(-1, example.ids[0, -rows:, None]).mean())
        advance(1)
    losses = torch.stack(found).double()
    error = losses.std() / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return float(losses.mean()), float(error)
