"""Tiny random models of families that differ little from those of `models`, and run natively by an entry alone."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from models import WINDOW, build, rope_parameters, sparse
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FULL, SLIDING = "full_attention", "sliding_attention"
_MIXED: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": [SLIDING, SLIDING, FULL] * 2}
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPES = {
    FULL: {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 1000.0},
}

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "max_position_embeddings": 64,
    "llama_4_scaling_beta": 0.3,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 56}
# A factor of the routed experts, two shared ones, and a first layer with an MLP instead.
_GLM: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 56,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
}

OTHER: dict[str, dict[str, Any]] = {
    "cwm": {**_MIXED, "bos_token_id": 0, "eos_token_id": 0},
    "ernie4_5": {},
    "dots1": {**_MIXED, **_GLM, "topk_group": 1},
    "exaone": {},
    "exaone4": {**_MIXED, "sliding_window_pattern": 3},
    "exaone_moe": {
        **_MIXED,
        **_GLM,
        "num_experts": 8,
        "num_shared_experts": 2,
        "mlp_layer_types": ["dense", "dense", *["sparse"] * 4],
    },
    "flex_olmo": {"num_experts": 8, "num_experts_per_tok": 3, "intermediate": 56},
    "gemma": {"tied": True},
    "glm": {"attention_bias": True, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "glm4": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 4.0,
    },
    "helium": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},  # its o_proj is square
    "hunyuan_v1_dense": {},
    "glm4_moe": {**_GLM, "use_qk_norm": True, "rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.5}},
    "hy_v3": {**_EXPERTS, "num_shared_experts": 2, "router_scaling_factor": 1.7},
    "gpt_oss": {
        "attn_implementation": "eager",  # no other one of torch's own has sinks
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "rope_parameters": {**rope_parameters("yarn", 64), "truncate": False},
        "swiglu_limit": 0.8,  # most gates are below it and some are above
    },
    "internlm3": {"attention_bias": True, "mlp_bias": True},
    "iquestcoder": {},
    "minimax_m2": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate": 56,
        "rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.5},
    },
    "ministral": _MIXED,
    "ministral3": {"rope_parameters": _YARN},  # with scales of q that change within a test's prompt
    "olmo3": {**_MIXED, "rope_parameters": _ROPES},
    # Its norms of q and k span hidden_size.
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "intermediate": 56, "hidden": 128, "head_dim": 32},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 72, "mlp_only_layers": [1]},
    "sarvam_moe": {**_GLM, "use_qk_norm": True},
    "seed_oss": {"attention_bias": True, "attention_out_bias": False},
    "solar_open": {key: value for key, value in _GLM.items() if key != "first_k_dense_replace"},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 0, 1]},
}
"""Name of a family -> options of `models.build`."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "exaone4, no windows": ("exaone4", {"sliding_window": None, "layer_types": [FULL] * 6}),
    "glm4_moe, all that is optional the other way": (
        "glm4_moe",
        {
            "use_qk_norm": False,
            "attention_bias": True,
            "norm_topk_prob": False,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "rope_parameters": _DEFAULT_ROPE,
        },
    ),
    "glm4_moe, no experts": ("glm4_moe", {"first_k_dense_replace": 6}),
    "glm4_moe, near ties": ("glm4_moe", {"router": "random"}),
    "hy_v3, near ties": ("hy_v3", {"router": "random", "enable_moe_fp32_combine": False}),
    "minimax_m2, near ties": ("minimax_m2", {"router": "random"}),
    "gpt_oss, no biases of attention": ("gpt_oss", {"attention_bias": False}),
    "gpt_oss, one expert a token": ("gpt_oss", {"num_experts_per_tok": 1, "num_local_experts": 7}),
    "gpt_oss, other experts": (
        "gpt_oss",
        {"swiglu_alpha": 0.9, "swiglu_limit": 7.0, "intermediate": 88, "hidden": 120},
    ),
    "gpt_oss, windows everywhere": ("gpt_oss", {"layer_types": [SLIDING] * 6, "heads": 6, "head_dim": 48}),
    "ministral, windows everywhere": ("ministral", {"layer_types": [SLIDING] * 6}),
    "ernie4_5, all biases": ("ernie4_5", {"use_bias": True}),
    "glm, RoPE of whole heads": ("glm", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
    "granite, all biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "hunyuan_v1_dense, biases and YaRN": (  # whose cos and sin carry a factor, which the norms after RoPE see
        "hunyuan_v1_dense",
        {
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "ministral3, windows": ("ministral3", {"sliding_window": WINDOW}),
    "flex_olmo, normalised": ("flex_olmo", {"norm_topk_prob": True}),
    "olmoe, normalised": ("olmoe", {"norm_topk_prob": True}),
    "olmo3, full layers only": ("olmo3", {"layer_types": [FULL] * 6, "rope_parameters": {FULL: _ROPES[FULL]}}),
    "qwen2_moe, normalised, every second layer, windows": (
        "qwen2_moe",
        {
            "norm_topk_prob": True,
            "mlp_only_layers": [],
            "decoder_sparse_step": 2,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": [FULL, SLIDING] * 3,
        },
    ),
    "qwen2_moe, near ties": ("qwen2_moe", {"router": "random"}),
    "seed_oss, all biases": ("seed_oss", {"attention_out_bias": True, "mlp_bias": True}),
    "smollm3, windows": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": [FULL, FULL, SLIDING] * 2},
    ),
    "smollm3, no RoPE": ("smollm3", {"no_rope_layers": [0] * 6}),
    "smollm3, RoPE everywhere": ("smollm3", {"no_rope_layers": [1] * 6}),
}
"""Name -> family and options that differ from `OTHER`."""


def other(name: str, **over: Any) -> Any:
    """Return a model of six layers; options as for `models.build` or, with experts, `models.sparse`."""
    options = {**OTHER[name], **over}
    if options.get("dtype", torch.float32) != torch.float32 and name == "gpt_oss":
        options["num_experts_per_tok"] = options["num_local_experts"]  # near a tie, a choice may differ, correctly
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    how = sparse if "num_experts_per_tok" in options and name != "gpt_oss" else build
    return how(model_class, CONFIG_MAPPING[name], options)


@functools.cache
def shared_other(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model that tests do not change."""
    return other(name, dtype=dtype)
