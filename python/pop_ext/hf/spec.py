"""Make the runtime's ``ModelSpec`` of a Hugging Face model, from its config and what weights it has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from pop_ext import _core
from pop_ext.hf.architectures import UnsupportedModelError, decoder_of, dropped_softcap_reason
from pop_ext.hf.family import Family

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class _Ref(Protocol):
    """What is read of a reference to a weight."""

    @property
    def tensor(self) -> torch.Tensor: ...


def _check_config(family: Family, config: Any, head_dim: int, refs: Mapping[str, _Ref]) -> None:
    """Raise UnsupportedModelError for a config whose results the native runtime does not reproduce."""
    if head_dim % 8 != 0 or not 8 <= head_dim <= 256:
        raise UnsupportedModelError(f"config.head_dim: expected a multiple of 8 up to 256, got {head_dim}")
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError("config.use_bidirectional_attention: expected a causal model, got True")
    if family.norms_over_heads and "layers.0.q_bias" in refs:
        raise UnsupportedModelError("config.attention_bias: expected none before norms over all heads, got True")
    if getattr(config, "clip_qkv", None) is not None:
        raise UnsupportedModelError(f"config.clip_qkv: expected None, got {config.clip_qkv}")
    reason = dropped_softcap_reason(config)
    if reason is not None:
        raise UnsupportedModelError(reason)
    activation = getattr(config, family.activation)
    if activation not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"config.{family.activation}: expected one of {', '.join(sorted(_ACTIVATIONS))}, got {activation}"
        )
    dtype = refs["embed_tokens"].tensor.dtype
    if dtype not in _DTYPES:
        raise UnsupportedModelError(f"model: expected float32, bfloat16 or float16 weights, got {dtype}")


def make_spec(family: Family, model: Any, refs: Mapping[str, _Ref]) -> _core.ModelSpec:
    """Make the runtime's spec of a model.

    Args:
        family: of the model.
        model: the model.
        refs: its weights by the runtime's names. Which optional ones exist decides on biases and norms.

    Raises:
        UnsupportedModelError: The native runtime does not reproduce what the config asks for.
    """
    config, decoder = model.config.get_text_config(decoder=True), decoder_of(model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    _check_config(family, config, head_dim, refs)
    scaling = getattr(decoder.layers[0].self_attn, "scaling", None)
    embedding = refs["embed_tokens"].tensor
    layers = range(config.num_hidden_layers)
    return _core.ModelSpec(
        architecture=family.model_type,
        dtype=_DTYPES[embedding.dtype],
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        rotary_dim=_rotary_dim(family, decoder.rotary_emb),
        rope_interleaved=family.rope_interleaved,
        query_rope=family.scales_queries,
        intermediate_size=_intermediate_size(config),
        vocab_size=embedding.shape[0],
        rms_norm_eps=config.rms_norm_eps,
        attention_scale=1.0 / math.sqrt(head_dim) if scaling is None else scaling,
        qkv_bias="layers.0.q_bias" in refs,
        o_bias="layers.0.o_bias" in refs,
        mlp_bias=any(slot.endswith(".gate_bias") for slot in refs),
        qk_norm="layers.0.q_norm" in refs,
        qk_norm_over_heads=family.norms_over_heads,
        qk_norm_after_rope=family.norms_after_rope,
        norm_weight_offset=family.norm_weight_offset,
        input_norms="input_norm" in family.layer,
        output_norms="attention_out_norm" in family.layer,
        residual_scale=config.residual_multiplier if family.multipliers else 1.0,
        embed_scale=(
            config.embedding_multiplier if family.multipliers else _embed_scale(decoder.embed_tokens, embedding.dtype)
        ),
        scale_inputs=family.multipliers,
        attention_softcap=(config.attn_logit_softcapping or 0.0) if family.caps_scores else 0.0,
        attention_sinks="sinks" in family.layer,
        window=[family.window(config, layer) for layer in layers],
        rope_table=[_rope_table(family, config, layer) for layer in layers],
        **_activation_fields(family, decoder, config),
        **_expert_fields(family, config, refs),
    )


def _activation_fields(family: Family, decoder: Any, config: Any) -> dict[str, Any]:
    """Return the fields of the spec that describe the activation of the MLP."""
    own = None if family.experts is None else family.experts.activation
    if own is None:
        return {"activation": _ACTIVATIONS[getattr(config, family.activation)]}
    experts = decoder.layers[0].mlp.experts
    return {"activation": own, "swiglu_alpha": experts.alpha, "swiglu_limit": experts.limit}


def _intermediate_size(config: Any) -> int:
    """Return the intermediate size of a dense layer. A model that has no such layer may not state it."""
    size: int | None = getattr(config, "intermediate_size", None)
    return config.moe_intermediate_size if size is None else size


def _expert_fields(family: Family, config: Any, refs: Mapping[str, _Ref]) -> dict[str, Any]:
    """Return the fields of the spec that describe experts; empty for a model without sparse layers.

    Raises:
        UnsupportedModelError: The router chooses groups of experts first.
    """
    experts = family.experts
    sparse = [int(family.is_sparse(config, layer)) for layer in range(config.num_hidden_layers)]
    if experts is None or 1 not in sparse:
        return {}
    groups = getattr(config, "n_group", 1)
    if groups != 1:
        raise UnsupportedModelError(f"config.n_group: expected 1 (no groups of experts), got {groups}")
    shared = refs.get(f"layers.{sparse.index(1)}.shared_gate_proj")
    return {
        "sparse": sparse,
        "num_experts": getattr(config, experts.count),
        "experts_per_token": config.num_experts_per_tok,
        "moe_intermediate_size": getattr(config, experts.inner_size),
        "norm_topk": experts.norm_topk(config),
        "norm_topk_eps": experts.norm_topk_eps,
        "routed_scale": 1.0 if experts.scale is None else getattr(config, experts.scale),
        "router_scores": experts.scores,
        "router_bias": "router_bias" in experts.layer,
        "router_float32": experts.float32,
        "shared_intermediate_size": 0 if shared is None else shared.tensor.shape[0],
        "shared_gate": "shared_gate" in experts.layer,
        "expert_bias": "experts_down_bias" in experts.layer,
        "experts_transposed": experts.transposed,
        "experts_interleaved": experts.interleaved,
        "router_logit_bias": "router_logit_bias" in experts.layer,
    }


def _embed_scale(embedding: Any, dtype: torch.dtype) -> float:
    """Return the factor that embeddings of ids are multiplied by, rounded to the dtype as in the stock model."""
    scale = getattr(embedding, "embed_scale", None)
    if scale is None:
        return 1.0
    if scale.device.type == "meta":
        scale = torch.tensor(embedding.scalar_embed_scale, device="cpu")
    # Read the buffer, not the Python number: after a cast to a wider dtype the stock model keeps the rounded value.
    return float(scale.to(dtype))


def _rope_table(family: Family, config: Any, layer: int) -> int:
    """Return which of the runtime's cos and sin tables a layer reads."""
    if family.rope_kinds:
        return family.rope_kinds.index(config.layer_types[layer])
    return 0 if family.rotates(config, layer) else 1  # the second table then turns by no angle


def _rotary_dim(family: Family, rotary: Any) -> int:
    """Return how many dimensions of a head RoPE rotates. Raise UnsupportedModelError if layers differ in this."""
    names = [f"{kind}_inv_freq" for kind in family.rope_kinds if kind in rotary.layer_types] or ["inv_freq"]
    widths = {2 * getattr(rotary, name).numel() for name in names}
    if len(widths) != 1:
        raise UnsupportedModelError(f"config.rope_parameters: expected one rotary width, got {sorted(widths)}")
    return widths.pop()
