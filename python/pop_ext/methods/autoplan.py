"""``autoplan``: find the plan that omits the most layers within a budget of quality, fit it, and write its card."""

from __future__ import annotations

import dataclasses
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from pop_ext import env_info, reference
from pop_ext.evaluation.arms import backend_of
from pop_ext.evaluation.timing import NATIVE_FULL, STOCK, plan_arm, portable_speedup, speedup, time_plans
from pop_ext.hf.forward import PrefillDeclined
from pop_ext.hf.modules import find_decoder_modules
from pop_ext.methods.calibration import check_vocabulary, longest_input, stock_evaluation, stock_model
from pop_ext.methods.candidates import Candidates, Trial, check_recall_limit
from pop_ext.methods.held_out import SplitTexts, split_texts
from pop_ext.methods.int8_trial import check_int8_possible, try_int8
from pop_ext.methods.latency import PAYS_FROM, with_min_tokens
from pop_ext.methods.plan_search import RIDGE, STAGES, UNFITTED, Candidate, search
from pop_ext.methods.quality_judge import KL, LOSS, RECALL_DROP, UNITS, Figure
from pop_ext.plans.card import CardQuality, CardSpeed, PlanCard
from pop_ext.plans.folder import PLAN_FILE, check_folder
from pop_ext.plans.norms import check_norms
from pop_ext.plans.origin import config_hash, origin_of, weights_hash
from pop_ext.plans.plan import Plan
from pop_ext.utils.callers import warn_caller
from pop_ext.utils.progress import Progress, reporting

LIMITS = {"max_loss": LOSS, "max_kl": KL, "max_recall_drop": RECALL_DROP}
"""Argument -> the figure that it limits."""
BOUNDARIES = (1, 16, 64)
"""Boundaries to try."""


@dataclass(frozen=True)
class AutoPlan:
    """Result of ``autoplan``.

    Attributes:
        plan: The plan, fitted, with its card. It omits no layer if even one exceeds the budget.
        card: The card of the plan. None if it omits no layer.
        tried: Every candidate, in the order of trial.
        chosen: The candidate that was chosen; None if the plan omits no layer. Its fit may be a cheaper one than
            ``method``, if that has the lower KL.
        recall: Share of the retrieval tasks that the model answers at full depth; None if no task was run.
        highest: Largest number of layers that was allowed.
    """

    plan: Plan
    card: PlanCard | None
    tried: tuple[Candidate, ...]
    chosen: Candidate | None
    recall: float | None
    highest: int


