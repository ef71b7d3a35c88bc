"""Checks of the arguments of ``pop_ext.fit``."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pop_ext.methods.calibration import check_vocabulary
from pop_ext.methods.defaults import LEARNING_RATE, STEPS
from pop_ext.methods.distill import Training
from pop_ext.methods.fit_moments import HOLD_EVERY, held_out_of
from pop_ext.methods.student import count_continuation
from pop_ext.utils.tensors import check_dense

LAMBDAS = (0.01, 0.1, 1.0, 10.0, math.inf)
"""Ridges to try by default. Infinity stands for the original projections."""


METHODS = ("ridge", "distill")
"""Ways to fit."""

Task = tuple[Tensor, Tensor]
"""(prompt, answer), int [n] each."""


def check_training(
    method: str, steps: int, learning_rate: float, seed: int, resume: str | PathLike[str] | None
) -> Training | None:
    """Return the settings of the training; None for a method that does not train."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {reprlib.repr(method)}")
    for name, value, least in (("steps", steps, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected an int >= {least}, got {value}")
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, (int, float)):
        raise TypeError(f"learning_rate: expected a number, got {type(learning_rate).__name__} {learning_rate!r}")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate: expected a finite number > 0, got {learning_rate!r}")
    if resume is not None and method != "distill":
        raise ValueError(f'resume: expected None with method="{method}", which does not train, got {str(resume)!r}')
    if method != "distill":
        defaults = {"steps": (steps, STEPS), "learning_rate": (learning_rate, LEARNING_RATE), "seed": (seed, 0)}
        for name, (given, default) in defaults.items():
            if given != default:
                raise ValueError(f'{name}: expected it with method="distill" only, got {given!r} with "{method}"')
        return None
    path = None if resume is None else Path(resume)
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"resume: expected a file in a folder that exists, got {path}")
    return Training(steps, float(learning_rate), seed, path)


def check_tasks(tasks: Any, model: Any, boundary: int) -> list[Task]:
    """Return the tasks as int64 tensors on the model's device; ``boundary`` is the largest one of the plans.

    Raises:
        TypeError: ``tasks`` is no sequence of pairs of integer tensors.
        ValueError: A prompt has no context row, an answer is empty, or an id is outside the vocabulary.
    """
    if isinstance(tasks, (str, bytes, Tensor)) or not isinstance(tasks, Sequence):
        raise TypeError(f"tasks: expected a sequence of (prompt, answer), got {type(tasks).__name__}")
    weight, found = model.get_input_embeddings().weight, []
    for number, task in enumerate(tasks):
        pair = task if isinstance(task, (tuple, list)) and len(task) == 2 else ()
        if not pair or not all(isinstance(ids, Tensor) and ids.dtype in (torch.int64, torch.int32) for ids in pair):
            raise TypeError(f"tasks: expected a pair of int64 or int32 tensors, got {task!r:.60} in task {number}")
        check_dense({f"tasks[{number}]": ids for ids in pair})
        prompt, answer = pair
        if prompt.ndim != 1 or answer.ndim != 1 or len(prompt) <= boundary or len(answer) == 0:
            raise ValueError(
                f"tasks: expected a prompt [n] of more tokens than the boundary {boundary} and an answer [m], got "
                f"{list(prompt.shape)} and {list(answer.shape)} in task {number}"
            )
        check_vocabulary("tasks", torch.cat([prompt, answer]), model, f" in task {number}")
        # A clone, as a tensor of inference mode cannot be trained on.
        own = (ids.clone() if ids.is_inference() else ids for ids in (prompt, answer))
        prompt, answer = (ids.to(weight.device, torch.int64) for ids in own)
        found.append((prompt, answer))
    return found


def hold_out_tasks(tasks: list[Task]) -> tuple[list[Task], list[Task]]:
    """Split tasks into those to fit on and those to judge by: every eighth, or the last one of fewer."""
    held = held_out_of(len(tasks))
    return [t for i, t in enumerate(tasks) if i not in held], [t for i, t in enumerate(tasks) if i in held]


def check_held(held: list[Tensor], boundary: int, fitted: int, chosen: str) -> list[Tensor]:
    """Return the held-out sequences that are long enough to have context rows.

    Args:
        held: Sequences [1, T].
        boundary: Boundary of the plan.
        fitted: Number of sequences that were fitted on.
        chosen: What they choose, "lambda" or "steps".
    """
    if not held:
        alone = " (or a single lambda)" if chosen == "lambda" else ""
        raise ValueError(
            f"holdout: expected sequences to choose {chosen} by{alone}, got none of {fitted} sequences: "
            f"without a holdout, every {HOLD_EVERY}th sequence of the batches is held out, or the last one of fewer, "
            "but never the only one"
        )
    longer = [ids for ids in held if ids.shape[1] - 1 > boundary - 1 + count_continuation(ids)]
    if not longer:
        longest = max(ids.shape[1] for ids in held)
        raise ValueError(
            f"holdout: expected sequences longer than the boundary {boundary} and a continuation, got at most "
            f"{longest} tokens"
        )
    return longer


def check_lambdas(lambdas: Sequence[float] | None) -> tuple[float, ...]:
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
