"""Compute a model's bits per byte of a text, with long sliding windows."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

CONTEXT = 1024
STRIDE = 512


def windows(tokens: np.ndarray, context: int = CONTEXT, stride: int = STRIDE) -> list[tuple[np.ndarray, int]]:
    """Yield windows of at most `context` + 1 tokens, each with the index of its first prediction that counts.

    Every token after the first is predicted exactly once, with at least `context - stride` tokens before it where the
    text has that many.
    """
    result, done = [], 1
    while done < len(tokens):
        end = min(len(tokens), max(done + stride, context + 1))
        begin = max(0, end - context - 1)
        result.append((tokens[begin:end], done - begin - 1))
        done = end
    return result


def total_nll(nll: Callable[[Tensor], Tensor], docs: list[np.ndarray], context: int = CONTEXT) -> float:
    """Return the nats of all tokens of `docs` except the separator that each begins with."""
    total = 0.0
    for doc in docs:
        for window, first in windows(doc, context, context // 2):
            loss = nll(torch.from_numpy(window.astype(np.int64))[None])
            total += float(loss[0, first:].double().sum())
    return total


def bits_per_byte(nats: float, byte_count: int) -> float:
    """Convert the nats of a text of `byte_count` bytes to bits per byte."""
    return nats / math.log(2) / byte_count
