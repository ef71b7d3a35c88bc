"""Hugging Face architectures: where a family keeps what the native runtime reads.

A family is a map from the runtime's weight names (``ModelSpec.weight_slots``) to module paths;
shapes come from the modules themselves. To add one, add a ``Family`` to ``FAMILIES``.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from pop_ext import _core

# What a family without the module leaves out of its spec.
_OPTIONAL = ("q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "o_bias", "gate_bias", "up_bias", "down_bias")

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

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


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: ``config.model_type``.
        prefix: what the names of its classes begin with ("Llama" of LlamaForCausalLM, LlamaAttention, ...);
            another class in the place of one of them computes something else, so it is refused.
        layer: runtime weight name -> path inside a decoder layer.
        window: sliding window of a layer, 0 for none.
    """

    model_type: str
    prefix: str
    layer: dict[str, str] = field(default_factory=lambda: dict(_LLAMA_LAYER))
    window: Callable[[Any, int], int] = _no_window


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral", window=_window_everywhere),
        Family("qwen2", "Qwen2", window=_window_by_layer_type),
        Family(
            "qwen3",
            "Qwen3",
            layer={**_LLAMA_LAYER, "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight"},
            window=_window_by_layer_type,
        ),
    )
}


class UnsupportedModelError(ValueError):
    """The native backend does not run this model; the text says why and what works."""

    def __init__(self, reason: str) -> None:
        # The command line shows it, too, and has no such option: name the function.
        super().__init__(
            f'{reason}. pop_ext.enable with backend="reference" works for any decoder with K/V projections.'
        )


@dataclass(frozen=True)
class WeightRef:
    """A parameter by its place in the model, so that a reassigned one, or one of a replaced module, is noticed."""

    slot: str
    model: weakref.ref[nn.Module]  # an enabled model owns its description: a strong reference would be a cycle
    path: tuple[str, ...]

    def find(self) -> torch.Tensor | None:
        """The parameter that is there now; None if there is none any more."""
        *parents, name = self.path
        module = self.model()
        for parent in parents:
            module = None if module is None else module._modules.get(parent)
        return None if module is None else module._parameters.get(name)

    @property
    def tensor(self) -> torch.Tensor:
        tensor = self.find()
        assert tensor is not None
        return tensor


@dataclass(frozen=True)
class Description:
    """What ``describe`` found: the spec and, in its order, where each weight is."""

    spec: _core.ModelSpec
    weights: list[WeightRef]


def describe(model: Any) -> Description:
    """Maps a Hugging Face causal language model to the runtime's spec and weights.

    Raises:
        UnsupportedModelError: architecture, module, dtype or placement the native runtime has no form for.
    """
    description = map_weights(model)
    _check_placement(description.weights)
    return description


def map_weights(model: Any) -> Description:
    """``describe`` without a look at where the weights are: they may be on the meta device."""
    family = _family_of(model)
    decoder = model.model
    layers = list(decoder.layers)
    config = model.config
    if len(layers) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"model: expected {config.num_hidden_layers} decoder layers (config.num_hidden_layers), got {len(layers)}"
        )
    for index, layer in enumerate(layers):
        _check_class(layer, f"{family.prefix}DecoderLayer", f"model.layers.{index}")
        _check_class(layer.self_attn, f"{family.prefix}Attention", f"model.layers.{index}.self_attn")
        _check_class(layer.mlp, f"{family.prefix}MLP", f"model.layers.{index}.mlp")
    _check_class(decoder.norm, f"{family.prefix}RMSNorm", "model.norm")
    _check_class(decoder.rotary_emb, f"{family.prefix}RotaryEmbedding", "model.rotary_emb")
    places = {"embed_tokens": "model.embed_tokens.weight", "norm": "model.norm.weight"}
    for index in range(len(layers)):
        for slot, path in family.layer.items():
            places[f"layers.{index}.{slot}"] = f"model.layers.{index}.{path}"
    refs = {slot: ref for slot, path in places.items() if (ref := _ref(slot, model, path, family)) is not None}
    spec = _spec(family, model, refs)
    weights = []
    for name, _layer, shape in spec.weight_slots():
        ref = refs.pop(name, None)
        if ref is None:
            raise UnsupportedModelError(f"model: expected a weight {name} in every layer, got none")
        if tuple(ref.tensor.shape) != tuple(shape):
            raise UnsupportedModelError(f"weight {name}: expected shape {list(shape)}, got {list(ref.tensor.shape)}")
        weights.append(ref)
    if refs:
        raise UnsupportedModelError(f"model: expected no further weights, got {', '.join(sorted(refs))}")
    return Description(spec, weights)


