"""Build tiny random models of the config classes of transformers, for `architectures.py`.

`tiny_config` shrinks the default config of an architecture by a table of sizes that holds for all, and by one of
exceptions. Lists with one entry per layer are cut to the layers that are left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS = 6
HIDDEN = 64
HEADS = 4
HEAD_DIM = 16
VOCAB = 320
FIRST_SPECIAL_TOKEN = 290
"""Prompts have ids below it, so that none of them stands for an image."""
MAX_PARAMETERS = 60_000_000

SIZES: dict[str, int] = {
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_num_layers"),
        LAYERS,
    ),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "embed_dim", "out_hidden_size", "output_dim", "emb_dim", "embedding_size"),
        HIDDEN,
    ),
    **dict.fromkeys(
        ("word_embed_proj_dim", "embedding_dim", "text_hidden_size", "hidden_dim", "projection_dim"), HIDDEN
    ),
    **dict.fromkeys(("hidden_size_global", "encoder_hidden_size", "merged_hidden_size", "vision_hidden_size"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("attention_heads", "decoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("linear_num_heads", "index_n_heads", "num_sliding_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("linear_num_key_heads", "num_global_key_value_heads"), 2),
    "linear_num_value_heads": HEADS,
    **dict.fromkeys(
        ("head_dim", "d_head", "kv_channels", "swa_head_dim", "swa_v_head_dim", "global_head_dim"), HEAD_DIM
    ),
    **dict.fromkeys(("dim_head", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), HEAD_DIM),
    **dict.fromkeys(("index_head_dim", "attention_head_dim", "qk_nope_head_dim", "v_head_dim"), HEAD_DIM),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    "qk_head_dim": HEAD_DIM + 8,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dim_ff", "dff", "mlp_dim", "d_inner"), 96),
    **dict.fromkeys(("ffn_hidden_size", "dense_intermediate_size", "intermediate_size_mlp", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "share_expert_dim"), 48),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    "zero_expert_num": 2,
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "audio_vocab_size"), VOCAB),
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 256),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 16),
    **dict.fromkeys(("local_attention", "attention_chunk_size"), 16),
    "index_topk": 8,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "mamba_head_dim"), 8),
    "mamba_d_head": 16,
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    "mamba_d_ssm": 128,
    "lru_width": HIDDEN,
    **dict.fromkeys(("conv_dim", "router_hidden_size"), 32),
    "image_size": 56,
    "num_nextn_predict_layers": 0,
    "projector_hidden_size": HIDDEN,
    "codebook_size": 64,
    "base_channels": 32,
    "num_filters": 4,
    "layers": LAYERS,
    "max_source_positions": 64,
}
"""Sizes by the names that configs give them, whatever the architecture."""

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
SHARED_KV = {"layer_types": [SLIDING, FULL] * 3, "num_kv_shared_layers": 2}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
HALF_MROPE = {"rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}
EQUAL_HEADS = {"num_key_value_heads": HEADS}
QWEN4_EXP = {
    "layer_types": [LINEAR, "indexed_attention"] * 3,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 16,
    "ple_layer_ids": [1],
    "ple_embed_dim": HIDDEN,
    "ngram_vocab_size_base": 500,
    "split_ngram_parts": 4,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [2, 4]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "chameleon": {"vocabulary_map": {"<image>": 300}},
    "cohere_compass_text": {
        "layer_types": [SLIDING, FULL] * 3,
        "rope_parameters": dict.fromkeys((SLIDING, FULL), MROPE["rope_parameters"]),
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense"] + 5 * ["sparse"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "num_hidden_layers": LAYERS,
        "layer_types": [SLIDING, FULL] * 3,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_text": {**EQUAL_HEADS, "head_dim": HEAD_DIM + 8, "per_layer_config": {}},
    "emu3": {"vocabulary_map": {"<image>": 300}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [3, 3, 2]}},
    "falcon_h1": {"mamba_d_head": 16},
    "fun_asr_nano": {
        "adaptor_config": {
            "hidden_size": HIDDEN,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
    },
    "gemma3n_text": SHARED_KV,
    "gemma4_text": SHARED_KV,
    "gemma4_unified_text": SHARED_KV,
    "glm46v_text": MROPE,
    "glm4v_moe_text": HALF_MROPE,
    "glm4v_text": MROPE,
    "glm5_next_text": {**EQUAL_HEADS, "index_topk": 16, "index_kpool": 4},
    "glm_ocr_text": MROPE,
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1, 2, 3, 4],
    },
    "granitemoehybrid": {"layer_types": [LINEAR, LINEAR, FULL, LINEAR, FULL, LINEAR]},
    "hunyuan_vl_text": {"rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [1, 1, 1, 1]}},
    "hy_v4_vl_text": {"rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [2, 1, 1]}},
    "lfm2_moe": {"layer_types": ["conv", FULL] * 3},
    "mamba2": {"num_heads": 8},
    "mimi": {"upsample_groups": HIDDEN},
    "molmo2_adapter": {"vision_feature_layer": [5, 4]},
    "muse_spark_audio": {"hidden_sizes": [16, 16, 32, 64]},
    "nemotron_h": {
        "layers_block_type": [LINEAR, "mlp", FULL, LINEAR, "moe", FULL, "moe", LINEAR, "mlp"],
        "num_hidden_layers": 9,
    },
    "paddleocr_vl_text": MROPE,
    "qwen2_5_omni": {"enable_audio_output": False},
    "qwen2_5_omni_text": MROPE,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 310},
    "qwen2_5_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "qwen3_omni_moe": {"enable_audio_output": False},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 310},
    "qwen4_exp_text": QWEN4_EXP,
    "radio": {"video_temporal_patch_size": 2},
    "step3p5": {"sliding_window": 16, "layer_types": [SLIDING, FULL] * 3},
    "wavtokenizer_encoder": {"codebook_dim": HIDDEN},
    "xlstm": {"chunk_size": 32, "num_heads": 4},
    "zamba": {"layers_block_type": [LINEAR, LINEAR, "hybrid", LINEAR, "hybrid", LINEAR]},
    "zamba2": {"layers_block_type": [LINEAR, LINEAR, "hybrid", LINEAR, "hybrid", LINEAR]},
}
"""What an architecture needs besides, by the `model_type` of the config or of the one inside it."""


def tiny_config(name: str) -> Any:
    """Return a small config of the architecture that transformers calls `name`."""
    config_class = CONFIG_MAPPING[name]
    return config_class(**_reduced(_defaults(config_class), name))


def _defaults(config_class: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = config_class().to_dict()
    return defaults


def _reduced(defaults: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the arguments that make a config small; what they leave out is the default."""
    layers = next((defaults[key] for key in ("num_hidden_layers", "n_layer", "n_layers") if key in defaults), None)
    arguments: dict[str, Any] = {}
    for key, value in defaults.items():
        if isinstance(value, dict) and "model_type" in value:
            arguments[key] = {"model_type": value["model_type"], **_reduced(value, value["model_type"])}
        elif isinstance(value, dict) and "rope" in key:
            arguments[key] = _reduced_rope(value)
        elif key in SIZES and isinstance(value, int) and not isinstance(value, bool):
            arguments[key] = min(value, SIZES[key])
        elif value is None and key in ("head_dim", "num_key_value_heads"):
            arguments[key] = SIZES[key]
        elif isinstance(value, (list, tuple)) and layers is not None and len(value) == layers > LAYERS:
            arguments[key] = list(value[:LAYERS])
        elif key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            arguments[key] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}[key]
    if "head_dim" in defaults and defaults["head_dim"] == defaults.get("qk_rope_head_dim"):
        arguments["head_dim"] = SIZES["qk_rope_head_dim"]
    if "kv_lora_rank" in defaults and "num_key_value_heads" in arguments:
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    specials = [key for key, value in defaults.items() if _is_special_token(key, value)]
    arguments.update({key: FIRST_SPECIAL_TOKEN + number for number, key in enumerate(specials)})
    if "initializer_range" in defaults:
        arguments["initializer_range"] = 0.1
    return {**arguments, **SPECIAL.get(name, {})}


