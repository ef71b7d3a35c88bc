"""Fit K/V projections for the layers that a plan omits: least squares, then training (docs/fitting.md)."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor

from pop_ext.hf.modules import find_decoder_modules
from pop_ext.methods.calibration import Batches, check_batches, count_sequences, stock_model
from pop_ext.methods.defaults import LEARNING_RATE, STEPS
from pop_ext.methods.distill import Training
from pop_ext.methods.fit_arguments import Task, check_lambdas, check_tasks, check_training
from pop_ext.methods.fitting import Fitting
from pop_ext.plans.plan import Plan
from pop_ext.reference.checks import check_plan
from pop_ext.utils.progress import Progress, reporting

WEIGHTINGS = ("attention", "uniform")
"""Ways to weigh calibration rows."""


Plans = TypeVar("Plans", Plan, Sequence[Plan])
"""A plan, or several."""


@torch.inference_mode(False)  # training needs gradients
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
    model = stock_model(model)
    if resume is not None and not isinstance(plan, Plan):
        raise ValueError(f"resume: expected None with several plans, which would share one file, got {str(resume)!r}")
    training = check_training(method, steps, learning_rate, seed, resume)
    how: dict[str, Any] = {"tasks": tasks, "holdout": holdout, "lambdas": lambdas, "weighting": weighting}
    fitting = new_fitting(model, _as_plans(plan), training, **how)
    with reporting(progress, "fit", _count_steps(batches, fitting)) as advance:
        fitting.read(batches, advance)
        fitted = []
        for number in range(len(fitting.plans)):
            say = _speaker(progress, "" if isinstance(plan, Plan) else f"plan {number + 1} of {len(fitting.plans)}, ")
            fitted.append(fitting.fitted(number, advance, say))
            fitting.forget(number)
    return fitted[0] if isinstance(plan, Plan) else fitted  # type: ignore[return-value]


def _speaker(progress: Progress, prefix: str) -> Callable[[str], None]:
    """Return what prints a line about the training, after ``prefix``, if a progress bar is asked for."""
    if progress is not True:
        return lambda _: None
    return lambda text: print(prefix + text, file=sys.stderr, flush=True)


def new_fitting(
    model: Any,
    plans: dict[str, Any],
    training: Training | None,
    *,
    tasks: Sequence[Task] = (),
    holdout: Batches | None = None,
    lambdas: Sequence[float] | None = None,
    weighting: str = "attention",
) -> Fitting:
    """Check the arguments of ``fit`` and return the fitting, which has read nothing yet.

    Args:
        model: Stock model.
        plans: Plans by their name in errors.
        training: Settings of a training after the ridge; None for none.
        tasks: As for ``fit``, like all that follow.

    Raises:
        ValueError: As for ``fit``.
        TypeError: As for ``fit``.
    """
    ridges = check_lambdas(lambdas)
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {reprlib.repr(weighting)}")
    checked = [_check_plan(name, plan, model) for name, plan in plans.items()]
    pairs = check_tasks(tasks, model, max(plan.boundary for plan in checked))
    held: list[Tensor] | None = None
    if holdout is not None:
        held = [ids for batch in check_batches(holdout, model, least=4) for ids in batch.split(1)]
    return Fitting(model, checked, pairs, held, ridges, weighting, training)


def _as_plans(plan: Any) -> dict[str, Any]:
    """Return a plan, or several, by their name in errors."""
    if isinstance(plan, Plan):
        return {"plan": plan}
    if isinstance(plan, (str, bytes)) or not isinstance(plan, Sequence):
        raise TypeError(f"plan: expected a pop_ext.Plan or a sequence of them, got {type(plan).__name__}")
    if not plan:
        raise ValueError("plan: expected at least one plan, got none")
    return {f"plan[{number}]": one for number, one in enumerate(plan)}


def _check_plan(name: str, plan: Any, model: Any) -> Plan:
    """Check a plan, called ``name`` in errors, and return it without projections."""
    if not isinstance(plan, Plan):
        raise TypeError(f"{name}: expected a pop_ext.Plan, got {type(plan).__name__}")
    plan = plan.replace(projections=None)
    check_plan(plan, find_decoder_modules(model).layers, model.config)
    if not plan.omit:
        raise ValueError(f"{name}: expected at least one omitted layer to fit, got none")
    return plan


def _count_steps(batches: Batches, fitting: Fitting) -> int | None:
    """Return the number of progress steps: sequences and tasks to read, sequences to score, and training steps.

    Returns:
        The number, or None if the batches can only be counted by reading them.
    """
    count = count_sequences(batches)
    if count is None:
        return None
    reads = fitting.reads(count)
    judges = count + len(fitting.tasks) - reads if fitting.held is None else len(fitting.held)
    each = judges * len(fitting.ridges) if len(fitting.ridges) > 1 else 0
    each += 0 if fitting.training is None else fitting.training.steps
    return reads + each * len(fitting.plans)
