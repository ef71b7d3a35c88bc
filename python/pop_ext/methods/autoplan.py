"""``autoplan``: find the plan that omits the most layers within a budget of quality, fit it, and write its card."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from pop_ext import env_info
from pop_ext.evaluation.arms import backend_of
from pop_ext.evaluation.prompts import Pair, Texts, calibration_batches, text_sets
from pop_ext.evaluation.retrieval import retrieval_pairs
from pop_ext.evaluation.retrieval_templates import EVALUATION, TRAINING
from pop_ext.evaluation.timing import NATIVE_FULL, plan_arm, speedup, time_plans
from pop_ext.methods.calibration import stock_model
from pop_ext.methods.fit import fit
from pop_ext.methods.held_out import SplitTexts, split_texts
from pop_ext.methods.latency import PAYS_FROM, with_min_tokens
from pop_ext.methods.plan_search import DISTILL, QUICK, RIDGE, STAGES, UNFITTED, Candidate, search
from pop_ext.methods.quality_judge import KL, LOSS, RECALL_DROP, UNITS, Figure, QualityJudge, within
from pop_ext.plans.card import CardQuality, CardSpeed, PlanCard
from pop_ext.plans.folder import prepare_folder
from pop_ext.plans.origin import config_hash, origin_of, weights_hash
from pop_ext.plans.plan import Plan
from pop_ext.utils.progress import Progress

LIMITS = {"max_loss": LOSS, "max_kl": KL, "max_recall_drop": RECALL_DROP}
"""Argument -> the figure that it limits."""
QUICK_SHARE, QUICK_LAMBDA = 4, 0.1
"""The quick ridge reads each such sequence and fits with this lambda."""


@dataclass(frozen=True)
class AutoPlan:
    """Result of ``autoplan``.

    Attributes:
        plan: The plan, fitted, with its card. It omits no layer if even one exceeds the budget.
        card: The card of the plan. None if it omits no layer.
        tried: Every candidate, in the order of trial.
        recall: Share of the retrieval tasks that the model answers at full depth; None if no task was run.
    """

    plan: Plan
    card: PlanCard | None
    tried: tuple[Candidate, ...]
    recall: float | None


@dataclass(frozen=True)
class Trial:
    """How candidates are fitted and judged.

    Attributes:
        tokens: Context of each held-out prompt.
        continuation: Tokens after it whose loss is measured.
        prompts: Held-out prompts, at most, and retrieval tasks.
        samples: Calibration sequences of ``tokens`` + ``continuation`` tokens, at most.
        holdout: Share of each text that is held out.
        errors: Standard errors that are added to a mean before it is compared with its limit. With 1, a plan whose true
            cost equals the limit passes about one time in six.
        batch_size: Prompts per forward.
        seed: Seed of the retrieval tasks.

    Raises:
        ValueError: A member has a bad value.
    """

    tokens: int = 512
    continuation: int = 64
    prompts: int = 48
    samples: int = 112
    holdout: float = 0.25
    errors: float = 1.0
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"tokens": 2, "continuation": 1, "prompts": 1, "samples": 2, "batch_size": 1, "seed": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ValueError(f"{name}: expected an int >= {smallest}, got {value!r}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout: expected a number between 0 and 1, got {self.holdout!r}")
        if not 0 <= self.errors < math.inf:
            raise ValueError(f"errors: expected a number >= 0, got {self.errors!r}")

    @property
    def window(self) -> int:
        """Tokens of a context and its continuation."""
        return self.tokens + self.continuation


def autoplan(
    model: Any,
    texts: Iterable[str | PathLike[str]] | SplitTexts,
    *,
    max_loss: float | None = None,
    max_kl: float | None = None,
    max_recall_drop: float | None = None,
    method: str = RIDGE,
    boundary: int = 1,
    choose: Callable[[int], Plan] | None = None,
    highest: int | None = None,
    tokenizer: Any = None,
    licence: str | None = None,
    trial: Trial | None = None,
    save: str | PathLike[str] | None = None,
    pays_from: Sequence[int] = PAYS_FROM,
    time_lengths: Sequence[int] = (1024,),
    progress: Progress = False,
) -> AutoPlan:
    """Find the plan that omits the most layers within a budget of quality.

    Each text is cut into a first part, which fits, and a last part, which judges. The judge compares every candidate
    with the model at full depth, prompt by prompt. A candidate is within the budget if each limited figure, its mean
    plus ``trial.errors`` standard errors, is at most its limit. The number of layers is found by bisection: first
    without a fit, then with a ridge fit on a quarter of the sequences. The count that is found gets the fit of
    ``method`` on all of them, which also tries a few more layers.

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
        boundary: Number of last prompt rows that run at full depth.
        choose: Function from a number of layers to a plan that omits that many, such as the ``plan`` method of an
            importance. None omits the deepest ones.
        highest: Largest number of layers to try. None for half of them.
        tokenizer: Hugging Face tokenizer. None for that of the checkpoint.
        licence: Licence of the texts, for the card.
        trial: Sizes of the calibration and the judgement. None for the defaults.
        save: Folder for the plan, its fit and its card, written before anything is timed, and again with the times.
        pays_from: Prompt lengths that are timed; the shortest from which the plan is faster than the native full
            prefill becomes its ``min_tokens``. Empty leaves it at 0.
        time_lengths: Prompt lengths at which the speed-up is measured. Empty measures none.
        progress: True for a bar and a line per candidate on standard error, or a callback that takes (candidates
            judged, None).

    Returns:
        The plan, its card and all candidates.

    Raises:
        ValueError: No limit is given, an argument has a bad value, the texts are too short, ``max_recall_drop`` is
            less than ``trial.prompts`` tasks can show, or the model answers fewer tasks at full depth than it allows
            to lose.
        TypeError: An argument has the wrong type.
        OSError: A file cannot be read or written.
    """
    model, trial = stock_model(model), Trial() if trial is None else trial
    if not isinstance(trial, Trial):
        raise TypeError(f"trial: expected a pop_ext.Trial, got {type(trial).__name__}")
    depth = model.config.get_text_config().num_hidden_layers
    limits = _check_limits({"max_loss": max_loss, "max_kl": max_kl, "max_recall_drop": max_recall_drop})
    _check_recall_limit(limits, trial.prompts, trial)
    highest = _check_arguments(method, highest, depth)
    if save is not None:
        prepare_folder(save)  # fail now rather than after the search
    tokenizer = tokenizer or _tokenizer_of(model)
    split = texts
    if not isinstance(split, SplitTexts):
        split = split_texts(split, tokenizer, trial.holdout, trial.window, licence)
    run = _Run(model, tokenizer, split, trial, limits, boundary, choose, highest, progress)
    best = search(run.candidate, STAGES[method], highest)
    if best is None:
        return AutoPlan(Plan(depth, ()), None, tuple(run.tried), run.recall)
    asked = {name: limits[figure] for name, figure in LIMITS.items() if figure in limits}
    plan = _with_card(model, best, run, asked, split)
    if save is not None:
        plan.save_pretrained(save)
    if RECALL_DROP not in best.figures:
        plan = run.with_recall(plan)
        if save is not None:
            plan.save_pretrained(save)
    if backend_of(model) == "native":
        plan = _timed(model, plan, pays_from, time_lengths, progress is True)
        if save is not None:
            plan.save_pretrained(save)
    return AutoPlan(plan, plan.card, tuple(run.tried), run.recall)


class _Run:
    """Fit and judge candidates for ``search``; keep all of them."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        split: SplitTexts,
        trial: Trial,
        limits: dict[str, float],
        boundary: int,
        choose: Callable[[int], Plan] | None,
        highest: int,
        progress: Progress,
    ) -> None:
        depth = model.config.get_text_config().num_hidden_layers
        self.model, self.trial, self.limits, self.boundary = model, trial, limits, boundary
        self.choose_deepest = choose is None
        self.choose = choose or (lambda count: Plan.last(depth, count))
        self.tried: list[Candidate] = []
        self._report = progress if callable(progress) else None
        self._bar = progress is True
        self._batches = calibration_batches(split.calibration, tokenizer, trial.window, trial.samples, batch=1)
        self._training: list[Pair] | None = None
        self._make_training = lambda: _tasks(split.calibration, tokenizer, trial, TRAINING)
        (held,) = text_sets(split.held_out, tokenizer, [trial.tokens], trial.continuation, trial.prompts)
        if len(held.pairs) < 2 and trial.errors > 0:
            raise ValueError(
                f"texts: expected enough for two held-out prompts of {trial.window} tokens, as one has no standard "
                f"error, got {len(held.pairs)}; give more text or a smaller trial.tokens"
            )
        self._make_tasks = lambda: _tasks(split.held_out, tokenizer, trial, EVALUATION)
        self._held = held.pairs
        tasks = self._make_tasks() if RECALL_DROP in limits else []
        _check_recall_limit(limits, len(tasks), trial)
        # Of the default choice every count starts at another layer; a caller's choices are not known before.
        layers = range(depth - highest, depth) if choose is None else []
        self.judge = QualityJudge(model, held.pairs, tasks, layers, trial.batch_size, self._bar)
        self.recall = self.judge.recall
        drop = limits.get(RECALL_DROP)
        if drop is not None and (self.recall or 0.0) <= drop:
            raise ValueError(
                f"max_recall_drop: expected less than {self.recall:.3g}, the share of the {len(tasks)} retrieval "
                f"tasks that the model answers at full depth, got {drop}"
            )

    def candidate(self, count: int, stage: str) -> Candidate:
        """Fit and judge the plan of ``count`` layers."""
        start = time.perf_counter()
        plan = self.choose(count).replace(boundary=self.boundary, min_tokens=0)
        if stage != UNFITTED:
            self._say(f"{count} layers: fitting ({stage})")
            plan = self._fitted(plan, stage)
        figures = self.judge.measure(plan, self.limits, self.trial.errors)
        kept = within(figures, self.limits, self.trial.errors)
        found = Candidate(plan, stage, figures, kept, time.perf_counter() - start)
        self.tried.append(found)
        text = ", ".join(f"{name} {figure}" for name, figure in figures.items())
        self._say(f"{count} layers, {stage}: {text}: {'within' if kept else 'over'} the budget ({found.seconds:.0f} s)")
        if self._report is not None:
            self._report(len(self.tried), None)
        return found

    def with_recall(self, plan: Plan) -> Plan:
        """Return a plan with the loss of retrieval tasks on its card, or the reason why it was not measured."""
        assert plan.card is not None
        try:
            tasks = self._make_tasks()
        except ValueError as error:
            return plan.replace(card=_without_recall(plan.card, f"the texts make no retrieval tasks ({error})"))
        self._say(f"{len(plan.omit)} layers: measuring {len(tasks)} retrieval tasks")
        # A judge of its own, so that the search does not wait for tasks; it needs a text.
        judge = QualityJudge(self.model, self._held[:1], tasks, plan.omit[:1], self.trial.batch_size, self._bar)
        self.recall = judge.recall
        if not judge.recall:
            why = f"the model answers none of {len(tasks)} retrieval tasks at full depth"
            return plan.replace(card=_without_recall(plan.card, why))
        row = _card_quality(RECALL_DROP, judge.measure(plan)[RECALL_DROP], judge.recall)
        card = dataclasses.replace(plan.card, quality=(*plan.card.quality, row), not_measured={})
        return plan.replace(card=card)

    def _fitted(self, plan: Plan, stage: str) -> Plan:
        """Fit a plan; ``QUICK`` reads some of the sequences and chooses no lambda."""
        more: dict[str, Any] = {}
        if stage == QUICK:
            some = self._batches[:: QUICK_SHARE if len(self._batches) >= 8 * QUICK_SHARE else 1]
            return fit(self.model, plan, some, lambdas=[QUICK_LAMBDA], progress=self._bar)
        if stage == DISTILL:
            if self._training is None:
                self._training = self._make_training()
            more = {"method": DISTILL, "tasks": self._training}
        fitted: Plan = fit(self.model, plan, self._batches, progress=self._bar, **more)
        return fitted

    def _say(self, text: str) -> None:
        if self._bar:
            print(text, file=sys.stderr, flush=True)