@torch.inference_mode(False)  # distilling needs gradients
def autoplan(
    model: Any,
    texts: Iterable[str | PathLike[str]] | SplitTexts,
    *,
    max_loss: float | None = None,
    max_kl: float | None = None,
    max_recall_drop: float | None = None,
    method: str = RIDGE,
    boundary: int | Sequence[int] = BOUNDARIES,
    choose: Callable[[int], Plan] | None = None,
    highest: int | None = None,
    tokenizer: Any = None,
    licence: str | None = None,
    trial: Trial | None = None,
    save: str | PathLike[str] | None = None,
    pays_from: Sequence[int] = PAYS_FROM,
    time_lengths: Sequence[int] = (1024,),
    int8: bool = False,
    progress: Progress = False,
) -> AutoPlan:
    """Find the plan that omits the most layers within a budget of quality.

    Each text is cut into a first part, which fits, and a last part, which judges. The judge compares every candidate
    with the model at full depth, prompt by prompt. A candidate is within the budget if each limited figure, its mean
    plus ``trial.errors`` standard errors, is at most its limit. The number of layers is found by bisection: first
    without a fit, then with a ridge fit on a quarter of the sequences. The count that is found gets the fit of
    ``method`` on all of them, which also tries a few more layers, and then more still with wider boundaries.

    The loss of exact answers to retrieval tasks is measured even without a limit on it, for the plan that was found.
    The card says why if it could not be measured.

    The held-out prompts choose among few candidates, so the figures of the chosen plan are slightly too good.
    ``pop-ext eval`` on other texts has no such bias.

    Args:
        model: Hugging Face causal language model, enabled or not. It is left unchanged.
        texts: Contents, as strings, or files, as ``Path`` objects. Use text like that of the prompts to come. Or what
            ``split_texts`` made of them; then ``licence`` and ``trial.holdout`` are not used.
        max_loss: Largest added loss of the text after a prompt, in nats a token.
        max_kl: Largest KL divergence of the next token to the model at full depth, in nats a token. It is less noisy.
        max_recall_drop: Largest loss of exact answers to retrieval tasks, as a share of the tasks. The tasks are made
            from the texts: a fact stands in a text of ``trial.tokens`` tokens, and a question about it follows.
        method: "ridge" or "distill" for the fit, or "unfitted" for none.
        boundary: Number of last prompt rows that run at full depth. Of several, the smallest is searched and fitted
            for. The others are tried with more layers, where that saves more work in a prompt of ``trial.tokens``.
        choose: Function from a number of layers to a plan that omits that many, such as the ``plan`` method of an
            importance. None omits the deepest ones. It is also called for numbers that are not tried in the end.
        highest: Largest number of layers to try. None for half of them. Memory: what ``fit`` takes for up to five
            plans, as they are fitted in one reading. And on the CPU the input of each layer that may be
            the first omitted one is kept for all judged prompts: ``highest * trial.prompts * (trial.tokens +
            trial.continuation) * hidden`` values.
        tokenizer: Hugging Face tokenizer. None for that of the checkpoint.
        licence: Licence of the texts, for the card.
        trial: Sizes of the calibration and the judgement. None for the defaults.
        save: Folder for the plan, its fit and its card, written before anything is timed, and again with the times.
            If no plan is found, an older one in the folder stays there, with a warning.
        pays_from: Prompt lengths that are timed; the shortest from which the plan is faster than the native full
            prefill becomes its ``min_tokens``. Empty leaves it at 0. Of a model without a native form, here and in the
            next, the portable backend is timed against the stock forward.
        time_lengths: Prompt lengths at which the speed-up is measured. Empty measures none.
        int8: Also say on the card whether ``int8=True`` of ``enable`` pays, at each of ``time_lengths``: its time and
            its loss beside the same native prefill without it, at full depth and under the plan.
        progress: True for a bar and a line per candidate on standard error, or a callback that takes (candidates
            judged, None).

    Returns:
        The plan, its card and all candidates.

    Raises:
        ValueError: No limit is given, an argument has a bad value, the oracle does not run the model, ``method``
            cannot fit it, it takes fewer positions than ``trial`` asks for, the tokenizer gives ids that it does not
            have, the texts are too short, ``max_recall_drop`` is less than ``trial.prompts`` tasks can show,
            or the model answers fewer tasks at full depth than it allows to lose, or it cannot have ``int8``.
        TypeError: An argument has the wrong type.
        OSError: A file cannot be read or written.
    """
    model, trial = stock_model(model), Trial() if trial is None else trial
    if not isinstance(trial, Trial):
        raise TypeError(f"trial: expected a pop_ext.Trial, got {type(trial).__name__}")
    depth = model.config.get_text_config().num_hidden_layers
    asked_limits = {"max_loss": max_loss, "max_kl": max_kl, "max_recall_drop": max_recall_drop}
    limits, highest, boundaries = check_search(model, trial, asked_limits, method, highest, boundary)
    if save is not None:
        check_folder(save)  # fail now rather than after the search
    if int8:
        check_int8_possible(model, time_lengths)
    tokenizer = tokenizer or _tokenizer_of(model)
    split = texts
    if not isinstance(split, SplitTexts):
        split = split_texts(split, tokenizer, trial.holdout, trial.window, licence)
    for ids in (*split.calibration.plain, *split.held_out.plain):
        check_vocabulary("tokenizer", ids, model, tokenized=True)
    run = Candidates(model, tokenizer, split, trial, limits, method, boundaries, choose, highest, progress)
    best = run.widen(search(run.candidate, STAGES[method], highest), STAGES[method][-1], highest)
    if best is None:
        if save is not None and Path(save, PLAN_FILE).exists():
            warn_caller(
                f"no plan within the budget was found, and {save} still holds an older one, which "
                f"pop_ext.enable(model, {os.fspath(save)!r}) would run; remove it or name another folder"
            )
        return AutoPlan(Plan(depth, ()), None, tuple(run.tried), None, run.recall, highest)
    asked = {name: limits[figure] for name, figure in LIMITS.items() if figure in limits}
    plan = _with_card(model, best, run, asked, split)
    if save is not None:
        plan.save_pretrained(save)
    if RECALL_DROP not in best.figures:
        plan = _with_recall(plan, run)
        if save is not None:
            plan.save_pretrained(save)
    plan = _timed(model, plan, pays_from, time_lengths, progress is True)
    if save is not None:
        plan.save_pretrained(save)
    if int8:
        assert plan.card is not None
        rows = try_int8(model, plan, run.held, time_lengths, trial.batch_size, progress is True)
        plan = plan.replace(card=dataclasses.replace(plan.card, int8=rows))
        if save is not None:
            plan.save_pretrained(save)
    return AutoPlan(plan, plan.card, tuple(run.tried), best, run.recall, highest)


