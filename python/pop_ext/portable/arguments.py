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


def causal_mask(rows: int, keys: int, device: torch.device) -> Tensor:
    """Return the mask of the last ``rows`` of ``keys`` positions: bool ``[1, 1, rows, keys]``, True where one attends.

    transformers passes no mask where the attention is causal by itself, which holds for all rows together: torch's
    own causal attention aligns the first of few queries with the first key.
    """
    key = torch.arange(keys, device=device)
    return (key <= key[keys - rows :, None])[None, None]
