"""Tiny random Hugging Face models in which every part affects the result.

Projections are scaled so that attention is peaked, each layer adds about as much as the residual stream has, and the
logits have a scale of about 1. Norm weights and biases are random. Zeroing any one layer changes the logits by more
than 10 % (asserted in test_comparisons.py), so that a wrong RoPE or a missing gamma exceeds every tolerance.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
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

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
"""Every RoPE scaling of transformers."""

ROPE_LENGTH = 32
"""Original context length of scaled variants: longer prompts use the scaled branch of "dynamic" and "longrope"."""

WINDOW = 16
"""Default sliding window, shorter than the prompts of the tests."""


ROUTER_BIAS = "e_score_correction_bias"
"""Name of the buffer that the scores of a router are shifted by, to choose experts."""


def llama(**over: Any) -> LlamaForCausalLM:
    """Return a Llama; options as in `build`, plus every LlamaConfig field (attention_bias, mlp_bias, ...)."""
    return build(LlamaForCausalLM, LlamaConfig, over)


def mistral(**over: Any) -> MistralForCausalLM:
    """Return a Mistral, all layers with sliding_window = WINDOW; options as in `build`."""
    return build(MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW, **over})


def qwen2(**over: Any) -> Qwen2ForCausalLM:
    """Return a Qwen2 with q, k, v biases; `use_sliding_window=True` gives every second layer the window WINDOW."""
    if over.get("use_sliding_window"):
        kinds = ("full_attention", "sliding_attention")
        layer_types = [kinds[i % 2] for i in range(over.get("layers", 6))]
        over = {"sliding_window": WINDOW, "layer_types": layer_types, **over}
    return build(Qwen2ForCausalLM, Qwen2Config, over)


def qwen3(**over: Any) -> Qwen3ForCausalLM:
    """Return a Qwen3, with q_norm and k_norm; options as in `build`."""
    return build(Qwen3ForCausalLM, Qwen3Config, over)


def gemma3(**over: Any) -> Gemma3ForCausalLM:
    """Return a Gemma 3: four norms a layer, q and k norms, WINDOW in all but every third layer, two RoPE bases."""
    layers = over.get("layers", 6)
    layer_types = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)]
    full = rope_parameters(over.pop("rope", "default"), over.get("head_dim", 64))
    rope = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0}}
    defaults = {"sliding_window": WINDOW, "layer_types": layer_types, "rope_parameters": rope, "tied": True}
    return build(Gemma3ForCausalLM, Gemma3TextConfig, {**defaults, "query_pre_attn_scalar": 64, **over})


def phi3(**over: Any) -> Phi3ForCausalLM:
    """Return a Phi-3: fused q, k, v, fused gate and up, RoPE on half of a head's channels, WINDOW everywhere."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return build(Phi3ForCausalLM, Phi3Config, {"sliding_window": WINDOW, "rope_parameters": rope, **over})


def gemma2(**over: Any) -> Gemma2ForCausalLM:
    """Return a Gemma 2: four norms a layer, effective soft caps of scores and logits, WINDOW in every second layer."""
    kinds = ("sliding_attention", "full_attention")
    defaults = {
        "sliding_window": WINDOW,
        "layer_types": [kinds[i % 2] for i in range(over.get("layers", 6))],
        "tied": True,
        "query_pre_attn_scalar": 64,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
        "attn_implementation": "eager",  # other implementations omit soft caps
    }
    return build(Gemma2ForCausalLM, Gemma2Config, {**defaults, **over})


def olmo2(**over: Any) -> Olmo2ForCausalLM:
    """Return an OLMo 2: norms after attention and MLP instead of before, and over all heads of q and of k together."""
    return build(Olmo2ForCausalLM, Olmo2Config, over)


def mixtral(**over: Any) -> MixtralForCausalLM:
    """Return a Mixtral of 4 experts, 2 for each token; `router` as in `sparse`."""
    return sparse(MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, **over})


def qwen3_moe(**over: Any) -> Qwen3MoeForCausalLM:
    """Return a Qwen3-MoE: 8 experts, 3 a token, weighted by their probabilities; layer 1 has an MLP instead."""
    defaults = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 56, "mlp_only_layers": [1]}
    return sparse(Qwen3MoeForCausalLM, Qwen3MoeConfig, {**defaults, **over})


