"""What is passed as a model: a module, or what ``torch.compile`` has wrapped around one."""

from __future__ import annotations

from typing import Any

from torch import nn


def check_module(model: object) -> None:
    """Raises TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Hugging Face model, got {type(model).__name__}")


def uncompiled(model: Any) -> Any:
    """The model inside the wrapper of ``torch.compile``; any other object as it is."""
    return getattr(model, "_orig_mod", model)
