"""Judge plans on held-out prompts: added loss, KL divergence and lost answers, each against the model at full depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pop_ext.evaluation.prompts import Pair
from pop_ext.evaluation.results import mean_of
from pop_ext.evaluation.states import FullStates
from pop_ext.plans.plan import Plan
from pop_ext.utils.divergence import kl_divergence
from pop_ext.utils.progress import Progress, reporting

LOSS, KL, RECALL_DROP = "loss", "kl", "recall drop"
"""Names of the figures."""
UNITS = {LOSS: "nats a token", KL: "nats a token", RECALL_DROP: "share of exact answers"}


@dataclass(frozen=True)
class Figure:
    """A mean over held-out prompts and its standard error, both of the paired differences to full depth.

    Attributes:
        value: The mean.
        error: Its standard error. NaN for a single prompt.
        prompts: Number of prompts.
    """

    value: float
    error: float
    prompts: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Return mean and standard error of one value per prompt."""
        mean = mean_of(values)
        return cls(mean.value, mean.error, len(values))

    @classmethod
    def of_answers(cls, values: Sequence[float]) -> Figure:
        """Return mean and standard error of answers lost, 1, 0 or -1 per prompt.

        The error is at least that of one answer, ``1 / prompts``: if no answer was lost, the values do not vary, but
        the share is not known any better.
        """
        figure = cls.of(values)
        return cls(figure.value, max(1 / len(values), figure.error), figure.prompts)

    def upper(self, errors: float) -> float:
        """Return the mean plus ``errors`` standard errors; infinity if a standard error is unknown but asked for."""
        if errors == 0:
            return self.value
        return math.inf if math.isnan(self.error) else self.value + errors * self.error

    def __str__(self) -> str:
        return f"{self.value:+.4f} ({self.error:.4f})"


class QualityJudge:
    """Measure plans of one model against its full depth, on prompts with known continuations.

    The full model runs once, when the judge is made. Plans are computed from its states, by the reference. Kept are
    prompts * tokens * hidden values of each of ``layers``, and log-probabilities in float16, prompts * continuation *
    vocabulary values.

    Args:
        model: Stock Hugging Face model. It is left unchanged.
        texts: (prompt, continuation) of held-out text.
        tasks: (prompt, answer) of retrieval tasks; empty for none.
        layers: First omitted layers of the plans to come. A plan that starts elsewhere takes another full forward.
        batch_size: Prompts per forward.
        progress: Shows the prompts of each run.
        check: Called with ``recall`` before the texts are read, to refuse it by an error.

    Attributes:
        recall: Share of the tasks that the full model answers exactly; None without tasks.
    """

    def __init__(
        self,
        model: Any,
        texts: Sequence[Pair],
        tasks: Sequence[Pair],
        layers: Sequence[int],
        batch_size: int,
        progress: Progress,
        check: Callable[[float | None], None] = lambda _: None,
    ) -> None:
        self._progress, full = progress, Plan(model.config.get_text_config().num_hidden_layers, ())
        with reporting(progress, "full depth, tasks", len(tasks)) if tasks else nullcontext(_ignore) as advance:
            self._tasks = FullStates(model, tasks, layers, batch_size, advance)
        self._exact = self._answers(full, "full depth, tasks")
        check(self.recall)
        with reporting(progress, "full depth", len(texts)) as advance:
            self._texts = FullStates(model, texts, layers, batch_size, advance)
        self._log_p = [torch.empty(0)] * len(texts)
        self._loss = [0.0] * len(texts)
        for index, log_p, target in self._rows(full, self._texts, "full depth"):
            self._log_p[index] = log_p.to("cpu", torch.float16)
            self._loss[index] = _loss(log_p, target)

    @property
    def recall(self) -> float | None:
        """Share of the tasks that the full model answers exactly; None without tasks."""
        return sum(self._exact) / len(self._exact) if self._exact else None

    def measure(self, plan: Plan, limits: Mapping[str, float] | None = None, errors: float = 0.0) -> dict[str, Figure]:
        """Measure a plan, whatever its ``min_tokens``.

        Args:
            plan: The plan, with fitted projections or without.
            limits: If the figures of the texts exceed these limits, the tasks are not run. None runs all.
            errors: As for ``within``.

        Returns:
            ``LOSS`` and ``KL``, and ``RECALL_DROP`` if the tasks were run.
        """
        title = f"{len(plan.omit)} omitted"
        losses, kls = [0.0] * len(self._loss), [0.0] * len(self._loss)
        for index, log_q, target in self._rows(plan, self._texts, title):
            losses[index] = _loss(log_q, target) - self._loss[index]
            log_p = self._log_p[index].to(log_q.device).float()
            kls[index] = float(kl_divergence(log_p, log_q).mean())
        figures = {LOSS: Figure.of(losses), KL: Figure.of(kls)}
        of_texts = {name: limit for name, limit in (limits or {}).items() if name in figures}
        if self._exact and within(figures, of_texts, errors):
            exact = self._answers(plan, f"{title}, tasks")
            figures[RECALL_DROP] = Figure.of_answers([full - own for full, own in zip(self._exact, exact, strict=True)])
        return figures

    def _answers(self, plan: Plan, title: str) -> list[float]:
        """Return 1.0 for each task whose answer's tokens are each the most probable, else 0.0."""
        exact = [0.0] * len(self._tasks.pairs)
        for index, log_p, target in self._rows(plan, self._tasks, title):
            exact[index] = float((log_p.argmax(-1) == target).all())
        return exact

    def _rows(self, plan: Plan, states: FullStates, title: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield index, log-probabilities [n, vocab] float32 and the n tokens of each prompt's continuation."""
        with torch.no_grad(), reporting(self._progress, title, len(states.pairs)) as advance:
            for index, logits in states.logits(plan):
                yield index, logits.float().log_softmax(-1), states.pairs[index][1].to(logits.device)
                advance(1)


def _ignore(_: int) -> None:
    """Report no progress."""


def _loss(log_p: Tensor, target: Tensor) -> float:
    """Return the mean loss of a continuation in nats a token."""
    return -float(log_p.gather(1, target[:, None]).double().mean())


def within(figures: Mapping[str, Figure], limits: Mapping[str, float], errors: float) -> bool:
    """Return whether each limited figure was measured, and its mean plus ``errors`` standard errors keeps the limit."""
    return all(name in figures and figures[name].upper(errors) <= limit for name, limit in limits.items())
