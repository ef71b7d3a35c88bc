"""The call of ``torch.ops.pop.prefill`` that a request stands for, and the tables of RoPE that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pop_ext.hf.inputs import PrefillRequest
from pop_ext.hf.loaded import LoadedWeights
from pop_ext.hf.packing import lengths


def run_operator(
    loaded: LoadedWeights,
    request: PrefillRequest,
    window_only: bool,
    rows: torch.Tensor,
    tables: Sequence[torch.Tensor | None],
    key_cache: list[torch.Tensor],
    value_cache: list[torch.Tensor],
) -> torch.Tensor:
    """Run the operator on the lengths of a request and on the given tensors; return hidden states of wanted rows."""
    packed = request.packed
    cos, sin, cos_local, sin_local = tables
    return torch.ops.pop.prefill(
        loaded.handle,
        rows,
        cos,
        sin,
        packed.cu_seqlens(),
        lengths(packed.past),
        lengths(packed.cache_start),
        lengths(request.boundary),
        lengths(request.num_logits),
        key_cache,
        value_cache,
        packed.slot_table,
        False,  # restore_on_error: the transaction of the caller restores
        window_only,
        cos_local,
        sin_local,
        torch.tensor(request.spans, dtype=torch.int32, device="cpu") if request.spans else None,
        request.feature_index,
        None if request.feature_index is None else list(request.features),
    )


def rope_tables(loaded: LoadedWeights, rotary: Any, positions: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Return cos and sin of RoPE for packed positions.

    Args:
        loaded: what is loaded of the model.
        rotary: rotary embedding of the model.
        positions: ``[rows]`` or ``[3, rows]``.

    Returns:
        cos, sin, cos_local and sin_local, each float32 ``[rows, rotary_dim]``, or half as wide (gpt-oss). The local
        ones are for layers with a second RoPE base or without RoPE, and for q if its scale follows the position; None
        in other models.
    """
    kinds = loaded.family.rope_kinds
    # The module reads only dtype and device of its first argument. The tables are float32 in every dtype.
    like = torch.empty(0, dtype=torch.float32, device=loaded.device)
    if not kinds:
        cos, sin = rotary(like, positions.unsqueeze(-2))  # [1, rows], or [3, 1, rows]
        if loaded.spec.query_rope:
            scale = _query_scale(rotary.config.rope_parameters, positions, loaded.dtype)
            return cos[0], sin[0], cos[0] * scale, sin[0] * scale
        if not any(loaded.spec.rope_table):
            return cos[0], sin[0], None, None
        return cos[0], sin[0], torch.ones_like(cos[0]), torch.zeros_like(sin[0])
    tables = {kind: rotary(like, positions[None], kind) for kind in kinds if kind in rotary.layer_types}
    cos, sin = tables.get(kinds[0]) or tables[kinds[1]]  # a model may have layers of one kind only
    if not any(loaded.spec.rope_table):
        return cos[0], sin[0], None, None
    cos_local, sin_local = tables[kinds[1]]
    return cos[0], sin[0], cos_local[0], sin_local[0]


def _query_scale(rope_parameters: dict[str, Any], positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the factor of q at each position, rounded to ``dtype`` as in the stock model: float32 ``[rows, 1]``."""
    beta, length = rope_parameters["llama_4_scaling_beta"], rope_parameters["original_max_position_embeddings"]
    scale = 1 + beta * torch.log(1 + torch.floor(positions / length))
    return scale.to(dtype).float().unsqueeze(-1)
