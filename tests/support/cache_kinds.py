"""Caches of every kind that a prefill fills, and decode over them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

KINDS = ("DynamicCache()", "DynamicCache(config)", "StaticCache")
"""Without a config a dynamic cache keeps every position; with one, layers with a window keep only the window."""


def new_cache(kind: str, model: nn.Module, capacity: int = 64) -> Cache:
    """Return an empty cache of a kind in KINDS. `capacity` is the length of a static cache."""
    if kind == "StaticCache":
        return StaticCache(config=model.config, max_cache_len=capacity)
    return DynamicCache(config=model.config) if "config" in kind else DynamicCache()


@torch.no_grad()
def decode(model: nn.Module, cache: Cache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Decode `ids` [batch, steps] one by one with the stock model over `cache`.

    Args:
        mask: [batch, positions in the cache], 0 for padding; None if there is none.

    Returns:
        Logits [batch, steps, vocab].
    """
    logits = []
    for step in range(ids.shape[1]):
        call = {}
        if mask is not None:
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], dim=1)
            call = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        logits.append(model(ids[:, step : step + 1], past_key_values=cache, use_cache=True, **call).logits)
    return torch.cat(logits, dim=1)