def sparse(model_class: type, config_class: type, over: dict[str, Any]) -> Any:
    """Return a model with experts; options as in `build`, and router: "wide" (`widen_margins`) or "random"."""
    router = over.pop("router", "wide")
    model = build(model_class, config_class, over)
    if router == "wide":
        widen_margins(model, over.get("seed", 0))
    return model


@torch.no_grad()
def widen_margins(model: Any, seed: int) -> None:
    """Make the experts of a token depend on the token, far from any tie.

    A row near a tie may be routed to other experts in bfloat16 than in float32, correctly, with a very different
    result: no tolerance could tell that from a mistake. So each token belongs to a class. The class is written into the
    first channels of its embedding, which nothing else writes to. Before the norm, the router logits of a class are
    4 / (experts - 1) apart, in a different order for each layer and class; the other channels change them by a tenth.
    A bias that only chooses makes each layer choose one expert always and one never.
    """
    routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    if not routers:
        return
    experts = len(routers[0].weight)
    classes = torch.arange(model.config.vocab_size, device="cpu") % experts
    model.model.embed_tokens.weight[:, :experts] = 4.0 * torch.eye(experts, device="cpu")[classes].to(model.device)
    model.model.norm.weight[:experts] = 0.0  # with a tied head, the class must not determine the next token
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.weight[:experts] = 0.0
        layer.post_attention_layernorm.weight[:experts] = 1.0
        if not hasattr(layer.mlp, "experts"):
            layer.mlp.down_proj.weight[:experts] = 0.0
            continue
        layer.mlp.experts.down_proj[:, :experts] = 0.0
        for shared in layer.mlp.children():
            if hasattr(shared, "down_proj") and shared is not layer.mlp.experts:
                shared.down_proj.weight[:experts] = 0.0
        generator = torch.Generator().manual_seed(1000 * seed + number)
        levels = torch.linspace(2.0, -2.0, experts, device="cpu")
        orders = [levels[torch.randperm(experts, generator=generator, device="cpu")] for _ in range(experts)]
        layer.mlp.gate.weight *= 0.1
        layer.mlp.gate.weight[:, :experts] = torch.stack(orders, dim=1).to(model.device)
        for bias in (buffer for name, buffer in layer.named_buffers() if name.endswith(ROUTER_BIAS)):
            always, never = torch.randperm(experts, generator=generator, device="cpu")[:2]
            bias.zero_()
            bias[always], bias[never] = 2.0, -2.0


def hyperclovax(**over: Any) -> HyperCLOVAXForCausalLM:
    """Return a HyperCLOVAX: a Llama with multipliers, which is no native family; options as in `build`."""
    multipliers = {"residual_multiplier": 0.8, "embedding_multiplier": 2.0, "attention_multiplier": 0.2}
    return build(HyperCLOVAXForCausalLM, HyperCLOVAXConfig, {**multipliers, "use_post_norm": False, **over})


FAMILIES = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "phi3": phi3,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "olmo2": olmo2,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
}


def shared(family: str = "llama", **over: Any) -> Any:
    """Return a model of FAMILIES that tests do not change, on torch's default device."""
    return _shared(family, torch.get_default_device(), **over)


@functools.cache
def _shared(family: str, _device: torch.device, **over: Any) -> Any:
    return FAMILIES[family](**over)


def build(model_class: type, config_class: type, over: dict[str, Any]) -> Any:
    """Return a model in eval mode with deterministic random weights, the same on every device.

    Options: hidden, heads, kv_heads, head_dim, layers, vocab, intermediate, dtype, rope (a kind of ROPE_KINDS),
    tied (embeddings), attn_implementation, seed; anything else is passed to the config.
    """
    over = dict(over)
    heads, head_dim = over.pop("heads", 4), over.pop("head_dim", 64)
    dtype, seed = over.pop("dtype", torch.float32), over.pop("seed", 0)
    attn_implementation = over.pop("attn_implementation", "sdpa")
    rope = over.pop("rope", "default")
    config = config_class(
        **{
            "hidden_size": over.pop("hidden", 96),
            "intermediate_size": over.pop("intermediate", 160),
            "num_hidden_layers": over.pop("layers", 6),
            "num_attention_heads": heads,
            "num_key_value_heads": over.pop("kv_heads", 2),
            "head_dim": head_dim,
            "vocab_size": over.pop("vocab", 263),
            "tie_word_embeddings": over.pop("tied", False),
            "max_position_embeddings": ROPE_LENGTH if rope == "dynamic" else 4 * ROPE_LENGTH,
            "rope_parameters": rope_parameters(rope, head_dim),
            "rms_norm_eps": 1e-5,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **over,
        }
    )
    with torch.random.fork_rng(devices=[]):  # transformers' initialisation uses the global generator
        model = model_class._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    draw_weights(model, seed)
    return model.eval()


