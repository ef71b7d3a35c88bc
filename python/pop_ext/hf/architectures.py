"""Hugging Face architectures: where a family keeps what the native runtime reads, and what it computes its own way.

A family is a map from the runtime's weight names (``ModelSpec.weight_slots``) to module paths;
shapes come from the modules themselves (``describe.py``). To add one, add a ``Family`` to ``FAMILIES``.
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


# In the place of gate_proj, up_proj and down_proj in a sparse layer.
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
    """The mixtures of experts that a family has in the place of some layers' MLPs.

    Attributes:
        inner_size: the config's name for the intermediate size of one expert.
        sparse: whether a layer has one.
        norm_topk: whether the weights of a token's experts are normalised to a sum of one.
    """

    inner_size: str
    sparse: Callable[[Any, int], bool] = _every_layer
    norm_topk: Callable[[Any], bool] = _always


def _sparse_by_step(config: Any, layer: int) -> bool:
    sparse = config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
    return sparse and layer not in config.mlp_only_layers


@dataclass(frozen=True)
class Vision:
    """What surrounds the language model of a vision-language family, and stays transformers' own.

    Attributes:
        wrapper: class of ``model.model``, which puts features of the vision tower among the embeddings.
        text_model_type: ``model_type`` of the language model's config.
        arguments: those of ``forward`` that the wrapper reads and its language model does not.
        spans_argument: the argument whose ones mark tokens of images, which see each other in both directions
            during prefill; None: images are causal, too.
        has_axes: whether positions have time, height and width: ``[3, batch, tokens]``.
    """

    wrapper: str
    text_model_type: str
    arguments: frozenset[str]
    spans_argument: str | None = None
    has_axes: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: ``config.model_type``.
        decoder: path of the language model without its head.
        vision: what is around that, in a vision-language family.
        model_class: class of the whole model; None: the prefix and ForCausalLM.
        prefix: what the names of its classes begin with ("Llama" of LlamaForCausalLM, LlamaAttention, ...);
            another class in the place of one of them computes something else, so it is refused.
        layer: runtime weight name -> path inside a decoder layer.
        window: sliding window of a layer, 0 for none.
        activation: the config's name for the activation of its MLP.
        norm_weight_offset: what its norms add to their weights.
        norms_over_heads: whether its norms of q and k take all heads of a token together, not each by itself.
        embedding: the class of its ``embed_tokens``.
        rope_kinds: the layer types that its rotary module takes, in the order of the runtime's tables of cos and sin;
            empty: one table for all layers, and no such argument.
        caps_scores: whether its config's ``attn_logit_softcapping`` acts on attention scores.
        caps_logits: whether its config's ``final_logit_softcapping`` acts on logits.
        experts: its mixtures of experts; None without.
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
    vision: Vision | None = None
    model_class: str | None = None
    experts: Experts | None = None

    @property
    def has_axes(self) -> bool:
        """Whether its positions have time, height and width."""
        return self.vision is not None and self.vision.has_axes

    @property
    def text_model_type(self) -> str:
        """``model_type`` of the config that describes the language model."""
        return self.model_type if self.vision is None else self.vision.text_model_type

    def is_sparse(self, config: Any, layer: int) -> bool:
        """Whether a layer has experts in the place of its MLP."""
        return self.experts is not None and self.experts.sparse(config, layer)

    def paths(self, config: Any, layer: int) -> dict[str, str]:
        """Runtime weight name -> path inside this layer."""
        if not self.is_sparse(config, layer):
            return self.layer
        return {**{slot: path for slot, path in self.layer.items() if slot not in _MLP}, **_SPARSE_MLP}


_MLP = {f"{name}_{kind}" for name in ("gate", "up", "down") for kind in ("proj", "bias")}

_QK_NORMS = {"q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight"}

# Fused matrices: slots of one path take its rows one after another, in the order of the runtime's weights.
_PHI_LAYER = {
    **_LLAMA_LAYER,
    **{f"{name}_proj": "self_attn.qkv_proj.weight" for name in "qkv"},
    **{f"{name}_bias": "self_attn.qkv_proj.bias" for name in "qkv"},
    **{f"{name}_proj": "mlp.gate_up_proj.weight" for name in ("gate", "up")},
    **{f"{name}_bias": "mlp.gate_up_proj.bias" for name in ("gate", "up")},
}

# A norm before and after attention and MLP each.
_GEMMA_LAYER = {
    **_LLAMA_LAYER,
    "attention_out_norm": "post_attention_layernorm.weight",
    "post_norm": "pre_feedforward_layernorm.weight",
    "mlp_out_norm": "post_feedforward_layernorm.weight",
}

# Norms of what attention and MLP add, and none of what they read.
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
            vision=Vision(
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
            vision=Vision(
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
                has_axes=True,
            ),
        ),
    )
}


def family_of(config: Any) -> Family | None:
    """The family of a model's config; None without a native form."""
    return FAMILIES.get(getattr(config, "model_type", None) or "")


def vision_of(model: Any) -> Vision | None:
    """What surrounds the language model of a model; None for one of text, or without a native form."""
    family = family_of(getattr(model, "config", None))
    return None if family is None else family.vision


def decoder_path(model: Any) -> str:
    """Where a model of one of the families has its language model, without the head."""
    family = family_of(model.config)
    return "model" if family is None else family.decoder


def decoder_of(model: Any) -> Any:
    """The language model, without its head, of a model of one of the families."""
    return attrgetter(decoder_path(model))(model)


def dropped_softcap(config: Any) -> str | None:
    """Why the stock attention would leave out the soft cap of scores that the native one applies; None if it would not.

    transformers' sdpa attention takes no cap; releases that let Gemma 2 use it (5.17) compute another model.
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


class UnsupportedModelError(ValueError):
    """The native backend does not run this model; the text says why and what works."""

    def __init__(self, reason: str) -> None:
        # The command line shows it, too, and has no such option: name the function.
        super().__init__(
            f'{reason}. pop_ext.enable with backend="reference" works for any causal language model with K/V '
            "projections."
        )


def supported_models() -> dict[str, Preset]:
    """Every model with a preset and a native form of its text model: Hugging Face name -> preset.

    ``preset.published`` tells a number of layers from the paper (POP, arXiv 2602.03295) from a default of ours; any
    other model of the same architectures runs as well, with the deepest third omitted unless told otherwise.
    """
    known = {family.text_model_type for family in FAMILIES.values()}
    return {name: preset for name, preset in PRESETS.items() if preset.config["model_type"] in known}
