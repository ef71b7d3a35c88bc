"""Compute the log-probabilities that engines are compared by. Needs numpy only, which every engine installs."""

from __future__ import annotations

from typing import Any

import numpy as np


def log_probs_of(logits: Any, keep: int | None) -> dict[int, float]:
    """Return token -> log-probability of the ``keep`` most probable tokens, or of all.

    Args:
        logits: ``[vocab]``, in any form that numpy accepts.
        keep: number of tokens; None: all.
    """
    row = np.asarray(logits, dtype=np.float64)
    shifted = row - row.max()
    values = shifted - np.log(np.exp(shifted).sum())
    order = np.arange(len(values)) if keep is None else np.argsort(-values)[:keep]
    return {int(token): float(values[token]) for token in order}