def check_search(
    model: Any,
    trial: Trial,
    limits: dict[str, float | None],
    method: str,
    highest: int | None,
    boundary: int | Sequence[int],
) -> tuple[dict[str, float], int, list[int]]:
    """Check arguments of ``autoplan`` before anything runs.

    Returns:
        Limits by figure, the largest number of layers, and the boundaries in ascending order.

    Raises:
        ValueError: As for ``autoplan``.
        TypeError: As for ``autoplan``.
    """
    found, depth = _check_limits(limits), model.config.get_text_config().num_hidden_layers
    check_recall_limit(found, trial.prompts, trial)
    checked = found, _check_arguments(method, highest, depth), _check_boundaries(boundary, trial.tokens)
    longest = longest_input(model)
    if longest is not None and trial.window > longest:
        raise ValueError(
            f"trial.tokens: expected a context and continuation of at most the {longest} tokens that the model takes "
            f"(max_position_embeddings), got {trial.tokens} + {trial.continuation}"
        )
    _check_model(model, method, checked[1])
    return checked


def _check_model(model: Any, method: str, highest: int) -> None:
    """Check by two tokens that the oracle, which judges, runs a model, and that ``method`` can fit its layers.

    Raises:
        ValueError: It does not, or it cannot. The text names what does.
    """
    try:
        parts = find_decoder_modules(model)
    except ValueError as error:
        raise ValueError(
            f"model: expected one that the oracle, which judges a budget of quality, runs; {error}. --count or "
            "--omit choose layers without one"
        ) from error
    depth = model.config.get_text_config().num_hidden_layers
    if method != UNFITTED:
        check_norms(parts.layers, model.config.get_text_config().hidden_size)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    with stock_evaluation(model):
        reference.prefill(model, ids, Plan.last(depth, highest), boundary=1)


def _with_card(model: Any, best: Candidate, run: Candidates, asked: dict[str, float], split: SplitTexts) -> Plan:
    """Return the plan of a candidate with an origin and a card."""
    budget = ", ".join(f"{name} {value:g}" for name, value in asked.items())
    plan = best.plan
    how = "deepest" if run.choose_deepest else "chosen by the caller"
    origin = plan.origin or origin_of(model, how)
    origin = dataclasses.replace(
        origin,
        config_hash=config_hash(model.config),
        method=f"{origin.method or how}; the most within {budget}",
    )
    plan = plan.replace(origin=origin)
    quality = tuple(_card_quality(name, figure, run.recall) for name, figure in best.figures.items())
    card = PlanCard.of(plan, weights_hash=weights_hash(model), texts=split.sources, quality=quality, asked=asked)
    card = dataclasses.replace(card, notes=run.notes)
    if RECALL_DROP not in best.figures:
        card = _without_recall(card, "the run was stopped before")
    return plan.replace(card=card)


def _card_quality(name: str, figure: Figure, recall: float | None) -> CardQuality:
    """Return a figure as a card holds it; ``recall`` is the share of tasks that the model answers at full depth."""
    error = None if math.isnan(figure.error) else figure.error
    against = f"full depth, which answers {recall:.2f}" if name == RECALL_DROP else "full depth"
    return CardQuality(name, figure.value, error, UNITS[name], figure.prompts, against)


def _with_recall(plan: Plan, run: Candidates) -> Plan:
    """Return a plan with the loss of retrieval tasks on its card, or the reason why it was not measured."""
    assert plan.card is not None
    found = run.measure_recall(plan)
    if isinstance(found, str):
        return plan.replace(card=_without_recall(plan.card, found))
    row = _card_quality(RECALL_DROP, found, run.recall)
    return plan.replace(card=dataclasses.replace(plan.card, quality=(*plan.card.quality, row), not_measured={}))


def _without_recall(card: PlanCard, why: str) -> PlanCard:
    return dataclasses.replace(card, not_measured={RECALL_DROP: why})


