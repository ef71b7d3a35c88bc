"""Fake kernels of ``torch.ops.pop``: the shapes and dtypes of results, for torch.compile and meta tensors.

Each function has the signature of its operator and describes what the operator computes. Unless a docstring says
otherwise, all floating tensors of a call have one dtype: float32, bfloat16 or float16; ``cos`` and ``sin`` may have any
of the three.

The operators take packed rows: the new tokens of all sequences, one after the other, without padding. These arguments
say where they belong; they are int32 and on the CPU, since no operator synchronises with a device:

- ``cu_seqlens [batch + 1]``: sequence ``i`` has the rows ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.
- ``past_lens [batch]``: positions that are in the cache already.
- ``cache_start [batch]``: position ``p`` of sequence ``i`` lies in slot ``cache_start[i] + p``.
- ``slot_table [batch, >= past + new]``: if given, it lies in slot ``slot_table[i, p]`` instead.

Caches are ``[batch, kv_heads, capacity, head_dim]``; only ``head_dim`` has to be contiguous.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from pop_ext.ops.fake_checks import check_devices, check_lengths, fake


@fake("prefill")
def prefill(
    model: int,
    input: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    past_lens: Tensor,
    cache_start: Tensor,
    boundary: Tensor,
    logits_to_keep: Tensor,
    key_cache: list[Tensor],
    value_cache: list[Tensor],
    slot_table: Tensor | None = None,
    restore_on_error: bool = True,
    window_only: bool = False,
    cos_local: Tensor | None = None,
    sin_local: Tensor | None = None,
    blocks: Tensor | None = None,
    feature_index: Tensor | None = None,
    features: list[Tensor] | None = None,
) -> Tensor:
    """Prefill packed sequences by the plan of a loaded model.

    Writes K and V of all new positions into the caches of all layers.

    Args:
        model: handle of `load`.
        input: ``[rows]`` int64 or int32 token ids, or ``[rows, hidden_size]`` embeddings.
        cos: ``[rows, rotary_dim]`` or ``[rows, rotary_dim / 2]``, at the positions of the rows.
        sin: the same shape.
        boundary: ``[batch]`` int32 on the CPU, boundary rows of each sequence: 1 to its new tokens.
        logits_to_keep: ``[batch]`` int32 on the CPU, rows whose hidden states are returned: 1 to the new tokens.
        key_cache: one tensor a layer.
        value_cache: one tensor a layer; no two caches may share memory.
        restore_on_error: restore the cache slots that were written if the call fails midway.
        window_only: in an omitted layer with a window W, project only the last ``W - 1`` context rows.
        cos_local: as ``cos``, for layers whose ``rope_table`` is 1.
        sin_local: as ``sin``, for the same layers.
        blocks: ``[blocks, 3]`` int32 on the CPU, (sequence, begin, end): new tokens that attend in both directions.
        feature_index: ``[rows]`` int64 or int32, the row of ``features`` that is added to a row of ``input``, or -1.
        features: ``[tokens, hidden_size]`` for each of the first layers, added after it.

    Returns:
        ``[sum(logits_to_keep), hidden_size]`` in the model's dtype: final-norm hidden states of the last rows.
    """
    check_devices(
        "prefill",
        input=input,
        cos=cos,
        sin=sin,
        cos_local=cos_local,
        sin_local=sin_local,
        feature_index=feature_index,
        features=features,
        key_cache=key_cache,
        value_cache=value_cache,
    )
    check_lengths(
        "prefill",
        cu_seqlens=cu_seqlens,
        past_lens=past_lens,
        cache_start=cache_start,
        boundary=boundary,
        logits_to_keep=logits_to_keep,
        slot_table=slot_table,
        blocks=blocks,
    )
    hidden_size = json.loads(torch.ops.pop.info(model))["spec"]["hidden_size"]
    wanted = torch.library.get_ctx().new_dynamic_size(min=1)
    return key_cache[0].new_empty((wanted, hidden_size))


@fake("linear")
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x . weight^T``, accumulated in float32: ``x [..., k]``, ``weight [n, k]`` -> ``[..., n]``."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@fake("fp8_linear")
def fp8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Return ``x . weight^T`` with operands in 8-bit floats, in the dtype of ``x``.

    Args:
        x: ``[..., k]``, rounded to e4m3 row by row; bfloat16 on CUDA.
        weight: ``[n, k]`` float8_e4m3fn, as `quantize_rows` returns it. ``k`` and ``n`` are multiples of 16.
        weight_scale: ``[n]`` float32.

    Returns:
        ``[..., n]``.
    """
    check_devices("fp8_linear", x=x, weight=weight, weight_scale=weight_scale)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@fake("int8_linear")
