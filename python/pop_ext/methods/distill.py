"""Train the K/V matrices of omitted layers by the KL divergence to the full model (docs/notes/fitting.md)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pop_ext.methods.student import Example, Student

ROWS = 64
"""Largest number of tokens after a split of a text that a step trains on, and that the held-out loss is of."""
GROUP = 4
"""Sequences of text, and as many tasks, in a step."""
WARM_UP = 20
"""Steps with a rising learning rate."""
FLOOR = 0.05
"""Share of the learning rate that is left at the last step."""
CLIP = 1.0
"""Largest norm of a step's gradient."""


@dataclass
class HeldOut:
    """Quality on held-out examples, one value per sequence.

    Attributes:
        kl: KL divergence to the full model on the tokens after a prompt, nats a token.
        loss: Loss of these tokens, nats a token.
        task_kl: KL divergence to the full model on the answers of tasks, nats a token.
        exact: 1.0 for a task whose answer's tokens are each the most probable, else 0.0.
    """

    kl: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    task_kl: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)

    @property
    def divergence(self) -> float:
        """Mean KL divergence of text plus that of tasks, what training is judged by."""
        return sum(sum(part) / len(part) for part in (self.kl, self.task_kl) if part)


@dataclass(frozen=True)
class Step:
    """State of a training after a number of steps, as held-out examples judge it."""

    step: int
    held_out: HeldOut


def count_rows(example: Example) -> int:
    """Return how many last tokens of an example are predicted when it is held out."""
    return example.answer or max(1, min(ROWS, example.ids.shape[1] // 4))


def kl_per_row(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the KL divergence of each row: [...] from logits [..., vocabulary]."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def judge(student: Student, matrices: Mapping[int, Tensor] | None, examples: Sequence[Example]) -> HeldOut:
    """Measure K/V matrices on held-out examples.

    Args:
        student: Student with the whole vocabulary.
        matrices: As for ``Student.logits``. None for the full model.
        examples: Examples; text is split where its last quarter begins, at most ``ROWS`` tokens before its end.
    """
    found = HeldOut()
    for example in examples:
        rows = count_rows(example)
        prompt = example.ids.shape[1] - rows
        for begin in range(0, len(example), GROUP):
            part = example.select(range(begin, min(begin + GROUP, len(example))))
            teacher = student.teacher_logits(part, prompt - 1, rows)
            logits = teacher if matrices is None else student.logits(part, prompt, rows, matrices)
            target = part.ids[:, prompt:]
            kl = kl_per_row(teacher, logits).mean(-1).tolist()
            if example.answer:
                found.task_kl += kl
                found.exact += (logits.argmax(-1) == target).all(-1).float().tolist()
            else:
                found.kl += kl
                found.loss += (-logits.log_softmax(-1).gather(-1, target[..., None])[..., 0].mean(-1)).tolist()
    return found


class Trainer:
    """Trains the K/V matrices of one plan.

    Attributes:
        matrices: Omitted layer -> ``[2 * kv_dim, hidden]`` float32, the values in training.
        step: Number of steps done.
    """

    def __init__(
        self, student: Student, start: Mapping[int, Tensor], steps: int, learning_rate: float, seed: int
    ) -> None:
        """Prepare.

        Args:
            student: Student of the plan, with the vocabulary that the loss is over.
            start: Matrices to start from.
            steps: Number of steps in all.
            learning_rate: Largest learning rate of Adam.
            seed: Seed of the order of examples and of the splits.
        """
        self.student, self.steps, self.step = student, steps, 0
        self.matrices = {layer: matrix.detach().float().clone().requires_grad_() for layer, matrix in start.items()}
        self._adam = torch.optim.Adam(self.matrices.values(), lr=learning_rate, betas=(0.9, 0.99))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._adam, self._share)
        self._draw = random.Random(seed)
        self._orders: dict[int, Iterator[tuple[Example, list[int]]]] = {}

    def _share(self, step: int) -> float:
        """Return the share of the learning rate at a step: linear warm-up, then a cosine."""
        warm = min(1.0, (step + 1) / min(WARM_UP, max(1, self.steps // 4)))
        return warm * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / self.steps)))

    def train(self, *mixture: Sequence[Example]) -> float:
        """Take one step on a group of each part of the mixture.

        Args:
            *mixture: Parts, each a list of examples, such as texts and tasks. Empty ones are left out.

        Returns:
            The KL divergence that the step saw, nats a token, summed over the parts.
        """
        total = 0.0
        for number, examples in enumerate(mixture):
            if not examples:
                continue
            example, rows = next(self._orders.setdefault(number, self._order(examples)))
            loss = self._divergence(example.select(rows))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(self.matrices.values(), CLIP)
        self._adam.step()
        self._adam.zero_grad()
        self._schedule.step()
        self.step += 1
        return total

    def _order(self, examples: Sequence[Example]) -> Iterator[tuple[Example, list[int]]]:
        """Yield groups of sequences of one length for ever, each sequence once in a round."""
        while True:
            groups = []
            for example in examples:
                order = self._draw.sample(range(len(example)), len(example))
                groups += [(example, order[i : i + GROUP]) for i in range(0, len(order), GROUP)]
            self._draw.shuffle(groups)
            yield from groups

    def _divergence(self, example: Example) -> Tensor:
        """Return the mean KL divergence after a split of the sequences: at the answer, or at random in a text."""
        length, rows = example.ids.shape[1], count_rows(example)
        prompt = length - rows
        if not example.answer:
            least = max(self.student.plan.boundary + 1, (length - rows) // 2, length - example.final.shape[1] + 1)
            prompt = self._draw.randint(min(least, prompt), prompt)
        logits = self.student.logits(example, prompt, rows, self.matrices)
        return kl_per_row(self.student.teacher_logits(example, prompt - 1, rows), logits).mean()


def train(
    trainer: Trainer,
    mixture: Sequence[Sequence[Example]],
    judged: Callable[[Mapping[int, Tensor]], HeldOut],
    every: int,
    advance: Callable[[int], None],
) -> tuple[dict[int, Tensor], list[Step]]:
    """Train to the end, and return the matrices that held-out examples like best.

    Args:
        trainer: The trainer. Its start counts as a candidate.
        mixture: As for ``Trainer.train``.
        judged: Judges matrices.
        every: Number of steps between two judgements.
        advance: Called with the steps just done.

    Returns:
        The best matrices, and the judgement of every candidate.
    """

    def snapshot() -> dict[int, Tensor]:
        return {layer: matrix.detach().clone() for layer, matrix in trainer.matrices.items()}

    best, history = snapshot(), [Step(trainer.step, judged(trainer.matrices))]
    while trainer.step < trainer.steps:
        trainer.train(*mixture)
        advance(1)
        if trainer.step % every == 0 or trainer.step == trainer.steps:
            found = judged(trainer.matrices)
            if found.divergence < min(step.held_out.divergence for step in history):
                best = snapshot()
            history.append(Step(trainer.step, found))
    return best, history
