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
    **dict.fromkeys(("word_embed_proj_dim", "embedding_dim", "text_hidden_size", "hidden_dim", "projection_dim"), HIDDEN),
    **dict.fromkeys(("hidden_size_global", "encoder_hidden_size", "merged_hidden_size", "vision_hidden_size"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("attention_heads", "decoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("linear_num_heads", "index_n_heads", "num_sliding_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("linear_num_key_heads", "num_global_key_value_heads"), 2),
    "linear_num_value_heads": HEADS,
    **dict.fromkeys(("head_dim", "d_head", "kv_channels", "swa_head_dim", "swa_v_head_dim", "global_head_dim"), HEAD_DIM),
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
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    "mamba_d_ssm": 64,
    "lru_width": HIDDEN,
    **dict.fromkeys(("conv_dim", "router_hidden_size"), 32),
    "image_size": 56,
    "num_nextn_predict_layers": 0,
    "projector_hidden_size": HIDDEN,
    "codebook_size": 64,
    "max_source_positions": 64,
}
"""Sizes by the names that configs give them, whatever the architecture."""

SPECIAL: dict[str, dict[str, Any]] = {}
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
            arguments[key] = min(value, SIZES[key]) if key.startswith("num_kv_shared") else SIZES[key]
        elif isinstance(value, (list, tuple)) and layers is not None and len(value) == layers > LAYERS:
            arguments[key] = list(value[:LAYERS])
        elif key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            arguments[key] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}[key]
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
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