def _tasks(texts: Texts, tokenizer: Any, trial: Trial, kind: str) -> list[Pair]:
    """Make retrieval tasks as long as the held-out prompts, and as many. The kinds share no wording and no name."""
    return retrieval_pairs(texts, tokenizer, trial.tokens, trial.prompts, kind=kind, seed=trial.seed)


def _with_card(model: Any, best: Candidate, run: _Run, asked: dict[str, float], split: SplitTexts) -> Plan:
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
    if RECALL_DROP not in best.figures:
        card = _without_recall(card, "the run was stopped before")
    return plan.replace(card=card)


def _card_quality(name: str, figure: Figure, recall: float | None) -> CardQuality:
    """Return a figure as a card holds it; ``recall`` is the share of tasks that the model answers at full depth."""
    error = None if math.isnan(figure.error) else figure.error
    against = f"full depth, which answers {recall:.2f}" if name == RECALL_DROP else "full depth"
    return CardQuality(name, figure.value, error, UNITS[name], figure.prompts, against)


def _without_recall(card: PlanCard, why: str) -> PlanCard:
    return dataclasses.replace(card, not_measured={RECALL_DROP: why})


def _timed(model: Any, plan: Plan, pays_from: Sequence[int], lengths: Sequence[int], bar: bool) -> Plan:
    """Return the plan with ``min_tokens`` and the speed-ups on its card, both timed here."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = [length for length in lengths if not limit or length <= limit]
    plan = with_min_tokens(model, plan, pays_from, bar)
    times = time_plans(model, [plan], lengths, progress=bar)
    hardware = env_info.hardware(model.device, model.dtype)
    speeds = []
    for length in lengths:
        factor = speedup(times, plan_arm(plan.omit, plan.boundary), length)
        if factor is not None:
            speeds.append(CardSpeed(length, factor, NATIVE_FULL, hardware))
    assert plan.card is not None
    return plan.replace(card=dataclasses.replace(plan.card, speed=tuple(speeds)))


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


def _check_recall_limit(limits: dict[str, float], tasks: int, trial: Trial) -> None:
    """Raise ValueError if a plan that loses no answer to so many tasks would exceed the limit, by its error alone."""
    least = trial.errors / max(tasks, 1)
    if limits.get(RECALL_DROP, math.inf) < least:
        raise ValueError(
            f"max_recall_drop: expected at least {math.ceil(least * 1e4) / 1e4:g} with {tasks} retrieval tasks, as "
            f"the error of the drop is at least one answer, got {limits[RECALL_DROP]:g}; a larger trial.prompts than "
            f"{trial.prompts}, and as much text, allow a smaller limit"
        )


def _check_arguments(method: str, highest: int | None, depth: int) -> int:
    """Return the largest number of layers to try, after a check of two arguments."""
    if method not in STAGES:
        raise ValueError(f"method: expected one of {', '.join(STAGES)}, got {method!r}")
    if highest is None:
        return max(1, depth // 2)
    if isinstance(highest, bool) or not isinstance(highest, int) or not 1 <= highest < depth:
        raise ValueError(f"highest: expected an integer in 1...{depth - 1}, got {highest!r}")
    return highest


def _tokenizer_of(model: Any) -> Any:
    from transformers import AutoTokenizer

    name = getattr(model.config, "_name_or_path", None)
    if not name:
        raise ValueError("tokenizer: expected one for a model that was not loaded from a checkpoint, got none")
    return AutoTokenizer.from_pretrained(name)
