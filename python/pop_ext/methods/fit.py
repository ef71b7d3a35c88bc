"""Fit K/V projections for the layers that a plan omits: least squares, then training (docs/fitting.md)."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from pop_ext import reference
from pop_ext.hf.modules import find_decoder_modules
from pop_ext.methods.calibration import Batches, check_batches, count_sequences, stock_evaluation, stock_model
from pop_ext.methods.distill import Training, distill
from pop_ext.methods.fit_arguments import Task, check_held, check_lambdas, check_tasks, check_training, hold_out_tasks
from pop_ext.methods.fit_moments import HOLD_EVERY, MomentsReader
from pop_ext.methods.ridge import RunMoments, RunSolution
from pop_ext.methods.student import Example, Student, count_continuation
from pop_ext.plans.origin import origin_of
from pop_ext.plans.plan import Plan
from pop_ext.plans.projections import FitReport, Projections, sample_weights
from pop_ext.reference.checks import check_plan
from pop_ext.utils.progress import Progress, reporting

WEIGHTINGS = ("attention", "uniform")
"""Ways to weigh calibration rows."""


STEPS, LEARNING_RATE = 120, 3e-4
"""Default steps and learning rate of "distill"."""


def fit(
    model: Any,
    plan: Plan,
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
) -> Plan:
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
        plan: Plan that omits at least one layer. Projections that it already has are ignored.
        batches: Iterable of input_ids, int [batch, T], without padding, read once. Each batch takes one forward, or
            two if the plan has several runs. Until a sequence is held out, the last of each batch takes its own.
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
        resume: File that takes the state of the training at each judgement. A stopped training goes on from it.
        progress: True for a progress bar, or a callback that takes (steps done, their number or None). A step is a
            sequence read, a held-out sequence scored for one lambda, or a training step.

    Returns:
        The plan with ``projections`` in the model's dtype, and an origin that states how they were made.

    Raises:
        ValueError: An argument has a bad value. The plan omits nothing. There is no sequence, none to hold out, or
            none longer than the boundary. Hidden states, K, V or a loss are not finite. The model's K and V are no
            plain projections, or its eager attention returns no weights. The file of ``resume`` is of another fit.
        TypeError: An argument has the wrong type.

    Source: docs/fitting.md; POP (arXiv 2602.03295) for the independent KV projection.
    """
    model, ridges = stock_model(model), check_lambdas(lambdas)
    plan = _check_plan(plan, model, weighting)
    training = check_training(method, steps, learning_rate, seed, resume)
    pairs = check_tasks(tasks, model, plan)
    held: list[Tensor] = []
    if holdout is not None:
        held = [ids for batch in check_batches(holdout, model, least=4) for ids in batch.split(1)]
    holds = len(ridges) > 1 or training is not None
    split = holdout is None and holds
    kept, spare = (pairs, []) if training is None else hold_out_tasks(pairs)
    total = _count_steps(batches, len(held), len(ridges), split)
    total = None if total is None else total + len(kept) + (0 if training is None else training.steps)
    with stock_evaluation(model), torch.no_grad(), reporting(progress, "fit", total) as advance:
        student = None if training is None else Student(model, plan)
        reader = MomentsReader(model, plan, held if split else None, weighting, advance, student)
        reader.read(batches)
        reader.read_tasks(kept)
        layers = find_decoder_modules(model).layers
        samples = {layer: sample_weights(layers[layer]) for layer in plan.omit}
        losses: list[tuple[float, float, float]] = []
        if holds:
            held = check_held(held, plan, reader.sequences - len(kept), "lambda" if len(ridges) > 1 else "steps")
        if len(ridges) > 1:
            for ridge in ridges:
                losses.append((ridge, *_held_out_loss(model, _solve(reader, ridge, samples)[0], held, advance)))
        best = _best_ridge(losses) if losses else ridges[0]
        solved = _solve(reader, best, samples)
        plan = _with_report(model, *solved, reader.moments, losses, len(held) if holds else 0, len(kept))
        if training is None or student is None:
            return plan
        judged = [student.example(ids) for ids in held]
        judged += [student.example(torch.cat(pair)[None], len(pair[1])) for pair in spare]
        say = (lambda text: print(text, file=sys.stderr, flush=True)) if progress is True else (lambda _: None)
        return _distilled(model, plan, reader.examples, judged, training, advance, say)


def _check_plan(plan: Plan, model: Any, weighting: str) -> Plan:
    """Check plan and weighting, and return the plan without projections."""
    layers = find_decoder_modules(model).layers
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a pop_ext.Plan, got {type(plan).__name__}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    plan = plan.replace(projections=None)
    check_plan(plan, layers, model.config)
    if not plan.omit:
        raise ValueError("plan: expected at least one omitted layer to fit, got none")
    return plan


def _distilled(
    model: Any,
    plan: Plan,
    examples: list[Example],
    held: list[Example],
    training: Training,
    advance: Callable[[int], None],
    say: Callable[[str], None],
) -> Plan:
    """Return a fitted plan whose matrices were trained further; arguments as for ``distill``."""
    assert plan.projections is not None
    assert plan.origin is not None
    start, dtype = plan.projections, _dtype(model)
    examples = [one for one in examples if one.answer or one.ids.shape[1] - one.rows > plan.boundary]
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
        ridges: Number of ridges.
        split: True if sequences of the batches are held out.

    Returns:
        The number, or None if the batches can only be counted by reading them.
    """
    count = count_sequences(batches)
    if count is None:
        return None
    inner = max(count // HOLD_EVERY, int(count > 1)) if split else 0
    return count - inner + ((held or inner) * ridges if ridges > 1 else 0)


def _solve(reader: MomentsReader, ridge: float, samples: dict[int, Tensor]) -> tuple[Plan, list[RunSolution]]:
    """Solve every run with one ridge.

    Args:
        reader: Moments of every run.
        ridge: Lambda.
        samples: Layer -> ``sample_weights`` of it.

    Returns:
        The plan with its projections in the model's dtype, and the solution of each run.
    """
    solutions, dtype = [run.solve(ridge) for run in reader.moments], _dtype(reader.model)
    matrices = {
        layer: (run.layers[layer].original.double() + change).to(dtype).cpu().contiguous()
        for run, solution in zip(reader.moments, solutions, strict=True)
        for layer, change in solution.changes.items()
    }
    for layer, matrix in matrices.items():
        if not matrix.isfinite().all():
            raise ValueError(
                f"lambdas: expected a ridge whose projections {str(dtype).removeprefix('torch.')} can hold, got "
                f"{ridge:g} (layer {layer})"
            )
    weighting = "attention" if reader.by_attention else "uniform"
    report = FitReport(ridge, reader.sequences, reader.moments[0].rows, weighting=weighting)
    return reader.plan.replace(projections=Projections(matrices, samples, report)), solutions


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


def _held_out_loss(model: Any, plan: Plan, held: list[Tensor], advance: Callable[[int], None]) -> tuple[float, float]:
    """Score a plan on the continuations of held-out sequences [1, T].

    Returns:
        The mean loss in nats per token, and its standard error.
    """
    found = []
    for ids in held:
        rows = count_continuation(ids)
        boundary = plan.boundary - 1 + rows
        logits, _ = reference.prefill(model, ids[:, :-1], plan, rows, boundary=boundary)
        log_p = logits[0].float().log_softmax(-1)
        found.append(-log_p.gather(-1, ids[0, -rows:, None]).mean())
        advance(1)
    losses = torch.stack(found).double()
    error = losses.std() / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return float(losses.mean()), float(error)
