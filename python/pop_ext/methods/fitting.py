"""Fits of several plans from one reading of calibration texts: least squares, then training (docs/notes/fitting.md)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pop_ext.hf.modules import find_decoder_modules
from pop_ext.methods.calibration import Batches, stock_evaluation
from pop_ext.methods.distill import Training, distill
from pop_ext.methods.fit_arguments import Task, check_held, hold_out_tasks
from pop_ext.methods.fit_moments import MomentsReader, PlanReading, held_out_of
from pop_ext.methods.ridge import RunMoments, RunSolution
from pop_ext.methods.student import Example, Student, record_examples
from pop_ext.plans.origin import origin_of
from pop_ext.plans.plan import Plan
from pop_ext.plans.projections import FitReport, Projections, sample_weights


class Fitting:
    """Calibration texts that are read once, and the fits of several plans to them, each made when it is asked for.

    Args:
        model: Stock Hugging Face model. It is left unchanged.
        plans: Plans without projections that omit at least one layer.
        tasks: Tasks; with a training some are held out.
        held: Held-out sequences [1, T]; None to hold out some of the batches where a fit needs them.
        ridges: Lambdas to choose from.
        weighting: "attention" or "uniform", as for ``pop_ext.fit``.
        training: Settings of a training after the ridge; None for none.

    Attributes:
        plans: The plans.
        tasks: The tasks that are read.
        ridges: The lambdas.
        training: The settings.
        held: The held-out sequences that were given, or None.
        holds: True if fits need held-out sequences.
    """

    def __init__(
        self,
        model: Any,
        plans: Sequence[Plan],
        tasks: list[Task],
        held: list[Tensor] | None,
        ridges: Sequence[float],
        weighting: str,
        training: Training | None,
    ) -> None:
        self.model, self.plans, self.ridges, self.training = model, plans, ridges, training
        self.holds = len(ridges) > 1 or training is not None
        self.tasks, self._spare = (tasks, []) if training is None else hold_out_tasks(tasks)
        self.held, self._weighting = held, weighting

    def reads(self, sequences: int) -> int:
        """Return how many steps ``read`` reports for so many sequences: those not held out, and the tasks."""
        held = len(held_out_of(sequences)) if self.holds and self.held is None else 0
        return sequences - held + len(self.tasks)

    def read(self, batches: Batches, advance: Callable[[int], None]) -> None:
        """Read all batches and the tasks.

        Args:
            batches: As for ``pop_ext.fit``.
            advance: Called with the number of sequences just read.

        Raises:
            ValueError: As for ``MomentsReader.read``, or there is no held-out sequence longer than a boundary.
            TypeError: As for ``MomentsReader.read``.
        """
        with stock_evaluation(self.model), torch.no_grad():
            held: list[Tensor] = [] if self.held is None else self.held
            split = held if self.held is None and self.holds else None
            train = self.training is not None
            self._reader = MomentsReader(self.model, self.plans, split, self._weighting, advance, train)
            self._reader.read(batches)
            count = self._reader.sequences
            self._reader.read_tasks(self.tasks)
            chosen = "lambda" if len(self.ridges) > 1 else "steps"
            # All of them now, so that a bad boundary does not cost the fits of other plans.
            longer = [check_held(held, plan.boundary, count, chosen) if self.holds else [] for plan in self.plans]
            for reading in self._reader.readings if self.training is not None else ():
                _check_longer(reading)
            self._judges = self._record(held, longer)

    def _record(self, held: list[Tensor], longer: list[list[Tensor]]) -> list[list[Example]]:
        """Return the states of what judges each plan, from one forward per sequence and task.

        Args:
            held: Held-out sequences.
            longer: Held-out sequences that are long enough for each plan.
        """
        students = [Student(self.model, plan) for plan in self.plans]
        recorded: list[list[Example]] = [[] for _ in students]
        for ids in held:
            wanted = [number for number, judges in enumerate(longer) if any(ids is one for one in judges)]
            found = record_examples(self.model, [students[number] for number in wanted], ids)
            for number, example in zip(wanted, found, strict=True):
                recorded[number].append(example)
        for prompt, answer in self._spare:
            found = record_examples(self.model, students, torch.cat([prompt, answer])[None], len(answer))
            for examples, example in zip(recorded, found, strict=True):
                examples.append(example)
        return recorded

    def fitted(self, number: int, advance: Callable[[int], None], say: Callable[[str], None]) -> Plan:
        """Return the fit of the plan of this number.

        Args:
            number: Place in ``plans``.
            advance: Called with the held-out sequences just scored, and the training steps just done.
            say: Called with a line for each judgement of the training.

        Raises:
            ValueError: A loss, or a matrix in the model's dtype, is not finite. No sequence is longer than the
                boundary. The file of the training's ``resume`` is of another fit.
        """
        reading, held = self._reader.readings[number], self._judges[number]
        texts = [example for example in held if not example.answer]
        with stock_evaluation(self.model), torch.no_grad():
            solved = _best_solution(self._reader, reading, self.ridges, texts, len(self.tasks), advance)
            if self.training is None:
                return solved
            return _distilled(self.model, solved, reading, held, self.training, advance, say)

    def forget(self, number: int) -> None:
        """Free what was read for the plan of this number."""
        reading = self._reader.readings[number]
        reading.examples.clear()
        reading.moments.clear()
        self._judges[number].clear()


def _best_solution(
    reader: MomentsReader,
    reading: PlanReading,
    ridges: Sequence[float],
    held: list[Example],
    tasks: int,
    advance: Callable[[int], None],
) -> Plan:
    """Return a plan with the ridge solution of the lowest held-out loss, with a complete report and origin.

    Args:
        reader: What was read for all plans.
        reading: What was read for this plan.
        ridges: Lambdas to choose from.
        held: States of the held-out sequences; none is used for a single lambda.
        tasks: Number of tasks that were read.
        advance: Called with the sequences just scored.
    """
    layers = find_decoder_modules(reader.model).layers
    samples = {layer: sample_weights(layers[layer]) for layer in reading.plan.omit}
    losses: list[tuple[float, float, float]] = []
    if len(ridges) > 1:
        student = Student(reader.model, reading.plan)
        for ridge in ridges:
            solved, _ = _solve(reader, reading, ridge, samples)
            losses.append((ridge, *_held_out_loss(student, solved, held, advance)))
    best = _best_ridge(losses) if losses else ridges[0]
    return _with_report(
        reader.model, *_solve(reader, reading, best, samples), reading.moments, losses, len(held), tasks
    )


def _distilled(
    model: Any,
    plan: Plan,
    reading: PlanReading,
    held: list[Example],
    training: Training,
    advance: Callable[[int], None],
    say: Callable[[str], None],
) -> Plan:
    """Return a fitted plan whose matrices were trained further.

    Args:
        model: Stock model inside ``stock_evaluation``.
        plan: The plan with its ridge.
        reading: States of the sequences to train on.
        held: States of the held-out sequences and tasks.
        training: As for ``distill``, like the others.
        advance: Called with the steps just done.
        say: Called with a line for each judgement.
    """
    assert plan.projections is not None
    assert plan.origin is not None
    start, dtype = plan.projections, _dtype(model)
    examples = _check_longer(reading)
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


def _check_longer(reading: PlanReading) -> list[Example]:
    """Return the sequences that have a context row before the boundary rows and the continuation, and all tasks."""
    boundary = reading.plan.boundary
    examples = [one for one in reading.examples if one.answer or one.ids.shape[1] - one.rows > boundary]
    if not examples:
        raise ValueError(f"batches: expected sequences longer than the boundary {boundary} and a continuation")
    return examples


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


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
