"""Calls of torch.ops.pop.prefill on caches of the caller, as from an engine without Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pop_ext import NativeModel
from torch import Tensor

SENTINEL = 7776.0  # exact in every dtype


def int32(values: Sequence[int]) -> Tensor:
    """Return lengths of sequences on the CPU, where the operators read them."""
    return torch.tensor(list(values), dtype=torch.int32, device="cpu")


def offsets(lengths: Sequence[int]) -> Tensor:
    """Return cu_seqlens [batch + 1] of sequences of these lengths."""
    return int32([0, *lengths]).cumsum(0, dtype=torch.int32)


def rope_of(native: NativeModel, positions: Tensor) -> dict[str, Tensor]:
    """Return the RoPE tables cos and sin, float32 [rows, rotary_dim], of positions [rows]."""
    rotary = native.model.model.rotary_emb
    kinds: dict[str, tuple[str, ...]] = {"": ()}
    if hasattr(rotary, "layer_types"):
        full, local = (kind if kind in rotary.layer_types else None for kind in ("full_attention", "sliding_attention"))
        kinds = {"": (full or local,)} | ({"_local": (local,)} if any(native.spec.rope_table) else {})
    tables = {}
    for suffix, kind in kinds.items():
        cos, sin = rotary(torch.empty(0), positions[None], *kind)
        tables |= {f"cos{suffix}": cos[0], f"sin{suffix}": sin[0]}
    return tables


# Memory layouts of the caches of all layers. Each returns (buffers, keys, values): keys and values are one view [batch,
# kv_heads, capacity, head_dim] a layer, of the buffers, which are filled with sentinels.


def separate(layers: int, batch: int, heads: int, capacity: int, dim: int, dtype: torch.dtype):
    keys = [torch.full((batch, heads, capacity, dim), SENTINEL, dtype=dtype) for _ in range(layers)]
    values = [torch.full((batch, heads, capacity, dim), SENTINEL, dtype=dtype) for _ in range(layers)]
    return [*keys, *values], keys, values


def one_tensor_of_layers(layers, batch, heads, capacity, dim, dtype):
    keys, values = torch.full((2, layers, batch, heads, capacity, dim), SENTINEL, dtype=dtype)
    return [keys, values], list(keys), list(values)


def slots_before_heads(layers, batch, heads, capacity, dim, dtype):
    buffers = [torch.full((2, batch, capacity, heads, dim), SENTINEL, dtype=dtype) for _ in range(layers)]
    return buffers, [b[0].transpose(1, 2) for b in buffers], [b[1].transpose(1, 2) for b in buffers]


def keys_and_values_interleaved(layers, batch, heads, capacity, dim, dtype):
    buffer = torch.full((batch, capacity, layers, 2, heads, dim), SENTINEL, dtype=dtype)
    views = [[buffer[:, :, layer, kind].transpose(1, 2) for layer in range(layers)] for kind in range(2)]
    return [buffer], *views


def padded_channels(layers, batch, heads, capacity, dim, dtype):
    keys, values = torch.full((2, layers, batch, heads, capacity, dim + 3), SENTINEL, dtype=dtype)
    return [keys, values], [k[..., :dim] for k in keys], [v[..., 3:] for v in values]


LAYOUTS = {
    "separate": separate,
    "[L, B, H, S, D]": one_tensor_of_layers,
    "[B, S, H, D]": slots_before_heads,
    "[B, S, L, 2, H, D]": keys_and_values_interleaved,
    "padded channels": padded_channels,
}


def op_call(
    native: NativeModel,
    prompts: Sequence[Tensor],
    *,
    past: Sequence[int] | None = None,
    start: Sequence[int] | None = None,
    boundary: Sequence[int] | None = None,
    logits_to_keep: Sequence[int] | None = None,
    capacity: int | None = None,
    layout: str = "separate",
) -> dict[str, Any]:
    """Return keyword arguments of torch.ops.pop.prefill for the new tokens `prompts` [T_i] of each sequence."""
    lengths, batch = [len(ids) for ids in prompts], len(prompts)
    past, start = list(past or [0] * batch), list(start or [0] * batch)
    needed = max(s + p + n for s, p, n in zip(start, past, lengths, strict=True))
    spec = native.spec
    shape = (spec.num_layers, batch, spec.num_kv_heads, capacity or needed + 2, spec.head_dim)
    _, keys, values = LAYOUTS[layout](*shape, native.dtype)
    positions = torch.cat([torch.arange(p, p + n) for p, n in zip(past, lengths, strict=True)])
    return {
        "model": native.handle,
        "input": torch.cat(list(prompts)),
        **rope_of(native, positions),
        "cu_seqlens": offsets(lengths),
        "past_lens": int32(past),
        "cache_start": int32(start),
        "boundary": int32(boundary or [min(native.plan.boundary, n) for n in lengths]),
        "logits_to_keep": int32(logits_to_keep or [1] * batch),
        "key_cache": keys,
        "value_cache": values,
    }


def run_op(call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return torch.ops.pop.prefill(**call)
