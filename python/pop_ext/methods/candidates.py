"""Candidates of ``autoplan``: plans that are fitted, and judged against a budget of quality."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pop_ext.evaluation.prompts import Pair, Texts, calibration_batches, text_sets, texts_outside
from pop_ext.evaluation.retrieval import retrieval_pairs
from pop_ext.evaluation.retrieval_templates import EVALUATION, TRAINING
from pop_ext.methods.calibration import longest_input
from pop_ext.methods.defaults import LEARNING_RATE, STEPS
from pop_ext.methods.distill import Training
from pop_ext.methods.fit import new_fitting
from pop_ext.methods.fit_moments import held_out_of
from pop_ext.methods.fitting import Fitting
from pop_ext.methods.held_out import SplitTexts
from pop_ext.methods.plan_search import AHEAD, DISTILL, QUICK, UNFITTED, Candidate
from pop_ext.methods.quality_judge import RECALL_DROP, Figure, QualityJudge, within
from pop_ext.plans.plan import Plan
from pop_ext.utils.callers import warn_caller
from pop_ext.utils.progress import Progress, reporting

FEWEST = 8
"""Prompts under which a card says that they are too few to trust."""
QUICK_SHARE, QUICK_LAMBDA = 4, 0.1
"""The quick ridge reads each such sequence and fits with this lambda."""


@dataclass(frozen=True)
class Trial:
    """How candidates are fitted and judged.

    Attributes:
        tokens: Context of each held-out prompt.
        continuation: Tokens after it whose loss is measured.
        prompts: Held-out prompts, at most, and retrieval tasks.
        samples: Calibration sequences of ``tokens`` + ``continuation`` tokens, at most.
        holdout: Share of each text that is held out.
        errors: Standard errors that are added to a mean before it is compared with its limit. With 1, and many
            independent prompts, a plan whose true cost equals the limit passes about one time in six.
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