def rope_parameters(kind: str, head_dim: int) -> dict[str, Any]:
    """Return parameters of a RoPE variant that differs clearly from the default within a few dozen tokens."""
    scaled = {"original_max_position_embeddings": ROPE_LENGTH}
    half = head_dim // 2
    extra: dict[str, Any] = {
        "default": {},
        "linear": {"factor": 2.5},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "beta_fast": 8.0, **scaled},
        "longrope": {
            "factor": 4.0,
            "short_factor": [1.0 + 0.5 * i / half for i in range(half)],
            "long_factor": [1.5 + 3.0 * i / half for i in range(half)],
            **scaled,
        },
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **scaled},
        "proportional": {"partial_rotary_factor": 0.25},
    }[kind]
    return {"rope_type": kind, "rope_theta": 10000.0, **extra}


def draw_weights(model: nn.Module, seed: int) -> None:
    """Draw each parameter from its own generator, so that a weight depends only on seed, order and shape."""
    tied = model.config.tie_word_embeddings
    norm_base = 0.0 if model.config.model_type.startswith("gemma") else 1.0  # Gemma's norms multiply by 1 + weight
    router_biases = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith(ROUTER_BIAS)]
    for number, (name, parameter) in enumerate([*model.named_parameters(), *router_biases]):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        values = torch.randn(parameter.shape, generator=generator, device="cpu")
        fan_in = parameter.shape[-1]
        if name.endswith("norm.weight"):
            values = norm_base + 0.3 * values
        elif name.endswith((".bias", ROUTER_BIAS)):
            values = 0.3 * values
        elif "embed_tokens" in name:
            values = values * (fan_in**-0.5 if tied else 1.0)
        else:
            gains = {"q_proj": 1.4, "qkv_proj": 1.4, "k_proj": 1.4, "o_proj": 1.5, "down_proj": 1.5, "experts": 2.0}
            kind = "experts" if ".experts.down_proj" in name else name.split(".")[-2]
            values = values * gains.get(kind, 1.0) * fan_in**-0.5
        parameter.data.copy_(values)


def float32_twin(model: nn.Module) -> nn.Module:
    """Return the model with the same (already rounded) weights in float32, the truth for `assert_low_precision`."""
    return copy.deepcopy(model).float()


def tokens(model: nn.Module, *shape: int, seed: int = 0) -> Tensor:
    """Return random token ids, int64 of `shape`, on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, shape, generator=generator, device="cpu").to(model.device)


def batches(model, count: int = 2, batch: int = 3, length: int = 40, seed: int = 10) -> list[Tensor]:
    """Return calibration batches of random tokens."""
    return [tokens(model, batch, length, seed=seed + i) for i in range(count)]


def uneven_batches(model) -> list[Tensor]:
    """Return eight sequences of 20 random tokens, as batches of 3, 1 and 4."""
    return list(tokens(model, 8, 20, seed=4).split([3, 1, 4]))


def offloaded_cache(model: nn.Module) -> DynamicCache:
    """Return a cache that offloads its layers. It opens a stream, which a CUDA build of torch refuses without a GPU."""
    can_open_a_stream = torch.cuda.is_available() or torch.version.cuda is None
    cache = DynamicCache(config=model.config, offloading=can_open_a_stream)
    cache.offloading = True
    return cache


def pad(sequences: list[Tensor], side: str, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Pad sequences of ids [T_i] on the `side` "left" or "right"; return (ids [batch, T], mask [batch, T])."""
    width = max(len(ids) for ids in sequences)
    padded = torch.full((len(sequences), width), fill)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for i, ids in enumerate(sequences):
        columns = slice(width - len(ids), None) if side == "left" else slice(len(ids))
        padded[i, columns], mask[i, columns] = ids, 1
    return padded, mask