def _family_of(model: Any) -> Family:
    config: Any = getattr(model, "config", None)
    model_type: Any = getattr(config, "model_type", None)
    family = FAMILIES.get(model_type)
    if family is None:
        found = model_type or type(model).__name__
        raise UnsupportedModelError(f"model: expected an architecture of {', '.join(sorted(FAMILIES))}, got {found}")
    _check_class(model, f"{family.prefix}ForCausalLM", "model")
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        # A dict as the checkpoint has it, or an object once transformers has read it.
        read = quantization.get if isinstance(quantization, dict) else partial(getattr, quantization)
        method = read("quant_method", None) or "unknown method"
        method = getattr(method, "value", method)  # an enum in configs that transformers has read
        raise UnsupportedModelError(f"model: expected unquantised weights, got a quantised checkpoint ({method})")
    return family


def _check_class(module: nn.Module, expected: str, place: str) -> None:
    # Subclasses in user code may compute something else, generated ones (FSDP, PEFT) do.
    if type(module).__name__ != expected:
        raise UnsupportedModelError(f"{place}: expected a {expected}, got {type(module).__name__}")


def _ref(slot: str, model: nn.Module, path: str, family: Family) -> WeightRef | None:
    *parents, name = path.split(".")
    module = model
    for parent in parents:
        module = getattr(module, parent)
    expected: type[nn.Module] | None = nn.Linear if slot.endswith(("_proj", "_bias")) else None
    if slot == "embed_tokens":
        expected = nn.Embedding
    if expected is None:
        _check_class(module, f"{family.prefix}RMSNorm", path.rpartition(".")[0])
    elif type(module) is not expected:
        found = f"{type(module).__module__}.{type(module).__name__}"
        raise UnsupportedModelError(
            f"{slot}: expected a plain torch.nn.{expected.__name__}, got {found} "
            "(merge adapters into the weights, merge_and_unload of PEFT, and load unquantised weights)"
        )
    if module._parameters.get(name) is None:
        if slot.rpartition(".")[2] in _OPTIONAL:
            return None
        raise UnsupportedModelError(f"{slot}: expected a parameter {path}, got none (parametrised or fused weights)")
    return WeightRef(slot, weakref.ref(model), (*parents, name))


def _devices() -> tuple[str, ...]:
    """Device types that this build has kernels for."""
    return ("cpu", "cuda") if _core.build_info()["cuda"] else ("cpu",)


def _check_placement(weights: list[WeightRef]) -> None:
    first = weights[0].tensor
    for ref in weights:
        tensor = ref.tensor
        if type(tensor) not in (nn.Parameter, torch.Tensor):
            raise UnsupportedModelError(f"weight {ref.slot}: expected a plain tensor, got {type(tensor).__name__}")
        if tensor.device.type == "meta":
            raise UnsupportedModelError(f"weight {ref.slot}: expected loaded weights, got the meta device (offloaded)")
        if tensor.device.type not in _devices():
            raise UnsupportedModelError(
                f"weight {ref.slot}: expected a device of {', '.join(_devices())} (what this build has kernels for; "
                f"CUDA needs nvcc when it is installed), got {tensor.device}"
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise UnsupportedModelError(
                f"weight {ref.slot}: expected a contiguous last dimension, got strides {list(tensor.stride())}"
            )
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise UnsupportedModelError(
                f"weight {ref.slot}: expected {first.dtype} on {first.device} like {weights[0].slot}, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def _spec(family: Family, model: Any, refs: dict[str, WeightRef]) -> _core.ModelSpec:
    config = model.config
    attention = model.model.layers[0].self_attn
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim % 8 != 0 or not 8 <= head_dim <= 256:
        raise UnsupportedModelError(f"config.head_dim: expected a multiple of 8 up to 256, got {head_dim}")
    activation = _ACTIVATIONS.get(config.hidden_act)
    if activation is None:
        raise UnsupportedModelError(
            f"config.hidden_act: expected one of {', '.join(sorted(_ACTIVATIONS))}, got {config.hidden_act}"
        )
    dtype = refs["embed_tokens"].tensor.dtype
    if dtype not in _DTYPES:
        raise UnsupportedModelError(f"model: expected float32, bfloat16 or float16 weights, got {dtype}")
    return _core.ModelSpec(
        architecture=family.model_type,
        dtype=_DTYPES[dtype],
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        rotary_dim=2 * model.model.rotary_emb.inv_freq.numel(),
        intermediate_size=config.intermediate_size,
        vocab_size=refs["embed_tokens"].tensor.shape[0],
        rms_norm_eps=config.rms_norm_eps,
        attention_scale=getattr(attention, "scaling", None) or 1.0 / math.sqrt(head_dim),
        activation=activation,
        qkv_bias="layers.0.q_bias" in refs,
        o_bias="layers.0.o_bias" in refs,
        mlp_bias="layers.0.gate_bias" in refs,
        qk_norm="layers.0.q_norm" in refs,
        window=[family.window(config, layer) for layer in range(config.num_hidden_layers)],
    )