def _timed(model: Any, plan: Plan, pays_from: Sequence[int], lengths: Sequence[int], bar: bool) -> Plan:
    """Return the plan with ``min_tokens`` and the speed-ups on its card, both timed here.

    Of a model without a native form, the portable backend is timed against the stock forward.
    """
    limit, native = longest_input(model), backend_of(model) == "native"
    pays_from = [length for length in pays_from if not limit or length <= limit]
    taken = [length for length in lengths if not limit or length <= limit]
    plan, factors = (_time_natively if native else _time_portably)(model, plan, pays_from, taken, bar)
    hardware, against = env_info.hardware(model.device, model.dtype), NATIVE_FULL if native else STOCK
    speeds = tuple(CardSpeed(length, factor, against, hardware) for length, factor in factors.items())
    assert plan.card is not None
    missing = {f"speed at {one} tokens": f"the model takes {limit}" for one in lengths if one not in taken}
    missing = {**plan.card.not_measured, **missing}
    return plan.replace(card=dataclasses.replace(plan.card, speed=speeds, not_measured=missing))


def _time_natively(
    model: Any, plan: Plan, pays_from: Sequence[int], lengths: Sequence[int], bar: bool
) -> tuple[Plan, dict[int, float]]:
    """Return the plan with ``min_tokens``, and length -> speed-up over the native full prefill."""
    plan = with_min_tokens(model, plan, pays_from, bar)
    times = time_plans(model, [plan], lengths, progress=bar)
    factors = {length: speedup(times, plan_arm(plan.omit, plan.boundary), length) for length in lengths}
    return plan, {length: factor for length, factor in factors.items() if factor is not None}


def _time_portably(
    model: Any, plan: Plan, pays_from: Sequence[int], lengths: Sequence[int], bar: bool
) -> tuple[Plan, dict[int, float]]:
    """Return the plan with ``min_tokens``, and length -> speed-up over the stock forward. A failure is on the card."""
    found: dict[int, float] = {}
    pays: int | None = None
    try:
        with reporting(bar, "timing", len({*pays_from, *lengths})) as advance:

            def factor_at(length: int) -> float:
                if length not in found:
                    found[length] = portable_speedup(model, plan, length)
                    advance(1)
                return found[length]

            for length in sorted(set(pays_from), reverse=True):
                if factor_at(length) <= 1:
                    break
                pays = length
            factors = {length: factor_at(length) for length in lengths}
    except (ValueError, PrefillDeclined) as error:  # nothing that was found before may be lost
        assert plan.card is not None
        missing = {**plan.card.not_measured, "speed": f"no backend but the reference runs the model ({error})"}
        return plan.replace(card=dataclasses.replace(plan.card, not_measured=missing)), {}
    if pays_from:
        plan = plan.replace(min_tokens=max(pays_from) + 1 if pays is None else pays)
    return plan, factors


def _check_limits(given: dict[str, float | None]) -> dict[str, float]:
    """Return the limits by figure.

    Raises:
        TypeError: A limit is no number.
        ValueError: None is given, or one is not above 0.
    """
    limits: dict[str, float] = {}
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        if not value > 0:
            raise ValueError(f"{name}: expected more than 0, got {value!r}")
        limits[LIMITS[name]] = float(value)
    if not limits:
        raise ValueError(f"{', '.join(given)}: expected at least one of them, got none")
    return limits


def _check_arguments(method: str, highest: int | None, depth: int) -> int:
    """Return the largest number of layers to try, after a check of two arguments."""
    if method not in STAGES:
        raise ValueError(f"method: expected one of {', '.join(STAGES)}, got {reprlib.repr(method)}")
    if highest is None:
        return max(1, depth // 2)
    if isinstance(highest, bool) or not isinstance(highest, int) or not 1 <= highest < depth:
        raise ValueError(f"highest: expected an integer in 1...{depth - 1}, got {highest!r}")
    return highest


def _check_boundaries(boundary: int | Sequence[int], tokens: int) -> list[int]:
    """Return the boundaries in ascending order."""
    given = [boundary] if isinstance(boundary, int) else boundary
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise TypeError(f"boundary: expected an int or a sequence of ints, got {type(boundary).__name__}")
    if not given or any(isinstance(rows, bool) or not isinstance(rows, int) or rows < 1 for rows in given):
        raise ValueError(f"boundary: expected an int >= 1, or a sequence of them, got {boundary!r}")
    largest = min(given) if given is BOUNDARIES else max(given)  # of the default, those that fit are tried
    if largest >= tokens:
        raise ValueError(f"boundary: expected fewer rows than the {tokens} of trial.tokens, got {boundary!r}")
    return sorted({rows for rows in given if rows < tokens})


def _tokenizer_of(model: Any) -> Any:
    from transformers import AutoTokenizer

    name = getattr(model.config, "_name_or_path", None)
    if not name:
        raise ValueError("tokenizer: expected one for a model that was not loaded from a checkpoint, got none")
    return AutoTokenizer.from_pretrained(name)
