"""What a family of architectures is to the native runtime: ``Family``.

It maps the runtime's weight names (``ModelSpec.weight_slots``) to module paths, and says how the family differs from
Llama. Shapes are read from the modules themselves (``weight_map.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

LLAMA_LAYER = {
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


# A sparse layer has these weights instead of gate_proj, up_proj and down_proj.
SPARSE_MLP = {
    "router": "mlp.gate.weight",
    "experts_gate_up": "mlp.experts.gate_up_proj",
    "experts_down": "mlp.experts.down_proj",
}


_MLP = {f"{name}_{kind}" for name in ("gate", "up", "down") for kind in ("proj", "bias")}


def _no_window(config: Any, layer: int) -> int:
    return 0


def every_layer(config: Any, layer: int) -> bool:
    return True


def always(config: Any) -> bool:
    return True


@dataclass(frozen=True)
class Experts:
    """Describe the mixture of experts that replaces the MLP in some layers of a family.

    Attributes:
        inner_size: name of the config attribute with the intermediate size of one expert.
        sparse: ``(config, layer)`` to whether this layer has experts.
        norm_topk: ``config`` to whether the weights of a token's experts are divided by their sum.
        layer: runtime weight name -> path inside a decoder layer, of what replaces the MLP. A bias of the router and a
            shared expert are there if the family has them.
        count: name of the config attribute with the number of experts.
        scores: of the router: "softmax" over all experts, or "sigmoid" of each logit.
        norm_topk_eps: constant that is added to the sum that ``norm_topk`` divides by.
        scale: name of the config attribute that the weights are multiplied by in the end; None: by one.
        float32: whether the router has float32 weights, and computes in float32, in a model of any dtype.
        activation: the runtime's name of their activation; None: that of ``Family.activation``.
        transposed: whether their matrices are stored as ``[in, out]``, other than those of ``nn.Linear``.
        interleaved: whether gate and up channels take turns. False: all of gate, then all of up.
    """

    inner_size: str
    sparse: Callable[[Any, int], bool] = every_layer
    norm_topk: Callable[[Any], bool] = always
    layer: dict[str, str] = field(default_factory=lambda: dict(SPARSE_MLP))
    count: str = "num_experts"
    scores: str = "softmax"
    norm_topk_eps: float = 0.0
    scale: str | None = None
    float32: bool = False
    activation: str | None = None
    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class VisionSpec:
    """Describe the wrapper around the language model of a vision-language model. It runs as transformers has it.

    Attributes:
        prefix: common prefix of the class names of the model and of its wrapper ("Llava" in
            LlavaForConditionalGeneration and LlavaModel). The wrapper, ``model.model``, inserts the features of the
            vision tower into the embeddings.
        arguments: arguments of ``forward`` that the wrapper reads and the language model does not.
        spans_argument: name of the argument that marks image tokens with ones. The tokens of an image attend to each
            other in both directions during prefill. None: attention is causal for images, too.
        uses_mrope: whether the language model uses multimodal RoPE, whose positions have three axes (time, height and
            width): ``[3, batch, tokens]``.
        decoder: name of the language model inside the wrapper.
    """

    prefix: str
    arguments: frozenset[str]
    spans_argument: str | None = None
    uses_mrope: bool = False
    decoder: str = "language_model"


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
        norms_after_rope: whether the norms of q and k follow RoPE.
        rope_interleaved: whether RoPE turns pairs of channels (2i, 2i + 1). False: (i, i + half the rotary width).
        scales_queries: whether q is multiplied by a factor that grows with its position, by
            ``config.rope_parameters["llama_4_scaling_beta"]``.
        multipliers: whether ``config.embedding_multiplier``, ``residual_multiplier`` and ``logits_scaling`` apply.
        embedding: class name of ``embed_tokens``.
        rope_kinds: layer types that the rotary module takes as an argument, in the order of the runtime's cos and sin
            tables. Empty: the module takes no layer type, and all layers that rotate share one table.
        rotates: ``(config, layer)`` to whether a layer applies RoPE. In a family with ``rope_kinds`` all layers do.
        caps_scores: whether attention applies ``config.attn_logit_softcapping`` to its scores.
        caps_logits: whether the head applies ``config.final_logit_softcapping`` to its logits.
        experts: its mixture of experts; None without one.
        classes: names of classes that do not begin with the prefix, by the rest of the name ("MLP": "Qwen2MLP").
        vision: the wrapper around the language model; None in a text family.
    """

    model_type: str
    prefix: str
    layer: dict[str, str] = field(default_factory=lambda: dict(LLAMA_LAYER))
    window: Callable[[Any, int], int] = _no_window
    activation: str = "hidden_act"
    norm_weight_offset: float = 0.0
    norms_over_heads: bool = False
    norms_after_rope: bool = False
    rope_interleaved: bool = False
    scales_queries: bool = False
    multipliers: bool = False
    embedding: str = "Embedding"
    rope_kinds: tuple[str, ...] = ()
    rotates: Callable[[Any, int], bool] = every_layer
    caps_scores: bool = False
    caps_logits: bool = False
    experts: Experts | None = None
    classes: dict[str, str] = field(default_factory=dict)
    vision: VisionSpec | None = None

    @property
    def uses_mrope(self) -> bool:
        """Whether positions have three axes: time, height and width."""
        return self.vision is not None and self.vision.uses_mrope

    @property
    def divides_logits(self) -> bool:
        """Whether the head divides its logits by ``config.logits_scaling``. No class with a wrapper does."""
        return self.multipliers and self.vision is None

    @property
    def decoder(self) -> str:
        """Path of the language model without its head."""
        return "model" if self.vision is None else f"model.{self.vision.decoder}"

    @property
    def model_class(self) -> str:
        """Class name of the whole model."""
        return f"{self.prefix}ForCausalLM" if self.vision is None else f"{self.vision.prefix}ForConditionalGeneration"

    def class_name(self, kind: str) -> str:
        """Return the name of a class of modules, for example "MLP"."""
        return self.classes.get(kind, f"{self.prefix}{kind}")

    def is_sparse(self, config: Any, layer: int) -> bool:
        """Return whether a layer has experts instead of one MLP."""
        return self.experts is not None and self.experts.sparse(config, layer)

    def paths(self, config: Any, layer: int) -> dict[str, str]:
        """Return a map from runtime weight name to path inside this layer."""
        if self.experts is None or not self.experts.sparse(config, layer):
            return self.layer
        return {**{slot: path for slot, path in self.layer.items() if slot not in _MLP}, **self.experts.layer}
