"""Supported Hugging Face architectures: the module paths of their weights, and how each differs from Llama.

A ``Family`` maps the runtime's weight names (``ModelSpec.weight_slots``) to module paths. Shapes are read from the
modules themselves (``weight_map.py``). To support another architecture, add a ``Family`` to ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from pop_ext.plans.presets import PRESETS, Preset

_LLAMA_LAYER = {
    "input_norm": "input_layernorm.weight",
    "q_proj": "self_attn.q_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_proj": "self_attn.k_proj.weight",
    "k_bias": "self_attn.k_proj.bias",
    "v_proj": "self_attn.v_proj.weight",
    "v_bias": "self_attn.v_proj.bias",
    "o_proj": "self_attn.o_proj.weight",
    "o_bias": "self_attn.o_proj.bias",
    "post_norm": "post_attention_layernorm.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up_proj": "mlp.up_proj.weight",
    "up_bias": "mlp.up_proj.bias",
    "down_proj": "mlp.down_proj.weight",
    "down_bias": "mlp.down_proj.bias",
}


def _no_window(config: Any, layer: int) -> int:
    return 0


def _window_everywhere(config: Any, layer: int) -> int:
    return config.sliding_window or 0


def _window_by_layer_type(config: Any, layer: int) -> int:
    return (config.sliding_window or 0) if config.layer_types[layer] == "sliding_attention" else 0


# A sparse layer has these weights instead of gate_proj, up_proj and down_proj.
_SPARSE_MLP = {
    "router": "mlp.gate.weight",
    "experts_gate_up": "mlp.experts.gate_up_proj",
    "experts_down": "mlp.experts.down_proj",
}


def _every_layer(config: Any, layer: int) -> bool:
    return True


def _always(config: Any) -> bool:
    return True


@dataclass(frozen=True)
class Experts:
    """Describe the mixture of experts that replaces the MLP in some layers of a family.

    Attributes:
        inner_size: name of the config attribute with the intermediate size of one expert.
        sparse: ``(config, layer)`` to whether this layer has experts.
        norm_topk: ``config`` to whether the weights of a token's experts are normalised to a sum of one.
    """

    inner_size: str
    sparse: Callable[[Any, int], bool] = _every_layer
    norm_topk: Callable[[Any], bool] = _always


def _sparse_by_step(config: Any, layer: int) -> bool:
    sparse = config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
    return sparse and layer not in config.mlp_only_layers


@dataclass(frozen=True)
class VisionSpec:
    """Describe the wrapper around the language model of a vision-language family. It runs as transformers has it.

    Attributes:
        wrapper: class name of ``model.model``, which inserts the features of the vision tower into the embeddings.
        text_model_type: ``model_type`` of the language model's config.
        arguments: arguments of ``forward`` that the wrapper reads and the language model does not.
        spans_argument: name of the argument that marks image tokens with ones. The tokens of an image attend to each
            other in both directions during prefill. None: attention is causal for images, too.
        uses_mrope: whether the family uses multimodal RoPE, whose positions have three axes (time, height and width):
            ``[3, batch, tokens]``.
    """

    wrapper: str
    text_model_type: str
    arguments: frozenset[str]
    spans_argument: str | None = None
    uses_mrope: bool = False


@dataclass(frozen=True)
class Family:
    """Describe one architecture.

    Attributes:
        model_type: ``config.model_type``.
        prefix: common prefix of its class names ("Llama" in LlamaForCausalLM, LlamaAttention, ...). A module of any
            other class may compute something else, so the model is refused.
        layer: runtime weight name -> path inside a decoder layer.
        window: ``(config, layer)`` to the sliding window of this layer in tokens, 0 for none.
        activation: name of the config attribute with the activation of the MLP.
        norm_weight_offset: constant that RMSNorm adds to its weight.
        norms_over_heads: whether the norms of q and k span all heads of a token. False: each head by itself.
        embedding: class name of ``embed_tokens``.
        rope_kinds: layer types that the rotary module takes as an argument, in the order of the runtime's cos and sin
            tables. Empty: the module takes no layer type, and all layers share one table.
        caps_scores: whether attention applies ``config.attn_logit_softcapping`` to its scores.
        caps_logits: whether the head applies ``config.final_logit_softcapping`` to its logits.
        decoder: path of the language model without its head.
        vision: the wrapper around the language model; None in a text family.
        model_class: class name of the whole model; None: the prefix followed by ForCausalLM.
        experts: its mixture of experts; None without one.
    """

    model_type: str
    prefix: str
    layer: dict[str, str] = field(default_factory=lambda: dict(_LLAMA_LAYER))
    window: Callable[[Any, int], int] = _no_window
    activation: str = "hidden_act"
    norm_weight_offset: float = 0.0
    norms_over_heads: bool = False
    embedding: str = "Embedding"
    rope_kinds: tuple[str, ...] = ()
    caps_scores: bool = False
    caps_logits: bool = False
    decoder: str = "model"
    vision: VisionSpec | None = None
    model_class: str | None = None
    experts: Experts | None = None

    @property
    def uses_mrope(self) -> bool:
        """Whether positions have three axes: time, height and width."""
        return self.vision is not None and self.vision.uses_mrope

    @property
    def text_model_type(self) -> str:
        """``model_type`` of the config that describes the language model."""
        return self.model_type if self.vision is None else self.vision.text_model_type

    def is_sparse(self, config: Any, layer: int) -> bool:
        """Return whether a layer has experts instead of one MLP."""
        return self.experts is not None and self.experts.sparse(config, layer)

    def paths(self, config: Any, layer: int) -> dict[str, str]:
        """Return a map from runtime weight name to path inside this layer."""
        if not self.is_sparse(config, layer):
            return self.layer
        return {**{slot: path for slot, path in self.layer.items() if slot not in _MLP}, **_SPARSE_MLP}


_MLP = {f"{name}_{kind}" for name in ("gate", "up", "down") for kind in ("proj", "bias")}

_QK_NORMS = {"q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight"}

# Fused matrices: slots with the same path share its rows, one after another in the order of ModelSpec.weight_slots.
_PHI_LAYER = {
    **_LLAMA_LAYER,
    **{f"{name}_proj": "self_attn.qkv_proj.weight" for name in "qkv"},
    **{f"{name}_bias": "self_attn.qkv_proj.bias" for name in "qkv"},
    **{f"{name}_proj": "mlp.gate_up_proj.weight" for name in ("gate", "up")},
    **{f"{name}_bias": "mlp.gate_up_proj.bias" for name in ("gate", "up")},
}

# One norm before and one after both attention and the MLP.
_GEMMA_LAYER = {
    **_LLAMA_LAYER,
    "attention_out_norm": "post_attention_layernorm.weight",
    "post_norm": "pre_feedforward_layernorm.weight",
    "mlp_out_norm": "post_feedforward_layernorm.weight",
}

# Norms on the outputs of attention and MLP, none on their inputs.
_OLMO_LAYER = {
    **{slot: path for slot, path in _LLAMA_LAYER.items() if slot not in ("input_norm", "post_norm")},
    **_QK_NORMS,
    "attention_out_norm": "post_attention_layernorm.weight",
    "mlp_out_norm": "post_feedforward_layernorm.weight",
}

_GEMMA3 = Family(
    "gemma3_text",
    "Gemma3",
    layer={**_GEMMA_LAYER, **_QK_NORMS},
    window=_window_by_layer_type,
    activation="hidden_activation",
    norm_weight_offset=1.0,
    embedding="Gemma3TextScaledWordEmbedding",
    rope_kinds=("full_attention", "sliding_attention"),
    caps_logits=True,
)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama"),
        Family("phi3", "Phi3", layer=_PHI_LAYER, window=_window_everywhere),
        Family("mistral", "Mistral", window=_window_everywhere),
        Family("qwen2", "Qwen2", window=_window_by_layer_type),
        Family(
            "qwen3",
            "Qwen3",
            layer={**_LLAMA_LAYER, **_QK_NORMS},
            window=_window_by_layer_type,
        ),
        Family("mixtral", "Mixtral", window=_window_everywhere, experts=Experts("intermediate_size")),
        Family(
            "qwen3_moe",
            "Qwen3Moe",
            layer={**_LLAMA_LAYER, **_QK_NORMS},
            window=_window_everywhere,
            experts=Experts("moe_intermediate_size", _sparse_by_step, lambda config: config.norm_topk_prob),
        ),
        Family("olmo2", "Olmo2", layer=_OLMO_LAYER, norms_over_heads=True),
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
        _GEMMA3,
        replace(
            _GEMMA3,
            model_type="gemma3",
            caps_logits=False,
            decoder="model.language_model",
            model_class="Gemma3ForConditionalGeneration",
            vision=VisionSpec(
                "Gemma3Model",
                "gemma3_text",
                frozenset({"pixel_values", "token_type_ids", "mm_encoder_outputs"}),
                spans_argument="token_type_ids",
            ),
        ),
        Family(
            "qwen3_vl",
            "Qwen3VLText",
            layer={**_LLAMA_LAYER, **_QK_NORMS},
            decoder="model.language_model",
            model_class="Qwen3VLForConditionalGeneration",
            vision=VisionSpec(
                "Qwen3VLModel",
                "qwen3_vl_text",
                frozenset(
                    {
                        "pixel_values",
                        "pixel_values_videos",
                        "image_grid_thw",
                        "video_grid_thw",
                        "mm_token_type_ids",
                        "mm_encoder_outputs",
                    }
                ),
                uses_mrope=True,
            ),
        ),
    )
}


def family_of(config: Any) -> Family | None:
    """Return the family of a model's config, or None if the architecture is not supported natively."""
    return FAMILIES.get(getattr(config, "model_type", None) or "")


