"""Bind the arguments of a decoder layer by name, and take those of its last rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pop_ext.hf.compat import parameters_of

MASK = "attention_mask"


def bind(layer_class: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the arguments of a layer's ``forward`` by name, and the name of its hidden states."""
    names = list(parameters_of(layer_class.forward))
    return {**dict(zip(names, args, strict=False)), **kwargs}, names[0]


def last_rows(call: dict[str, Any], total: int, rows: int) -> dict[str, Any]:
    """Return the arguments of a layer for the last of its rows.

    Tensors that have a value per row are cut: those of ``[..., total, features]``, such as hidden states, cos and sin
    and 4-D masks, and those of ``[..., total]``, such as positions. A 2-D mask tells which keys are real and stays.

    Args:
        call: arguments by name.
        total: rows of the call.
        rows: number of last rows to take.
    """
    return {name: _last_rows(name, value, total, rows) for name, value in call.items()}


def _last_rows(name: str, value: Any, total: int, rows: int) -> Any:
    if name == "position_embeddings" and isinstance(value, (tuple, list)):
        return tuple(_last_rows(name, item, total, rows) for item in value)
    if name == "position_embeddings" and isinstance(value, dict):
        return {kind: _last_rows(name, item, total, rows) for kind, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    if name in ("position_ids", "cache_position") or (value.ndim <= 2 and "mask" not in name):
        return value[..., -rows:] if value.ndim > 0 and value.shape[-1] == total else value
    if value.ndim >= 3 and value.shape[-2] == total:
        return value[..., -rows:, :]
    return value


def causal_mask(total: int, rows: int, keys: int, device: torch.device) -> Tensor:
    """Return the mask of the last of ``total`` rows: bool ``[1, 1, rows, keys]``, True where a row attends to a key.

    Without a mask torch's causal attention aligns the first row with the first key. transformers passes none where that
    holds for all rows together: in a first prefill, also over a static cache, whose further keys are empty.
    """
    row = torch.arange(total - rows, total, device=device)
    return (torch.arange(keys, device=device) <= row[:, None])[None, None]