class Candidates:
    """Fits and judges candidates for ``search``, and keeps all of them.

    Attributes:
        tried: All candidates, in the order of trial.
        recall: Share of the retrieval tasks that the model answers at full depth; None if there are none.
        notes: What a card has to say of the figures.
        held: The held-out prompts with their continuations.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        split: SplitTexts,
        trial: Trial,
        limits: dict[str, float],
        method: str,
        boundaries: Sequence[int],
        choose: Callable[[int], Plan] | None,
        highest: int,
        progress: Progress,
    ) -> None:
        depth = model.config.get_text_config().num_hidden_layers
        self.model, self.trial, self.limits, self.boundaries = model, trial, limits, boundaries
        self.choose_deepest = choose is None
        self.choose = choose or (lambda count: Plan.last(depth, count))
        self.tried: list[Candidate] = []
        self._plans: dict[tuple[int, str], Plan] = {}
        self._fittings: dict[tuple[int, str], tuple[Fitting, int]] = {}
        self._report = progress if callable(progress) else None
        self._bar = progress is True
        self._batches = calibration_batches(split.calibration, tokenizer, trial.window, trial.samples, batch=1)
        # Made now, so that prompts too short for a task fail before the search.
        limit = longest_input(model)
        self._training: list[Pair] = []
        if method == DISTILL:
            held = held_out_of(len(self._batches))
            rest = texts_outside(split.calibration, tokenizer, trial.window, trial.samples, held)
            self._training = make_tasks(rest, tokenizer, trial, TRAINING, limit)
        self.held = held_out_pairs(split, tokenizer, trial)
        self.notes = self._few_prompts(len(self.held))
        self._make_tasks = lambda: make_tasks(split.held_out, tokenizer, trial, EVALUATION, limit)
        tasks = self._make_tasks() if RECALL_DROP in limits else []
        check_recall_limit(limits, len(tasks), trial)
        # Of the default choice every count starts at another layer; a caller's choices are not known before.
        layers = range(depth - highest, depth) if choose is None else []
        self.judge = QualityJudge(
            model, self.held, tasks, layers, trial.batch_size, self._bar, lambda recall: self._check_recall(recall)
        )
        self.recall = self.judge.recall

    def _few_prompts(self, found: int) -> tuple[str, ...]:
        """Warn of fewer held-out prompts than were asked for, and return what the card says of too few."""
        if found < self.trial.prompts:
            warn_caller(
                f"the texts hold out {found} prompts of {self.trial.window} tokens, fewer than the "
                f"{self.trial.prompts} that were asked for"
            )
        if found >= FEWEST:
            return ()
        return (f"Only {found} prompts judged the plan: under {FEWEST} its figures and their errors say little.",)

    def _check_recall(self, recall: float | None) -> None:
        """Raise ValueError if the limit allows to lose all that the model answers at full depth."""
        drop = self.limits.get(RECALL_DROP)
        if drop is not None and (recall or 0.0) <= drop:
            raise ValueError(
                f"max_recall_drop: expected less than {recall or 0.0:.3g}, the share of the retrieval tasks that the "
                f"model answers at full depth, got {drop}"
            )

    def candidate(self, count: int, stage: str, soon: Sequence[int] = (), boundary: int | None = None) -> Candidate:
        """Fit the plan of ``count`` layers, and judge it.

        Args:
            count: Number of layers.
            stage: Fit, of ``STAGES``.
            soon: Numbers of layers whose fits may be asked for next; the reading for this one serves them, too.
            boundary: Boundary to judge with. None for the smallest, which the fit is made for.
        """
        start = time.perf_counter()
        if (count, stage) not in self._plans:
            self._plans[count, stage] = self._unfitted(count) if stage == UNFITTED else self._fitted(count, stage, soon)
        plan = self._plans[count, stage].replace(boundary=boundary or self.boundaries[0])
        figures = self.judge.measure(plan, self.limits, self.trial.errors)
        kept = within(figures, self.limits, self.trial.errors)
        saved = self._saved(count, plan.boundary)
        found = Candidate(plan, stage, figures, kept, time.perf_counter() - start, saved)
        self._keep(found)
        return found

    def _saved(self, count: int, boundary: int) -> float:
        return count * (1 - boundary / self.trial.tokens)

    def widen(self, best: Candidate | None, stage: str, highest: int) -> Candidate | None:
        """Try more layers with each wider boundary, as long as a candidate keeps the limits.

        Counts that save less with a boundary than the best candidate does are not tried with it, so a wide one is taken
        only where it pays.

        Args:
            best: The best candidate of the smallest boundary.
            stage: Fit of the candidates.
            highest: Largest number of layers to try.
        """
        for rows in self.boundaries[1:]:
            for count in range(best.count + 1 if best else 1, highest + 1):
                if best is not None and self._saved(count, rows) <= best.saved:
                    continue
                found = self.candidate(count, stage, range(count, min(highest, count + AHEAD) + 1), rows)
                if not found.within:
                    break
                best = found
        self._fittings.clear()
        return best

    def _chosen(self, count: int) -> Plan:
        """Return the plan of ``count`` layers.

        Raises:
            TypeError: The caller's ``choose`` returns no plan.
            ValueError: It returns one of another depth or another number of layers.
        """
        plan, depth = self.choose(count), self.model.config.get_text_config().num_hidden_layers
        if not isinstance(plan, Plan):
            raise TypeError(f"choose: expected a pop_ext.Plan, got {type(plan).__name__}")
        if (plan.num_layers, len(plan.omit)) != (depth, count):
            raise ValueError(
                f"choose: expected a plan that omits {count} of {depth} layers, got one of {len(plan.omit)} of "
                f"{plan.num_layers}"
            )
        return plan

    def _keep(self, found: Candidate) -> None:
        """Keep a candidate, and tell of it."""
        self.tried.append(found)
        name = f"{found.count} layers, {found.fit}, boundary {found.plan.boundary}"
        text = ", ".join(f"{name} {figure}" for name, figure in found.figures.items())
        self._say(f"{name}: {text}: {'within' if found.within else 'over'} the budget ({found.seconds:.0f} s)")
        if self._report is not None:
            self._report(len(self.tried), None)

    def measure_recall(self, plan: Plan) -> Figure | str:
        """Return the loss of retrieval tasks that no limit asked for, or the reason why it cannot be measured."""
        try:
            tasks = self._make_tasks()
        except ValueError as error:
            return f"the texts make no retrieval tasks ({error})"
        self._say(f"{len(plan.omit)} layers: measuring {len(tasks)} retrieval tasks")
        # A judge of its own, so that the search does not wait for tasks; it needs a text.
        judge = QualityJudge(self.model, self.held[:1], tasks, plan.omit[:1], self.trial.batch_size, self._bar)
        self.recall = judge.recall
        if not judge.recall:
            return f"the model answers none of {len(tasks)} retrieval tasks at full depth"
        return judge.measure(plan)[RECALL_DROP]

    def _unfitted(self, count: int) -> Plan:
        return self._chosen(count).replace(boundary=self.boundaries[0], min_tokens=0, projections=None)

    def _fitted(self, count: int, stage: str, soon: Sequence[int]) -> Plan:
        """Return the plan of ``count`` layers with the fit of a stage."""
        if (count, stage) not in self._fittings:
            try:
                self._read(sorted({count, *soon}), stage)
            except (TypeError, ValueError):
                if not set(soon) - {count}:
                    raise
                self._read([count], stage)  # what failed may be a plan that is never asked for
        fitting, number = self._fittings[count, stage]
        self._say(f"{count} layers: fitting ({stage})")
        with reporting(self._bar, "fit", None) as advance:
            fitted = fitting.fitted(number, advance, self._say)
        fitting.forget(number)
        del self._fittings[count, stage]
        return fitted

    def _read(self, counts: Sequence[int], stage: str) -> None:
        """Read the calibration texts for the fits of several plans; ``QUICK`` reads some and chooses no lambda."""
        self._fittings = {key: value for key, value in self._fittings.items() if key[1] == stage}  # memory
        batches, training = self._batches, None
        how: dict[str, Any] = {}
        if stage == QUICK:
            batches = self._batches[:: QUICK_SHARE if len(self._batches) >= 8 * QUICK_SHARE else 1]
            how = {"lambdas": [QUICK_LAMBDA]}
        elif stage == DISTILL:
            training, how = Training(STEPS, LEARNING_RATE, seed=0), {"tasks": self._training}
        plans = {f"{count} layers": self._unfitted(count) for count in counts}
        fitting = new_fitting(self.model, plans, training, **how)
        total = fitting.reads(len(batches))
        self._say(f"{', '.join(map(str, counts))} layers: reading {total} sequences for their {stage}")
        with reporting(self._bar, "reading", total) as advance:
            fitting.read(batches, advance)
        self._fittings |= {(count, stage): (fitting, number) for number, count in enumerate(counts)}

    def _say(self, text: str) -> None:
        if self._bar:
            print(text, file=sys.stderr, flush=True)


def held_out_pairs(split: SplitTexts, tokenizer: Any, trial: Trial) -> tuple[Pair, ...]:
    """Return the held-out prompts with their continuations.

    Raises:
        ValueError: There is but one, and ``trial`` asks for standard errors.
    """
    (held,) = text_sets(split.held_out, tokenizer, [trial.tokens], trial.continuation, trial.prompts)
    if len(held.pairs) < 2 and trial.errors > 0:
        raise ValueError(
            f"texts: expected enough for two held-out prompts of {trial.window} tokens, as one has no standard error, "
            f"got {len(held.pairs)}; give more text or a smaller trial.tokens"
        )
    return held.pairs


def make_tasks(texts: Texts, tokenizer: Any, trial: Trial, kind: str, limit: int | None = None) -> list[Pair]:
    """Make retrieval tasks as long as the held-out prompts, and as many. The kinds share no wording and no name.

    Args:
        texts: Texts to make them from.
        tokenizer: Hugging Face tokenizer.
        trial: Length, number and seed.
        kind: ``EVALUATION`` or ``TRAINING``.
        limit: As for ``retrieval_pairs``.

    Raises:
        ValueError: As for ``retrieval_pairs``; the text names the member of ``trial``.
    """
    try:
        return retrieval_pairs(texts, tokenizer, trial.tokens, trial.prompts, kind=kind, seed=trial.seed, limit=limit)
    except ValueError as error:
        text = str(error)
        for name, argument in (("length:", "trial.tokens:"), ("text:", "texts:")):
            text = argument + text.removeprefix(name) if text.startswith(name) else text
        raise ValueError(text) from None


def check_recall_limit(limits: dict[str, float], tasks: int, trial: Trial) -> None:
    """Raise ValueError for a limit that a plan without a lost answer exceeds by its error, or that all plans keep."""
    least = trial.errors / max(tasks, 1)
    if limits.get(RECALL_DROP, 0.0) >= 1:
        raise ValueError(
            f"max_recall_drop: expected less than 1, the share of all retrieval tasks, got {limits[RECALL_DROP]:g}"
        )
    if limits.get(RECALL_DROP, math.inf) < least:
        raise ValueError(
            f"max_recall_drop: expected at least {math.ceil(least * 1e4) / 1e4:g} with {tasks} retrieval tasks, as "
            f"the error of the drop is at least one answer, got {limits[RECALL_DROP]:g}; a larger trial.prompts than "
            f"{trial.prompts}, and as much text, allow a smaller limit"
        )
