"""``pop_ext.fit``: least-squares K/V projections for the layers that a plan omits (docs/fitting.md)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pop_ext import reference
from pop_ext.hf.modules import find_parts
from pop_ext.methods.calibration import Batches, checked, count_sequences, stock_model, undisturbed
from pop_ext.methods.fit_moments import HOLD_EVERY, MomentsReader, count_continuation
from pop_ext.methods.ridge import RunMoments, RunSolution
from pop_ext.plans.origin import origin_of
from pop_ext.plans.plan import Plan
from pop_ext.plans.projections import FitReport, Projections, sample_weights
from pop_ext.reference.checks import check_plan
from pop_ext.utils.progress import Progress, reporting

LAMBDAS = (0.01, 0.1, 1.0, 10.0, math.inf)
"""Ridges that are tried unless told otherwise; inf: the original projections."""

WEIGHTINGS = ("attention", "uniform")


def fit(
    model: Any,
    plan: Plan,
    batches: Batches,
    *,
    holdout: Batches | None = None,
    lambdas: Sequence[float] | None = None,
    weighting: str = "attention",
    progress: Progress = False,
) -> Plan:
    """The plan with K/V projections fitted for its omitted layers: a better first token at the same cost.

    An omitted layer's context rows project K and V from the hidden state ``h`` of the last retained layer, which is
    not what its weights were trained on. For each omitted layer this solves a ridge regression, on calibration
    prompts, from the normalised ``h`` of the pruned model to the K (before its norm and RoPE) and V that the full
    model has there; it pulls towards the layer's own projection. A row counts as much as later rows attend to it. All
    layers of a run share one Gram matrix. Lambda is chosen by the next-token loss of held-out prompts' continuations
    after the plan's boundary.

    Args:
        model: a Hugging Face decoder that projects K and V apart, enabled or not; float32, bfloat16 or float16, on
            any device. As before afterwards.
        plan: omits at least one layer; projections that it has are not looked at.
        batches: an iterable of input_ids, int [batch, T], without padding; read once. One forward a batch, two if
            the plan has several runs; until a sequence is held out each batch's last has its own.
        holdout: likewise, of sequences that are not in ``batches``. None: every eighth sequence of the batches is
            held out, of fewer than eight the last one, and not fitted on.
        lambdas: ridges to choose from, relative to the mean diagonal of the Gram matrix, > 0; inf stands for the
            original projections. None: ``LAMBDAS``. A single one is taken as it is, and nothing held out.
        weighting: "attention": each row counts by the attention that the sequence's last tokens (``CONTINUATION``) pay
            to it in the run's layers of the full model, which runs eager for that: heads * T^2 attention weights of
            one layer at a time. "uniform": all rows count alike.
        progress: True for a bar, or a callback told (steps done, all of them or None): sequences read, and held-out
            ones scored, once a lambda.

    Returns:
        the plan, with ``projections`` in the model's dtype and an origin that says how they were made.

    Raises:
        TypeError, ValueError: a bad argument, named; a plan that omits nothing; no sequence, none to hold out, or
            none longer than the boundary; hidden states, K or V that are not finite; a model whose K and V are no
            plain projections, or whose eager attention hands out no weights. The model is as before.

    Source: docs/fitting.md; POP (arXiv 2602.03295) for the independent KV projection.
    """
    model, ridges = stock_model(model), _check_lambdas(lambdas)
    layers = find_parts(model).layers
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a pop_ext.Plan, got {type(plan).__name__}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    plan = plan.replace(projections=None)
    check_plan(plan, layers, model.config)
    if not plan.omit:
        raise ValueError("plan: expected at least one omitted layer to fit, got none")
    held: list[Tensor] = []
    if holdout is not None:
        held = [ids for batch in checked(holdout, model, least=4) for ids in batch.split(1)]
    chooses = len(ridges) > 1
    split = holdout is None and chooses
    count = count_sequences(batches)
    inner = max(count // HOLD_EVERY, int(count > 1)) if split and count is not None else 0
    total = None if count is None else count - inner + ((len(held) or inner) * len(ridges) if chooses else 0)
    with undisturbed(model), torch.no_grad(), reporting(progress, "fit", total) as advance:
        reader = MomentsReader(model, plan, held if split else None, weighting, advance)
        reader.read(batches)
        samples = {layer: sample_weights(layers[layer]) for layer in plan.omit}
        losses: list[tuple[float, float, float]] = []
        if chooses:
            held = _check_held(held, plan, reader.sequences)
            for ridge in ridges:
                losses.append((ridge, *_held_out_loss(model, _solved(reader, ridge, samples)[0], held, advance)))
        best = _best(losses) if losses else ridges[0]
        solved = _solved(reader, best, samples)
        return _finished(model, *solved, reader.moments, losses, len(held) if losses else 0)


def _solved(reader: MomentsReader, ridge: float, samples: dict[int, Tensor]) -> tuple[Plan, list[RunSolution]]:
    """The plan with the projections of one ridge, in the model's dtype."""
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


def _best(losses: list[tuple[float, float, float]]) -> float:
    """The ridge of the lowest loss."""
    finite = [row for row in losses if math.isfinite(row[1])]
    if not finite:
        raise ValueError(f"holdout: expected finite losses, got {', '.join(f'{loss:g}' for _, loss, _ in losses)}")
    return min(finite, key=lambda row: row[1])[0]


def _finished(
    model: Any,
    plan: Plan,
    solutions: list[RunSolution],
    moments: list[RunMoments],
    losses: list[tuple[float, float, float]],
    held: int,
) -> Plan:
    """The fitted plan, with what is to be known of how it was made."""
    assert plan.projections is not None
    report = dataclasses.replace(
        plan.projections.report,
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
        origin, config_hash=found.config_hash, fit=report.method(), fit_samples=report.sequences
    )
    return plan.replace(origin=origin, projections=dataclasses.replace(plan.projections, report=report))


def _dtype(model: Any) -> torch.dtype:
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


# Choosing lambda


def _held_out_loss(model: Any, plan: Plan, held: list[Tensor], advance: Callable[[int], None]) -> tuple[float, float]:
    """Mean loss in nats a token of the sequences' continuations under a plan, and its standard error."""
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


def _check_held(held: list[Tensor], plan: Plan, fitted: int) -> list[Tensor]:
    """Those sequences that have context rows."""
    if not held:
        raise ValueError(
            f"holdout: expected sequences to choose lambda by (or a single lambda), got none of {fitted} sequences: "
            f"without a holdout every {HOLD_EVERY}th of the batches' is taken, of fewer the last but never the only one"
        )
    longer = [ids for ids in held if ids.shape[1] - 1 > plan.boundary - 1 + count_continuation(ids)]
    if not longer:
        longest = max(ids.shape[1] for ids in held)
        raise ValueError(
            f"holdout: expected sequences longer than the boundary {plan.boundary} and a continuation, got at most "
            f"{longest} tokens"
        )
    return longer


def _check_lambdas(lambdas: Sequence[float] | None) -> tuple[float, ...]:
    if lambdas is None:
        return LAMBDAS
    if isinstance(lambdas, (str, bytes)) or not isinstance(lambdas, Sequence):
        raise TypeError(f"lambdas: expected a sequence of numbers, got {type(lambdas).__name__}")
    for value in lambdas:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"lambdas: expected numbers, got {type(value).__name__} {value!r}")
        if not value > 0:
            raise ValueError(f"lambdas: expected numbers > 0, got {value!r}")
    if not lambdas:
        raise ValueError("lambdas: expected at least one number, got none")
    return tuple(float(value) for value in lambdas)
