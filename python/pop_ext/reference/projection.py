"""The independent KV projection in plain PyTorch, and a decoder whose omitted layers run nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from pop_ext.hf.compat import cache_argument, with_cache
from pop_ext.hf.modules import Module, family_function
from pop_ext.hf.restore import forward_attribute, replaced_forward
from pop_ext.plans.norms import normalize_unweighted
from pop_ext.plans.projections import Projections, fitted_biases
from pop_ext.reference.checks import PlanLike
from pop_ext.utils.tensors import is_out_of_memory


def project_kv(
    layer: Module, hidden_states: Tensor, cos: Tensor, sin: Tensor, fitted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the independent KV projection of a layer: K = rope(k_norm(Wk norm(h))) and V = Wv norm(h).

    The norms apply only in families that have them. HunYuan's norm of K, of another name, follows RoPE.

    Args:
        layer: Decoder layer.
        hidden_states: ``h``, [1, rows, hidden].
        cos: As the model's rotary module returns it.
        sin: As the model's rotary module returns it.
        fitted: [2 * kv_dim, hidden], takes the place of [Wk; Wv] and reads norm(h) without the norm's weight and bias.
            None for the layer's own weights.

    Returns:
        K and V, [1, kv_heads, rows, head_dim] each.

    Source: POP (arXiv 2602.03295), independent KV projection.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden_states) if hasattr(layer, "input_layernorm") else hidden_states
    heads = (*normed.shape[:-1], -1, attention.head_dim)
    if fitted is not None:
        plain = normalize_unweighted(layer, hidden_states).to(hidden_states.dtype)
        keys, values = (plain @ fitted.to(plain).T).chunk(2, dim=-1)
        k_bias, v_bias = fitted_biases(layer)
        if k_bias is not None and v_bias is not None:
            keys, values = keys + k_bias, values + v_bias
    elif hasattr(attention, "qkv_proj"):  # Phi-3
        kv_dim = attention.config.num_key_value_heads * attention.head_dim
        keys, values = attention.qkv_proj(normed)[..., -2 * kv_dim :].split(kv_dim, dim=-1)
    else:
        keys, values = attention.k_proj(normed), attention.v_proj(normed)
    k_norm: Module = getattr(attention, "k_norm", None)
    over_heads = k_norm is not None and k_norm.weight.numel() == keys.shape[-1]  # OLMo 2
    if over_heads:
        keys = k_norm(keys)
    keys, values = keys.view(heads), values.view(heads).transpose(1, 2)
    if k_norm is not None and not over_heads:
        keys = k_norm(keys)
    keys = keys.transpose(1, 2)
    if _applies_rope(attention):
        apply_rotary_pos_emb = family_function(attention, "apply_rotary_pos_emb")
        _, keys = apply_rotary_pos_emb(keys, keys, cos, sin)
    if hasattr(attention, "key_layernorm"):
        keys = attention.key_layernorm(keys)
    return keys, values


def _applies_rope(attention: Module) -> bool:
    """Return whether a layer applies RoPE; SmolLM3, EXAONE 4 and its MoE have layers that do not."""
    if type(attention).__name__ in ("Exaone4Attention", "ExaoneMoeAttention"):
        return attention.sliding_window is None or attention.is_sliding
    return bool(getattr(attention, "use_rope", True))


def check_projection(layer: Module, row: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> None:
    """Check on one row that ``project_kv`` computes the K and V that the layer itself writes into a cache.

    Families differ in details: norms, layers without RoPE, clipped projections. This refuses a family that
    ``project_kv`` does not cover.

    Args:
        layer: Decoder layer.
        row: Hidden state [1, 1, hidden].
        cos: For this row, as the rotary module returns it.
        sin: For this row, as the rotary module returns it.
        position_ids: Of this row, as the decoder hands them to its layers; None if it hands them none.

    Raises:
        ValueError: K or V differ.
    """
    attention, cache = layer.self_attn, DynamicCache()
    call: dict[str, Any] = {"position_embeddings": (cos, sin), "attention_mask": None}
    if position_ids is not None:
        call["position_ids"] = position_ids  # Ministral 3 scales queries by them
    if hasattr(layer, "input_layernorm"):
        attention(hidden_states=layer.input_layernorm(row), **call, **with_cache(attention, cache))
    else:  # run the whole layer, which may have a norm of another name
        type(layer).forward(layer, row, **call, **with_cache(layer, cache))
    written: Any = cache.layers[attention.layer_idx]
    try:
        projected = project_kv(layer, row, cos, sin)
        equal = all(
            torch.allclose(ours, theirs, rtol=1e-2, atol=1e-5, equal_nan=True)
            for ours, theirs in zip(projected, (written.keys, written.values), strict=True)
        )
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        equal = False  # the shapes do not match
    if not equal:
        raise ValueError(
            "model: expected K = rope(k_norm?(k_proj(normed input))) and V = v_proj(normed input), but "
            f"{type(attention).__name__} of layer {attention.layer_idx} computes something else"
        )


@contextmanager
def omitted_layers(layers: Sequence[Module], plan: PlanLike) -> Iterator[None]:
    """Replace each omitted layer inside the block: write its projected K and V to the cache and return its input."""

    fitted: Projections | None = getattr(plan, "projections", None)

    def omitted_forward(layer: Module, matrix: Tensor | None) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *_: Any, **kwargs: Any) -> Tensor:
            cos, sin = kwargs["position_embeddings"]
            positions = kwargs.get("position_ids")
            last = None if positions is None else positions[..., -1:]
            check_projection(layer, hidden_states[:, -1:], cos[..., -1:, :], sin[..., -1:, :], last)
            keys, values = project_kv(layer, hidden_states, cos, sin, matrix)
            kwargs[cache_argument(type(layer).forward)].update(keys, values, layer.self_attn.layer_idx)
            return hidden_states

        return forward

    with ExitStack() as stack:
        for index in plan.omit:
            matrix = None if fitted is None else fitted.matrices[index]
            layer = layers[index]
            stack.enter_context(replaced_forward(layer, omitted_forward(layer, matrix), forward_attribute(layer)))
        yield