def vision_of(model: Any) -> VisionSpec | None:
    """Return the wrapper of a vision-language model, or None if the model is text-only or not supported natively."""
    family = family_of(getattr(model, "config", None))
    return None if family is None else family.vision


def decoder_path(model: Any) -> str:
    """Return the module path of a model's language model without its head."""
    family = family_of(model.config)
    return "model" if family is None else family.decoder


def decoder_of(model: Any) -> Any:
    """Return a model's language model without its head."""
    return attrgetter(decoder_path(model))(model)


def dropped_softcap_reason(config: Any) -> str | None:
    """Return why the stock attention ignores the soft cap of attention scores, or None if it applies the cap.

    The native attention always applies it. transformers' sdpa attention does not support it, and the releases that
    let Gemma 2 run with sdpa (5.17) compute other results than the model was trained for.
    """
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None or not family.caps_scores or not getattr(config, "attn_logit_softcapping", None):
        return None
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return None
    return (
        f"attention implementation sdpa: it leaves out the soft cap of scores ({config.attn_logit_softcapping}), which "
        'the native prefill applies; load the model with attn_implementation="eager" or flash attention'
    )


REFERENCE_ADVICE = 'pop_ext.enable with backend="reference" works for this model, slowly.'
"""End of the text of an ``UnsupportedModelError`` for a model that the oracle runs."""


class UnsupportedModelError(ValueError):
    """Raised for a model that the native backend does not run. The text says why, and what works instead."""


def supported_models() -> dict[str, Preset]:
    """Return the presets of all models whose language model runs natively, by Hugging Face name.

    Any other model of the same architectures runs as well. Only published presets run without being named.

    Returns:
        Hugging Face name -> ``Preset``. ``preset.published`` is True where the number of omitted layers comes from
        the paper (POP, arXiv 2602.03295), and False where it is a suggestion of this project, which runs only if it is
        named.
    """
    known = {family.text_model_type for family in FAMILIES.values()}
    return {name: preset for name, preset in PRESETS.items() if preset.config["model_type"] in known}