def int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, round_rows: bool = True) -> Tensor:
    """Return ``x . weight^T`` with operands in 8-bit integers, in the dtype of ``x``. On a CPU only.

    Sums of each group of elements with a scale are exact int32, or float32 without ``round_rows``. They are multiplied
    by the scales in float32, and rounded once.

    Args:
        x: ``[..., k]``, rounded to int8 row by row if ``round_rows``; ``k`` is at most 132104.
        weight: ``[n, k]`` int8, as `quantize_rows` or a quantised checkpoint holds it: any value, also -128.
        weight_scale: ``[n]`` float32, or ``[n, k / g]`` for groups of g elements of a row: 32, 64, 128 or 256.

    Returns:
        ``[..., n]``.
    """
    check_devices("int8_linear", x=x, weight=weight, weight_scale=weight_scale)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@fake("quantize_rows")
def quantize_rows(x: Tensor, products: str = "fp8") -> tuple[Tensor, Tensor]:
    """Round the rows of ``x`` to 8 bits, each scaled so that its largest magnitude becomes the largest value.

    Args:
        x: ``[..., width]``.
        products: "fp8" rounds to e4m3, whose largest value is 448; "int8" to integers from -127 to 127, on a CPU.

    Returns:
        The rounded rows, ``[..., width]`` float8_e4m3fn or int8, and the factor to multiply each with, ``[...]``
        float32. It is NaN for int8 rows that hold NaN or infinity.
    """
    dtype = torch.int8 if products == "int8" else torch.float8_e4m3fn
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@fake("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """Return the RMSNorm of ``x [..., width]``, by ``weight [width]`` plus ``weight_offset``: ``[..., width]``."""
    check_devices("rms_norm", x=x, weight=weight)
    return x.new_empty(x.shape)


@fake("add_rms_norm")
def add_rms_norm(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    eps: float,
    delta_bias: Tensor | None = None,
    delta_norm: Tensor | None = None,
    weight_offset: float = 0.0,
    delta_scale: float = 1.0,
) -> Tensor:
    """Add to the residual stream in place, and return the RMSNorm of the sum.

    Args:
        x: ``[rows, width]``, the residual stream; becomes ``x + delta_scale * (delta + delta_bias)``, rounded once.
        delta: ``[rows, width]``.
        weight: ``[width]``, of the norm that is returned.
        eps: of all norms.
        delta_bias: ``[width]``.
        delta_norm: ``[width]``; if given, the RMSNorm of ``delta + delta_bias`` with this weight is added instead.
        weight_offset: added to ``weight`` and ``delta_norm``; Gemma stores its norm weights less 1.
        delta_scale: factor of what is added to ``x``, after its norm if it has one (Granite).

    Returns:
        ``[rows, width]``.
    """
    check_devices("add_rms_norm", x=x, delta=delta, weight=weight, delta_bias=delta_bias, delta_norm=delta_norm)
    return x.new_empty(x.shape)


@fake("gated_act")
def gated_act(
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
) -> Tensor:
    """Return ``activation(gate + gate_bias) * (up + up_bias)``.

    "clamped_swiglu" is ``(u + 1) * g * sigmoid(swiglu_alpha * g)`` instead, with ``g`` and ``u`` the two with their
    biases, both at most ``swiglu_limit`` and ``u`` at least its negative (gpt-oss).

    Args:
        gate: ``[..., width]``.
        up: ``[..., width]``.
        activation: "silu", "gelu", "gelu_tanh" or "clamped_swiglu".
        gate_bias: ``[width]``.
        up_bias: ``[width]``.

    Returns:
        The shape of ``gate``.
    """
    check_devices("gated_act", gate=gate, up=up, gate_bias=gate_bias, up_bias=up_bias)
    return gate.new_empty(gate.shape)


@fake("attention")
def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cu_seqlens: Tensor,
    past_lens: Tensor,
    cache_start: Tensor,
    scale: float,
    window: int = 0,
    slot_table: Tensor | None = None,
    softcap: float = 0.0,
    blocks: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute causal attention over a cache.

    Args:
        query: ``[rows, heads, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        scale: factor of the scores.
        window: a row sees this many positions up to its own; 0: all of them.
        softcap: if positive, a scaled score s becomes ``softcap * tanh(s / softcap)`` (Gemma 2).
        blocks: ``[blocks, 3]`` int32 on the CPU, (sequence, begin, end): new tokens that attend in both directions.
        sinks: ``[heads]``, one more score of each head, which takes its share of the softmax and adds no value.

    Returns:
        ``[rows, heads, head_dim]``.
    """
    check_devices("attention", query=query, key_cache=key_cache, value_cache=value_cache, sinks=sinks)
    check_lengths(
        "attention",
        cu_seqlens=cu_seqlens,
        past_lens=past_lens,
        cache_start=cache_start,
        slot_table=slot_table,
        blocks=blocks,
    )
    return query.new_empty(query.shape)


@fake("fold_kv")
def fold_kv(k_proj: list[Tensor], v_proj: list[Tensor], input_norm: list[Tensor], norm_offset: float = 0.0) -> Tensor:
    """Fold the input norms of a run of layers into their K and V weights, and stack them.

    Args:
        k_proj: ``[kv_dim, hidden_size]``, one a layer.
        v_proj: ``[kv_dim, hidden_size]``, one a layer.
        input_norm: ``[hidden_size]``, one a layer; an empty list: the weights are stacked as they are.
        norm_offset: added to ``input_norm``.

    Returns:
        ``[layers * 2 * kv_dim, hidden_size]``: K of the first layer, its V, K of the second layer, and so on.
    """
    check_devices("fold_kv", k_proj=k_proj, v_proj=v_proj, input_norm=input_norm)
    kv_dim, hidden_size = k_proj[0].shape
    return k_proj[0].new_empty((2 * len(k_proj) * kv_dim, hidden_size))


@fake("rope_cache_write")
def rope_cache_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    past_lens: Tensor,
    cache_start: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    slot_table: Tensor | None = None,
    norm_offset: float = 0.0,
    interleaved: bool = False,
    norm_after: bool = False,
) -> None:
    """Apply RoPE to Q in place and to K, and write K and V to the cache.

    Args:
        query: ``[rows, heads, head_dim]``.
        key: ``[rows, kv_heads, head_dim]``.
        value: ``[rows, kv_heads, head_dim]``.
        cos: ``[rows, rotary_dim]``.
        sin: ``[rows, rotary_dim]``.
        q_norm: ``[head_dim]``; if given, each head of Q is RMS-normalised before RoPE.
        k_norm: ``[head_dim]``, likewise for K.
        norm_eps: of these norms.
        norm_offset: added to ``q_norm`` and ``k_norm``.
        interleaved: RoPE turns pairs of channels (2i, 2i + 1) instead of (i, i + rotary_dim / 2) (GLM, ERNIE).
        norm_after: heads are RMS-normalised after RoPE (HunYuan).
    """
    check_devices(
        "rope_cache_write",
        query=query,
        key=key,
        value=value,
        cos=cos,
        sin=sin,
        key_cache=key_cache,
        value_cache=value_cache,
        q_norm=q_norm,
        k_norm=k_norm,
    )
    check_lengths(
        "rope_cache_write",
        cu_seqlens=cu_seqlens,
        past_lens=past_lens,
        cache_start=cache_start,
        slot_table=slot_table,
    )