def _is_special_token(key: str, value: Any) -> bool:
    plain = key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return isinstance(value, int) and not plain and key.endswith(("_token_id", "_token_index"))


def _reduced_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return RoPE parameters whose sections fit HEAD_DIM."""
    reduced = {}
    for key, value in parameters.items():
        reduced[key] = value
        if isinstance(value, dict):
            reduced[key] = _reduced_rope(value)
        elif key == "mrope_section":
            half = int(HEAD_DIM * parameters.get("partial_rotary_factor", 1.0)) // 2
            first = max(1, half // 2)
            second = (half - first + 1) // 2
            reduced[key] = [first, second, half - first - second]
        elif key == "original_max_position_embeddings":
            reduced[key] = 64
    return reduced


def build(model_class: Any, config: Any) -> Any:
    """Return a model in float32 and eval mode, whose weights are random and the same in every run.

    Raises:
        ValueError: The config is not small.
    """
    with torch.device("meta"):
        empty = model_class._from_config(config)
    count = sum(parameter.numel() for parameter in empty.parameters())
    if count > MAX_PARAMETERS:
        largest = sorted(empty.named_parameters(), key=lambda item: -item[1].numel())[:3]
        names = ", ".join(f"{name} {list(parameter.shape)}" for name, parameter in largest)
        raise ValueError(f"config: expected a small model, got {count / 1e6:.0f} M parameters ({names})")
    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=torch.float32).float()
    perturb(model)
    return model.eval()


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Add noise to norms, biases and gates, which are all ones or zeros at first and would hide a mistake."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        constant = parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all())
        if parameter.is_floating_point() and (parameter.ndim < 2 or constant):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
