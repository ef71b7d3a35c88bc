"""Apply the language-model head to the few rows of a prefill that get logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pop_ext.hf.patches import is_unpatched


def apply_head(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Apply a language-model head to the few rows that get logits.

    On a CPU a plain linear head runs as ``torch.ops.pop.linear``, which reads the weight once, at memory bandwidth. Any
    other head is called as a module.

    Args:
        head: any module.
        hidden: ``[..., hidden_size]``, after the final norm.

    Returns:
        Logits ``[..., vocab]``.
    """
    plain = hidden.is_cpu and _is_plain(head, hidden)
    logits: torch.Tensor = torch.ops.pop.linear(hidden, head.weight) if plain else head(hidden)
    return logits


def _is_plain(head: Any, hidden: torch.Tensor) -> bool:
    """Return whether a module computes ``hidden @ weight.T`` and nothing else, without hooks or replaced code."""
    unmodified_linear = type(head) is nn.Linear and head._parameters.get("bias") is None and is_unpatched(head)
    if not unmodified_linear or torch.is_autocast_enabled("cpu"):
        return False
    weight = head.weight
    if type(weight) not in (torch.Tensor, nn.Parameter) or weight.layout is not torch.strided:
        return False
    same_kind = weight.dtype == hidden.dtype and weight.device == hidden.device
    return same_kind and weight.stride(-1) == 1
