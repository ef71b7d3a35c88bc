"""The families that run natively: ``FAMILIES``. ``register_family`` adds another one."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import Any

from pop_ext.hf.family import LLAMA_LAYER, SPARSE_MLP, Experts, Family, VisionSpec, always, every_layer


def _window_everywhere(config: Any, layer: int) -> int:
    return config.sliding_window or 0


def _window_by_layer_type(config: Any, layer: int) -> int:
    return (config.sliding_window or 0) if config.layer_types[layer] == "sliding_attention" else 0


def _window_of_plain_layers(config: Any, layer: int) -> int:
    """As in SmolLM3, where a flag switches windows on."""
    return _window_by_layer_type(config, layer) if config.use_sliding_window else 0


def _has_rope(config: Any, layer: int) -> bool:
    return bool(config.no_rope_layers[layer])  # the list holds 1 for layers with RoPE


def _rotates_in_windows(config: Any, layer: int) -> bool:
    """As in EXAONE 4, whose global layers have no RoPE."""
    return not config.sliding_window or config.layer_types[layer] == "sliding_attention"


def _sparse_by_step(config: Any, layer: int) -> bool:
    sparse = config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
    return sparse and layer not in config.mlp_only_layers


def _sparse_after_dense(config: Any, layer: int) -> bool:
    return layer >= config.first_k_dense_replace


def _sparse_by_layer_type(config: Any, layer: int) -> bool:
    return config.mlp_layer_types[layer] == "sparse"


def _norm_topk_prob(config: Any) -> bool:
    return config.norm_topk_prob


_QK_NORMS = {"q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight"}

# Fused matrices: slots with the same path share its rows, one after another in the order of ModelSpec.weight_slots.
_PHI_LAYER = {
    **LLAMA_LAYER,
    **{f"{name}_proj": "self_attn.qkv_proj.weight" for name in "qkv"},
    **{f"{name}_bias": "self_attn.qkv_proj.bias" for name in "qkv"},
    **{f"{name}_proj": "mlp.gate_up_proj.weight" for name in ("gate", "up")},
    **{f"{name}_bias": "mlp.gate_up_proj.bias" for name in ("gate", "up")},
}

# q, k and v have their own matrices, gate and up share one.
_GLM_LAYER = {**_PHI_LAYER, **{slot: path for slot, path in LLAMA_LAYER.items() if slot[:2] in ("q_", "k_", "v_")}}

_GLM4_LAYER = {
    **_GLM_LAYER,
    "attention_out_norm": "post_self_attn_layernorm.weight",
    "mlp_out_norm": "post_mlp_layernorm.weight",
}

_HUNYUAN_NORMS = {"q_norm": "self_attn.query_layernorm.weight", "k_norm": "self_attn.key_layernorm.weight"}

# One norm before and one after both attention and the MLP.
_GEMMA_LAYER = {
    **LLAMA_LAYER,
    "attention_out_norm": "post_attention_layernorm.weight",
    "post_norm": "pre_feedforward_layernorm.weight",
    "mlp_out_norm": "post_feedforward_layernorm.weight",
}

# Norms on the outputs of attention and MLP, none on their inputs.
_OLMO_LAYER = {
    **{slot: path for slot, path in LLAMA_LAYER.items() if slot not in ("input_norm", "post_norm")},
    **_QK_NORMS,
    "attention_out_norm": "post_attention_layernorm.weight",
    "mlp_out_norm": "post_feedforward_layernorm.weight",
}

_GPT_OSS_EXPERTS = Experts(
    "intermediate_size",
    layer={
        "router": "mlp.router.weight",
        "router_logit_bias": "mlp.router.bias",
        "experts_gate_up": "mlp.experts.gate_up_proj",
        "experts_gate_up_bias": "mlp.experts.gate_up_proj_bias",
        "experts_down": "mlp.experts.down_proj",
        "experts_down_bias": "mlp.experts.down_proj_bias",
    },
    activation="clamped_swiglu",
    transposed=True,
    interleaved=True,
)

_QWEN2_VL_CLASSES = {"MLP": "Qwen2MLP"}


def _shared_expert(path: str) -> dict[str, str]:
    return {f"shared_{name}_proj": f"{path}.{name}_proj.weight" for name in ("gate", "up", "down")}


_QWEN2_MOE_MLP = {
    **SPARSE_MLP,
    **_shared_expert("mlp.shared_expert"),
    "shared_gate": "mlp.shared_expert_gate.weight",
}

# A router of sigmoids in float32 whose bias only chooses, and a shared expert without a gate.
_GLM_EXPERTS = Experts(
    "moe_intermediate_size",
    _sparse_after_dense,
    _norm_topk_prob,
    layer={
        **SPARSE_MLP,
        **_shared_expert("mlp.shared_experts"),
        "router_bias": "mlp.gate.e_score_correction_bias",
    },
    count="n_routed_experts",
    scores="sigmoid",
    norm_topk_eps=1e-20,
    scale="routed_scaling_factor",
    float32=True,
)

_GLM4_MOE = Family(
    "glm4_moe",
    "Glm4Moe",
    layer={**LLAMA_LAYER, **_QK_NORMS},
    experts=_GLM_EXPERTS,
    classes={"SparseMoeBlock": "Glm4MoeMoE", "TopKRouter": "Glm4MoeTopkRouter"},
)

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama"),
        # Checkpoints of these types have the modules of Llama.
        Family("exaone", "Llama"),
        Family("internlm3", "Llama"),
        Family("iquestcoder", "Llama"),
        Family("seed_oss", "SeedOss"),
        Family("cwm", "Cwm", window=_window_by_layer_type),
        Family("ministral", "Ministral", window=_window_by_layer_type),
        Family("smollm3", "SmolLM3", window=_window_of_plain_layers, rotates=_has_rope),
        Family("phi3", "Phi3", layer=_PHI_LAYER, window=_window_everywhere),
        Family("mistral", "Mistral", window=_window_everywhere),
        Family("qwen2", "Qwen2", window=_window_by_layer_type),
        Family(
            "qwen3",
            "Qwen3",
            layer={**LLAMA_LAYER, **_QK_NORMS},
            window=_window_by_layer_type,
        ),
        Family("mixtral", "Mixtral", window=_window_everywhere, experts=Experts("intermediate_size")),
        Family(
            "qwen3_moe",
            "Qwen3Moe",
            layer={**LLAMA_LAYER, **_QK_NORMS},
            window=_window_everywhere,
            experts=Experts("moe_intermediate_size", _sparse_by_step, _norm_topk_prob),
        ),
        Family(
            "qwen2_moe",
            "Qwen2Moe",
            window=_window_by_layer_type,
            experts=Experts("moe_intermediate_size", _sparse_by_step, _norm_topk_prob, layer=_QWEN2_MOE_MLP),
        ),
        _GLM4_MOE,
        replace(_GLM4_MOE, model_type="sarvam_moe"),  # it has the modules of GLM-4.5
        Family(
            "dots1",
            "Dots1",
            layer={**LLAMA_LAYER, **_QK_NORMS},
            window=_window_by_layer_type,
            experts=_GLM_EXPERTS,
            classes={"SparseMoeBlock": "Dots1MoE", "TopKRouter": "Dots1TopkRouter"},
        ),
        Family(
            "solar_open",
            "SolarOpen",
            experts=replace(_GLM_EXPERTS, sparse=every_layer),
            classes={"SparseMoeBlock": "SolarOpenMoE", "TopKRouter": "SolarOpenTopkRouter"},
        ),
        Family(
            "exaone_moe",
            "ExaoneMoe",
            layer={**LLAMA_LAYER, **_QK_NORMS},
            window=_window_by_layer_type,
            rotates=_rotates_in_windows,
            experts=replace(_GLM_EXPERTS, sparse=_sparse_by_layer_type, count="num_experts"),
            classes={"SparseMoeBlock": "ExaoneMoeSparseMoEBlock", "TopKRouter": "ExaoneMoeTopkRouter"},
        ),
        Family(
            "hy_v3",
            "HYV3",
            layer={**LLAMA_LAYER, **_QK_NORMS},
            experts=replace(
                _GLM_EXPERTS,
                sparse=_sparse_by_layer_type,
                norm_topk=always,
                layer={**_GLM_EXPERTS.layer, "router_bias": "mlp.e_score_correction_bias"},
                count="num_experts",
                scale="router_scaling_factor",
            ),
            classes={"SparseMoeBlock": "HYV3MoE"},
        ),
        # The router computes in the dtype of the model, its scores in float32.
        Family(
            "minimax_m2",
            "MiniMaxM2",
            layer={**LLAMA_LAYER, **_QK_NORMS},
            norms_over_heads=True,
            experts=Experts(
                "intermediate_size",
                layer={**SPARSE_MLP, "router_bias": "mlp.e_score_correction_bias"},
                scores="sigmoid",
            ),
        ),
        Family(
            "olmoe",
            "Olmoe",
            layer={**LLAMA_LAYER, **_QK_NORMS},
            norms_over_heads=True,
            experts=Experts("intermediate_size", norm_topk=_norm_topk_prob),
        ),
        Family(
            "flex_olmo",
            "FlexOlmo",
            layer=_OLMO_LAYER,
            norms_over_heads=True,
            experts=Experts("intermediate_size", norm_topk=_norm_topk_prob),
        ),
        Family(
            "gpt_oss",
            "GptOss",
            layer={**LLAMA_LAYER, "sinks": "self_attn.sinks"},
            window=_window_by_layer_type,
            experts=_GPT_OSS_EXPERTS,
            classes={"SparseMoeBlock": "GptOssMLP"},
        ),
        Family("olmo2", "Olmo2", layer=_OLMO_LAYER, norms_over_heads=True),
        Family(
            "olmo3",
            "Olmo3",
            layer=_OLMO_LAYER,
            norms_over_heads=True,
            window=_window_by_layer_type,
            rope_kinds=("full_attention", "sliding_attention"),
        ),
        Family(
            "exaone4",
            "Exaone4",
            layer=_OLMO_LAYER,
            window=_window_by_layer_type,
            rotates=_rotates_in_windows,
        ),
        Family("granite", "Granite", multipliers=True),
        Family("ernie4_5", "Ernie4_5", rope_interleaved=True),
        Family("helium", "Helium", rope_interleaved=True),
        Family("glm", "Glm", layer=_GLM_LAYER, rope_interleaved=True),
        Family("glm4", "Glm4", layer=_GLM4_LAYER, rope_interleaved=True),
        Family("ministral3", "Ministral3", window=_window_everywhere, scales_queries=True),
        Family(
            "hunyuan_v1_dense",
            "HunYuanDenseV1",
            layer={**LLAMA_LAYER, **_HUNYUAN_NORMS},
            norms_after_rope=True,
        ),
        Family("gemma", "Gemma", norm_weight_offset=1.0, embedding="GemmaTextScaledWordEmbedding"),
        Family(
            "gemma2",
            "Gemma2",
            layer=_GEMMA_LAYER,
            window=_window_by_layer_type,
            activation="hidden_activation",
            norm_weight_offset=1.0,
            embedding="Gemma2TextScaledWordEmbedding",
            caps_scores=True,
            caps_logits=True,
        ),
        Family(
            "gemma3_text",
            "Gemma3",
            layer={**_GEMMA_LAYER, **_QK_NORMS},
            window=_window_by_layer_type,
            activation="hidden_activation",
            norm_weight_offset=1.0,
            embedding="Gemma3TextScaledWordEmbedding",
            rope_kinds=("full_attention", "sliding_attention"),
            caps_logits=True,
        ),
        Family("qwen2_vl_text", "Qwen2VL", window=_window_by_layer_type, classes=_QWEN2_VL_CLASSES),
        Family("qwen2_5_vl_text", "Qwen2_5_VL", window=_window_by_layer_type, classes=_QWEN2_VL_CLASSES),
        Family("qwen3_vl_text", "Qwen3VLText", layer={**LLAMA_LAYER, **_QK_NORMS}),
        Family(
            "qwen3_vl_moe_text",
            "Qwen3VLMoeText",
            layer={**LLAMA_LAYER, **_QK_NORMS},
            experts=Experts("moe_intermediate_size", _sparse_by_step),
        ),
    )
}


_IMAGES = frozenset({"pixel_values", "mm_encoder_outputs"})
_LLAVA = _IMAGES | {"vision_feature_layer", "vision_feature_select_strategy", "image_sizes"}
_QWEN_VL = _IMAGES | {"pixel_values_videos", "image_grid_thw", "video_grid_thw", "mm_token_type_ids"}
_IDEFICS = _IMAGES | {"pixel_attention_mask"}

WRAPPERS = {
    "gemma3": VisionSpec("Gemma3", _IMAGES | {"token_type_ids"}, spans_argument="token_type_ids"),
    "idefics3": VisionSpec("Idefics3", _IDEFICS, decoder="text_model"),
    "internvl": VisionSpec("InternVL", _LLAVA),
    "llava": VisionSpec("Llava", _LLAVA),
    "llava_next": VisionSpec("LlavaNext", _LLAVA),
    "llava_onevision": VisionSpec(
        "LlavaOnevision",
        _LLAVA | {"pixel_values_videos", "image_sizes_videos", "vision_aspect_ratio", "batch_num_images"},
    ),
    "mistral3": VisionSpec("Mistral3", _LLAVA),
    "qwen2_vl": VisionSpec("Qwen2VL", _QWEN_VL, uses_mrope=True),
    "qwen2_5_vl": VisionSpec("Qwen2_5_VL", _QWEN_VL | {"second_per_grid_ts"}, uses_mrope=True),
    "qwen3_vl": VisionSpec("Qwen3VL", _QWEN_VL, uses_mrope=True),
    "qwen3_vl_moe": VisionSpec("Qwen3VLMoe", _QWEN_VL, uses_mrope=True),
    "smolvlm": VisionSpec("SmolVLM", _IDEFICS, decoder="text_model"),
}
"""Vision-language models by ``config.model_type``. The language model inside may be of any family of ``FAMILIES``."""

_BUILT_IN = frozenset(FAMILIES) | WRAPPERS.keys()


@cache
def find_family(model_type: str, text_model_type: str) -> Family | None:
    """Return the family of a model; None if its architecture is not supported natively.

    Args:
        model_type: of its config.
        text_model_type: of the config of its language model.
    """
    wrapper, family = WRAPPERS.get(model_type), FAMILIES.get(text_model_type)
    if family is None or (wrapper is None and model_type != text_model_type):
        return None
    if wrapper is None:
        return family
    # No class with a wrapper caps logits, whatever the config of its language model says.
    return replace(family, model_type=model_type, caps_logits=False, vision=wrapper)


def register_family(model_type: str, prefix: str, like: str = "llama", **differences: Any) -> None:
    """Let models of another architecture run natively, in this process.

    The first model that is loaded is compared with its stock modules on a few tokens. If the family is described
    wrongly, the model is refused then, and ``pop_ext.enable`` runs it portably. A few tokens do not show what depends
    on the length: windows, and scales that change with the position. Registering a ``model_type`` again replaces it.

    Args:
        model_type: ``config.model_type``.
        prefix: common prefix of its class names ("SeedOss" in SeedOssForCausalLM, SeedOssDecoderLayer and
            SeedOssAttention, SeedOssMLP, SeedOssRMSNorm and SeedOssRotaryEmbedding).
        like: ``model_type`` of a known family that it resembles.
        differences: attributes of ``pop_ext.hf.family.Family`` that differ from it, such as ``window`` or ``layer``.

    Raises:
        ValueError: ``like`` is unknown, or ``model_type`` is a family of pop_ext's own.
        TypeError: An argument is of the wrong type, or ``differences`` has a name that ``Family`` lacks.
    """
    for name, value in {"model_type": model_type, "prefix": prefix, "like": like}.items():
        if not isinstance(value, str) or not value:
            raise TypeError(f"{name}: expected a text, got {value!r}")
    if model_type in _BUILT_IN:
        raise ValueError(f"model_type: expected an architecture that pop_ext does not know, got {model_type}")
    if like not in FAMILIES:
        raise ValueError(f"like: expected one of {', '.join(sorted(FAMILIES))}, got {like}")
    known = {field.name for field in fields(Family)} - {"model_type", "prefix", "vision"}
    unknown = sorted(differences.keys() - known)
    if unknown:
        raise TypeError(f"differences: expected attributes of Family ({', '.join(sorted(known))}), got {unknown[0]}")
    for name, value in differences.items():
        usual = getattr(FAMILIES[like], name)
        if not _fits(name, value, usual):
            expected = "an Experts or None" if name == "experts" else f"a value like {usual!r}"
            raise TypeError(f"{name}: expected {expected}, got {value!r}")
    FAMILIES[model_type] = replace(FAMILIES[like], model_type=model_type, prefix=prefix, **differences)
    find_family.cache_clear()  # afterwards, so that no other thread keeps the answer from before


def _fits(name: str, value: Any, usual: Any) -> bool:
    """Return whether a value may stand for a known family's in the attribute of this name."""
    if name == "experts":
        return value is None or isinstance(value, Experts)
    if callable(usual):
        return callable(value)
    if isinstance(usual, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, type(usual))