@fake("kv_project")
def kv_project(
    hidden: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    past_lens: Tensor,
    cache_start: Tensor,
    eps: float,
    key_cache: list[Tensor],
    value_cache: list[Tensor],
    k_bias: list[Tensor] | None = None,
    v_bias: list[Tensor] | None = None,
    k_norm: list[Tensor] | None = None,
    slot_table: Tensor | None = None,
    norm_offset: float = 0.0,
    interleaved: bool = False,
    norm_after: bool = False,
) -> None:
    """Project K and V of a run of layers that read one hidden state, apply RoPE, and write them to the caches.

    This is the independent KV projection of omitted layers: RMSNorm and all K/V weights in one product.

    Args:
        hidden: ``[rows, hidden_size]``, before any norm.
        weight: ``[layers * 2 * kv_dim, hidden_size]``, as `fold_kv` returns it.
        cos: ``[rows, rotary_dim]``.
        sin: ``[rows, rotary_dim]``.
        eps: of the folded RMSNorm and of ``k_norm``.
        key_cache: one tensor a layer.
        value_cache: one tensor a layer.
        k_bias: ``[kv_dim]``, one a layer.
        v_bias: ``[kv_dim]``, one a layer.
        k_norm: ``[head_dim]``, one a layer; if given, each head of K is RMS-normalised before RoPE.
        norm_offset: added to ``k_norm``.
        interleaved: as for `rope_cache_write`.
        norm_after: as for `rope_cache_write`.
    """
    check_devices(
        "kv_project",
        hidden=hidden,
        weight=weight,
        cos=cos,
        sin=sin,
        key_cache=key_cache,
        value_cache=value_cache,
        k_bias=k_bias,
        v_bias=v_bias,
        k_norm=k_norm,
    )
    check_lengths(
        "kv_project",
        cu_seqlens=cu_seqlens,
        past_lens=past_lens,
        cache_start=cache_start,
        slot_table=slot_table,
    )
