"""The head of a language model, on the few rows of a prefill that get logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pop_ext.replaced import runs_as_written


def apply_head(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """``head(hidden)``, for a plain linear on a CPU by ``torch.ops.pop.linear``.

    For a row or a few that streams the weight past once, at the speed of memory.

    Args:
        head: any module.
        hidden: ``[..., hidden_size]``, after the final norm.

    Returns:
        ``[..., vocab]``.
    """
    plain = hidden.is_cpu and _is_plain(head, hidden)
    logits: torch.Tensor = torch.ops.pop.linear(hidden, head.weight) if plain else head(hidden)
    return logits


def _is_plain(head: Any, hidden: torch.Tensor) -> bool:
    """Whether a module computes ``hidden @ weight.T`` and nothing else, and nobody has put anything on it."""
    of_linear = type(head) is nn.Linear and head._parameters.get("bias") is None and runs_as_written(head)
    if not of_linear or torch.is_autocast_enabled("cpu"):
        return False
    weight = head.weight
    if type(weight) not in (torch.Tensor, nn.Parameter) or weight.layout is not torch.strided:
        return False
    alike = weight.dtype == hidden.dtype and weight.device == hidden.device
    return alike and weight.stride(-1) == 1
