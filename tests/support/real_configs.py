"""Configurations of released checkpoints, from their config.json, and the names of their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Members of the checkpoints' config.json.
REAL = {
    "Llama-3.1-8B": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    "Llama-3.2-1B": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0},
        },
    ),
    "Mistral-7B-v0.1": (
        MistralForCausalLM,
        MistralConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
        },
    ),
    "Mistral-7B-v0.3": (
        MistralForCausalLM,
        MistralConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32768,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
    ),
    "Qwen2-7B": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rms_norm_eps": 1e-6,
            "sliding_window": 131072,
            "max_window_layers": 28,
            "use_sliding_window": False,
        },
    ),
    "Qwen3-8B": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
        },
    ),
    "Qwen3-30B-A3B": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
        },
    ),
    "Mixtral-8x7B": (
        MixtralForCausalLM,
        MixtralConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
    ),
    "OLMo-2-7B": (
        Olmo2ForCausalLM,
        Olmo2Config,
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 100352,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "Phi-3-mini-4k": (
        Phi3ForCausalLM,
        Phi3Config,
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
            "rms_norm_eps": 1e-5,
            "sliding_window": 2047,
        },
    ),
    "Gemma-2-9B": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "vocab_size": 256000,
            "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
    ),
    "Gemma-3-12B": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "vocab_size": 262208,
            "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 256,
            "sliding_window": 1024,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
}

WINDOWS = {
    "Mistral-7B-v0.1": [4096] * 32,
    "Phi-3-mini-4k": [2047] * 32,
    "Gemma-2-9B": [4096, 0] * 21,
    "Gemma-3-12B": [1024, 1024, 1024, 1024, 1024, 0] * 8,
}

# Name of a layer's weight in the runtime -> in the checkpoint.
LAYER = {
    "input_norm": "input_layernorm.weight",
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
    "post_norm": "post_attention_layernorm.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
}
QKV_BIAS = {f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkv"}
QK_NORM = {f"{name}_norm": f"self_attn.{name}_norm.weight" for name in "qk"}
FUSED = {
    **{f"{name}_proj": "self_attn.qkv_proj.weight" for name in "qkv"},
    **{f"{name}_proj": "mlp.gate_up_proj.weight" for name in ("gate", "up")},
}
SANDWICH = {
    "attention_out_norm": "post_attention_layernorm.weight",
    "post_norm": "pre_feedforward_layernorm.weight",
    "mlp_out_norm": "post_feedforward_layernorm.weight",
}
AFTER_ONLY = {
    **QK_NORM,
    "attention_out_norm": "post_attention_layernorm.weight",
    "mlp_out_norm": "post_feedforward_layernorm.weight",
    "input_norm": None,
    "post_norm": None,
}
EXPERTS = {
    **{f"{name}_proj": None for name in ("gate", "up", "down")},
    "router": "mlp.gate.weight",
    "experts_gate_up": "mlp.experts.gate_up_proj",
    "experts_down": "mlp.experts.down_proj",
}
EXTRA = {
    "mixtral": EXPERTS,
    "qwen3_moe": {**EXPERTS, **QK_NORM},
    "olmo2": AFTER_ONLY,
    "llama": {},
    "mistral": {},
    "qwen2": QKV_BIAS,
    "qwen3": QK_NORM,
    "phi3": FUSED,
    "gemma2": SANDWICH,
    "gemma3_text": {**SANDWICH, **QK_NORM},
}


def real(name: str) -> nn.Module:
    model_class, config_class, numbers = REAL[name]
    with torch.device("meta"):
        return model_class._from_config(config_class(**numbers), dtype=torch.bfloat16, attn_implementation="eager")


def assert_shapes(spec: Any, numbers: dict[str, Any]) -> None:
    """Check that a spec has the sizes of a config.json."""
    assert spec.num_layers == numbers["num_hidden_layers"]
    assert spec.hidden_size == numbers["hidden_size"]
    assert spec.num_heads == numbers["num_attention_heads"]
    assert spec.num_kv_heads == numbers["num_key_value_heads"]
    assert spec.intermediate_size == numbers["intermediate_size"]
    assert spec.vocab_size == numbers["vocab_size"]
