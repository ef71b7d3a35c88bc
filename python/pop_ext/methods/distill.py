"""Train the K/V matrices of omitted layers by the KL divergence to the full model (docs/notes/fitting.md)."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pop_ext.methods.student import Example, Student
from pop_ext.plans.origin import weights_hash
from pop_ext.plans.plan import Plan
from pop_ext.utils.divergence import kl_divergence
from pop_ext.utils.texts import missing_or

GROUP = 4
"""Sequences of text in a step, and tasks, whatever batches they came in."""
WARM_UP = 20
"""Steps with a rising learning rate."""
FLOOR = 0.05
"""Share of the learning rate that is left at the last step."""
CLIP = 1.0
"""Largest norm of a step's gradient."""
EVERY = 25
"""Largest number of steps between two judgements; never more than an eighth of all."""
PATIENCE = 4
"""Training ends after this many judgements in a row that are worse than the best one."""


@dataclass
class HeldOut:
    """Quality on held-out examples, one value per sequence.

    Attributes:
        kl: KL divergence to the full model on the tokens after a prompt, nats a token.
        task_kl: KL divergence to the full model on the answers of tasks, nats a token.
        exact: 1.0 for a task whose answer's tokens are each the most probable, else 0.0.
    """

    kl: list[float] = field(default_factory=list)
    task_kl: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Training:
    """Settings of a training.

    Attributes:
        steps: Largest number of steps.
        learning_rate: Largest learning rate of Adam.
        seed: Seed of the order of sequences and of the splits.
        resume: File of the state, written at each judgement; a stopped training goes on from it. None for none.
    """

    steps: int
    learning_rate: float
    seed: int
    resume: Path | None = None

    @property
    def every(self) -> int:
        """Number of steps between two judgements."""
        return max(1, min(EVERY, self.steps // 8))


@dataclass(frozen=True)
class Judgement:
    """What held-out examples said of the matrices after a number of steps; without tasks the last two are None."""

    step: int
    kl: float
    task_kl: float | None = None
    exact: float | None = None

    @classmethod
    def of(cls, step: int, found: HeldOut) -> Judgement:
        """Return the means of what ``judge`` found."""

        def mean(values: list[float]) -> float | None:
            return sum(values) / len(values) if values else None

        return cls(step, mean(found.kl) or 0.0, mean(found.task_kl), mean(found.exact))

    @property
    def divergence(self) -> float:
        """KL divergence of text plus that of tasks, by which the best matrices are chosen; NaN if either is."""
        return self.kl + (self.task_kl or 0.0)

    def __str__(self) -> str:
        tasks = "" if self.task_kl is None else f", of tasks {self.task_kl:.4f}, exact {self.exact:.2f}"
        return f"after {self.step} steps: held-out KL {self.kl:.4f}{tasks}"


def merge_examples(examples: Sequence[Example]) -> list[Example]:
    """Return the examples with those of one length, text or task alike, joined to one."""
    shapes: dict[tuple[int, int], list[Example]] = {}
    for example in examples:
        shapes.setdefault((example.ids.shape[1], example.answer), []).append(example)
    return [
        Example(
            torch.cat([one.ids for one in same]),
            torch.cat([one.entry for one in same]),
            torch.cat([one.final for one in same]),
            answer,
        )
        for (_, answer), same in shapes.items()
    ]


def kl_per_row(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the KL divergence of each row: [...] from logits [..., vocabulary]."""
    return kl_divergence(teacher.log_softmax(-1), student.log_softmax(-1))


@torch.no_grad()
def judge(student: Student, matrices: Mapping[int, Tensor], examples: Sequence[Example]) -> HeldOut:
    """Measure K/V matrices on held-out examples.

    Args:
        student: Student with the whole vocabulary.
        matrices: As for ``Student.logits``.
        examples: Examples; text is split before its last ``Example.rows`` tokens.
    """
    found = HeldOut()
    for example in examples:
        rows = example.rows
        prompt = example.ids.shape[1] - rows
        for begin in range(0, len(example), GROUP):
            part = example.select(range(begin, min(begin + GROUP, len(example))))
            teacher = student.teacher_logits(part, prompt - 1, rows)
            logits = student.logits(part, prompt, rows, matrices)
            kl = kl_per_row(teacher, logits).mean(-1).tolist()
            if example.answer:
                found.task_kl += kl
                found.exact += (logits.argmax(-1) == part.ids[:, prompt:]).all(-1).float().tolist()
            else:
                found.kl += kl
    return found


class Trainer:
    """Trains the K/V matrices of one plan.

    Attributes:
        matrices: Omitted layer -> ``[2 * kv_dim, hidden]`` float32, the values in training.
        step: Number of steps done.
    """

    def __init__(
        self,
        student: Student,
        start: Mapping[int, Tensor],
        mixture: Sequence[Sequence[Example]],
        training: Training,
    ) -> None:
        """Prepare.

        Args:
            student: Student of the plan, with the vocabulary that the loss is over.
            start: Matrices to start from.
            mixture: Parts such as texts and tasks; a step takes a group of each. Empty ones are left out.
            training: Settings.
        """
        self.student, self.steps, self.step = student, training.steps, 0
        device = student.model.get_input_embeddings().weight.device
        self.matrices = {
            layer: matrix.detach().to(device, torch.float32, copy=True).requires_grad_()
            for layer, matrix in start.items()
        }
        self._adam = torch.optim.Adam(self.matrices.values(), lr=training.learning_rate, betas=(0.9, 0.99))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._adam, self._share)
        self._draw = random.Random(training.seed)
        self._orders = [self._order(merge_examples(part)) for part in mixture if part]

    def _share(self, step: int) -> float:
        """Return the share of the learning rate at a step: linear warm-up, then a cosine."""
        warm = min(1.0, (step + 1) / min(WARM_UP, max(1, self.steps // 4)))
        return warm * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / self.steps)))

    def train(self) -> float:
        """Take one step on a group of each part of the mixture.

        Returns:
            The KL divergence that the step saw, nats a token, summed over the parts.
        """
        total = 0.0
        for example, prompt, share in self._next():
            rows = example.rows
            logits = self.student.logits(example, prompt, rows, self.matrices)
            loss = share * kl_per_row(self.student.teacher_logits(example, prompt - 1, rows), logits).mean()
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.matrices.values(), CLIP)
        self._adam.step()
        self._adam.zero_grad()
        self._schedule.step()
        self.step += 1
        return total

    def state(self) -> dict[str, Any]:
        """Return what ``restore`` needs to go on from here."""
        matrices = {layer: matrix.detach().clone() for layer, matrix in self.matrices.items()}
        return {
            "step": self.step,
            "matrices": matrices,
            "adam": self._adam.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a trainer with the same settings; call it before the first step."""
        for _ in range(state["step"]):  # the draws of the steps that were done
            for _ in self._next():
                pass
        with torch.no_grad():
            for layer, matrix in self.matrices.items():
                matrix.copy_(state["matrices"][layer])
        self._adam.load_state_dict(state["adam"])
        self._schedule.last_epoch = state["step"]  # the rate itself is part of Adam's state
        self.step = state["step"]

    def _next(self) -> Iterator[tuple[Example, int, float]]:
        """Yield the sequences of a step: those of one length, the length of their prompt, and their share of the part.

        The prompt of a task ends where its answer begins, that of a text at random.
        """
        for order in self._orders:
            group = next(order)
            for example in group:
                longest = example.ids.shape[1] - example.rows
                shortest = self.student.shortest_prompt(example.ids, example.answer)
                yield example, self._draw.randint(shortest, longest), len(example) / sum(map(len, group))

    def _order(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """Yield groups of ``GROUP`` sequences for ever, each sequence once in a round, by length."""
        places = [(number, row) for number, example in enumerate(examples) for row in range(len(example))]
        while True:
            self._draw.shuffle(places)
            for begin in range(0, len(places), GROUP):
                rows: dict[int, list[int]] = {}
                for number, row in places[begin : begin + GROUP]:
                    rows.setdefault(number, []).append(row)
                yield [examples[number].select(chosen) for number, chosen in rows.items()]


def distill(
    model: Any,
    plan: Plan,
    start: Mapping[int, Tensor],
    examples: Sequence[Example],
    held: Sequence[Example],
    training: Training,
    advance: Callable[[int], None],
    say: Callable[[str], None],
) -> tuple[dict[int, Tensor], list[Judgement]]:
    """Train the K/V matrices of a plan's omitted layers from ``start`` on.

    The loss is the KL divergence of the next token to the full model, over the ids that the sequences have. It is
    taken on the rows after the context rows of a pruned prefill, which run through the frozen layers.

    Args:
        model: Stock model inside ``stock_evaluation``.
        plan: The plan.
        start: Omitted layer -> ``[2 * kv_dim, hidden]``.
        examples: Texts and tasks to train on.
        held: Texts and tasks to judge by.
        training: Settings.
        advance: Called with the steps just done.
        say: Called with a line for each judgement.

    Returns:
        The matrices that the held-out examples like best, ``start`` among them, in float32, and all judgements.

    Raises:
        ValueError: The file of ``training.resume`` is of another training or not whole. A loss is not finite.
    """
    ids = torch.cat([example.ids.flatten() for example in [*examples, *held]])
    mixture = [[e for e in examples if not e.answer], [e for e in examples if e.answer]]
    trainer, whole = Trainer(Student(model, plan, ids.unique()), start, mixture, training), Student(model, plan)
    history: list[Judgement] = []
    best = trainer.state()["matrices"]
    digest = "" if training.resume is None else _digest(model, ids, start, plan, training)
    if training.resume is not None and training.resume.exists():
        before = _load_state(training.resume, digest, trainer)
        trainer.restore(before["trainer"])
        best, history = before["best"], [Judgement(*row) for row in before["history"]]
        advance(trainer.step)
    while True:
        if trainer.step % training.every == 0 or trainer.step == training.steps:
            if not history or history[-1].step < trainer.step:
                found = Judgement.of(trainer.step, judge(whole, trainer.matrices, held))
                if not math.isfinite(found.divergence):
                    raise ValueError(
                        f"learning_rate: expected one with which the divergence stays finite, got "
                        f"{training.learning_rate:g} ({found})"
                    )
                if all(found.divergence < older.divergence for older in history):
                    best = trainer.state()["matrices"]
                history.append(found)
                say(str(found))
                if training.resume is not None:
                    _save_state(training.resume, digest, trainer, best, history)
            since = len(history) - 1 - min(range(len(history)), key=lambda i: history[i].divergence)
            if trainer.step == training.steps or since >= PATIENCE:
                return best, history
        trainer.train()
        advance(1)


def _digest(model: Any, ids: Tensor, start: Mapping[int, Tensor], plan: Plan, training: Training) -> str:
    """Return a SHA-256 of what a training depends on; of the model's weights, of those that ``weights_hash`` reads."""
    settings = (weights_hash(model), plan.to_json(), training.steps, training.learning_rate, training.seed)
    found = hashlib.sha256(repr(settings).encode() + ids.cpu().numpy().tobytes())
    for layer in sorted(start):
        found.update(start[layer].detach().cpu().float().numpy().tobytes())
    return found.hexdigest()


def _save_state(
    path: Path, digest: str, trainer: Trainer, best: dict[int, Tensor], history: Sequence[Judgement]
) -> None:
    """Write the state of a training through a temporary file, so that none is left half written."""
    rows = [(one.step, one.kl, one.task_kl, one.exact) for one in history]
    part = path.with_name(path.name + ".part")
    torch.save({"digest": digest, "trainer": trainer.state(), "best": best, "history": rows}, part)
    os.replace(part, path)


def _load_state(path: Path, digest: str, trainer: Trainer) -> dict[str, Any]:
    """Read a state that ``_save_state`` wrote for ``trainer``.

    Raises:
        ValueError: The file is none, or is of another training.
    """
    if not path.is_file():  # a pipe may never bring anything
        raise ValueError(f"resume: expected a state that a training wrote, got {path}, which is no file")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["digest"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"resume: expected a state that a training wrote, got {path} ({missing_or(error)})") from None
    if found != digest:
        raise ValueError(
            f"resume: expected a training on the same weights, sequences, plan and settings, got another in {path}"
        )
    try:
        one = state["trainer"]
        matrices = [one["matrices"], state["best"]]
        whole = isinstance(one["adam"], dict) and 0 <= one["step"] <= trainer.steps
        whole &= all(m[i].shape == own.shape for m in matrices for i, own in trainer.matrices.items())
        whole &= len([Judgement(*row) for row in state["history"]]) > 0
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"resume: expected a whole state of a training, got {path} ({missing_or(error)})") from None
    if not whole:
        raise ValueError(f"resume: expected a whole state of a training, got {path}, which holds parts of one")
    return state
