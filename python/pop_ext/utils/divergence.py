"""The KL divergence between two distributions of the next token."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) of each row in nats, [...] from log-probabilities [..., vocabulary].

    A token that p rules out adds nothing, also where its log-probability is minus infinity.
    """
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
