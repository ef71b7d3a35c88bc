"""From a Hugging Face model to the runtime's ModelSpec and the places of its weights."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from pop_ext import _core
from pop_ext.hf.architectures import FAMILIES, Family, UnsupportedModelError, decoder_of, dropped_softcap, family_of
from pop_ext.hf.compat import check_module

# What a family without the module leaves out of its spec.
_OPTIONAL = ("q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "o_bias", "gate_bias", "up_bias", "down_bias")

# Slots of a sparse layer -> what the names of their modules' classes end with.
_EXPERTS = {"router": "TopKRouter", "experts_gate_up": "Experts", "experts_down": "Experts"}

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_MERGE = "merge adapters into the weights, merge_and_unload of PEFT"

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class WeightRef:
    """A parameter by its place in the model, so that a reassigned one, or one of a replaced module, is noticed.

    ``rows``: of a fused matrix, those that are the slot's; None: all.
    """

    slot: str
    model: weakref.ref[nn.Module]  # an enabled model owns its description: a strong reference would be a cycle
    path: tuple[str, ...]
    rows: tuple[int, int] | None = None

    def find(self) -> torch.Tensor | None:
        """The parameter that is there now; None if there is none any more."""
        *parents, name = self.path
        module = self.model()
        for parent in parents:
            module = None if module is None else module._modules.get(parent)
        return None if module is None else module._parameters.get(name)

    @property
    def tensor(self) -> torch.Tensor:
        """What the runtime reads: the parameter, or a view of its rows."""
        tensor = self.find()
        assert tensor is not None
        return tensor if self.rows is None else tensor.detach()[slice(*self.rows)]


@dataclass(frozen=True)
class Description:
    """What ``describe`` found: the family, the spec and, in its order, where each weight is."""

    family: Family
    spec: _core.ModelSpec
    weights: list[WeightRef]

    def model(self) -> nn.Module | None:
        """The model that was described; None: nobody has it any more."""
        return self.weights[0].model()


def describe(model: Any) -> Description:
    """Maps a Hugging Face causal language model to the runtime's spec and weights.

    Raises:
        UnsupportedModelError: architecture, module, dtype or placement the native runtime has no form for.
        TypeError: no model at all.
    """
    check_module(model)
    description = map_weights(model)
    _check_placement(description.weights)
    return description


def map_weights(model: Any) -> Description:
    """``describe`` without a look at where the weights are: they may be on the meta device."""
    family = _family_of(model)
    decoder = decoder_of(model)
    layers = list(decoder.layers)
    config = model.config.get_text_config(decoder=True)
    root = family.decoder
    if len(layers) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"model: expected {config.num_hidden_layers} decoder layers (config.num_hidden_layers), got {len(layers)}"
        )
    for index, layer in enumerate(layers):
        _check_class(layer, f"{family.prefix}DecoderLayer", f"{root}.layers.{index}")
        _check_class(layer.self_attn, f"{family.prefix}Attention", f"{root}.layers.{index}.self_attn")
        kind = "SparseMoeBlock" if family.is_sparse(config, index) else "MLP"
        _check_class(layer.mlp, f"{family.prefix}{kind}", f"{root}.layers.{index}.mlp")
    _check_class(decoder.norm, f"{family.prefix}RMSNorm", f"{root}.norm")
    _check_class(decoder.rotary_emb, f"{family.prefix}RotaryEmbedding", f"{root}.rotary_emb")
    places = {"embed_tokens": f"{root}.embed_tokens.weight", "norm": f"{root}.norm.weight"}
    for index in range(len(layers)):
        for slot, path in family.paths(config, index).items():
            places[f"layers.{index}.{slot}"] = f"{root}.layers.{index}.{path}"
    refs = {slot: ref for slot, path in places.items() if (ref := _ref(slot, model, path, family)) is not None}
    spec = _spec(family, model, refs)
    users = Counter(ref.path for ref in refs.values())
    taken: Counter[tuple[str, ...]] = Counter()  # rows of fused matrices
    weights = []
    for name, _layer, shape in spec.weight_slots():
        ref = refs.pop(name, None)
        if ref is None:
            raise UnsupportedModelError(f"model: expected a weight {name} in every layer, got none")
        if users[ref.path] > 1:
            first = taken[ref.path]
            ref = replace(ref, rows=(first, first + shape[0]))
            taken[ref.path] += shape[0]
        if tuple(ref.tensor.shape) != tuple(shape):
            raise UnsupportedModelError(f"weight {name}: expected shape {list(shape)}, got {list(ref.tensor.shape)}")
        weights.append(ref)
    for ref in weights:
        fused = ref.find()
        if ref.rows is not None and fused is not None and len(fused) != taken[ref.path]:
            raise UnsupportedModelError(
                f"weight {'.'.join(ref.path)}: expected {taken[ref.path]} rows, got {len(fused)}"
            )
    if refs:
        raise UnsupportedModelError(f"model: expected no further weights, got {', '.join(sorted(refs))}")
    return Description(family, spec, weights)


def _family_of(model: Any) -> Family:
    config: Any = getattr(model, "config", None)
    family = family_of(config)
    if family is None:
        found = getattr(config, "model_type", None) or type(model).__name__
        raise UnsupportedModelError(f"model: expected an architecture of {', '.join(sorted(FAMILIES))}, got {found}")
    _check_class(model, family.model_class or f"{family.prefix}ForCausalLM", "model")
    if family.vision is not None:
        _check_class(model.model, family.vision.wrapper, "model.model")
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
    found = type(module)
    if found.__module__.startswith("peft."):
        raise UnsupportedModelError(
            f"{place}: expected a {expected}, got {found.__module__}.{found.__name__} ({_MERGE})"
        )
    if found.__name__ != expected:
        raise UnsupportedModelError(f"{place}: expected a {expected}, got {found.__name__}")


def _ref(slot: str, model: nn.Module, path: str, family: Family) -> WeightRef | None:
    *parents, name = path.split(".")
    kind = slot.rpartition(".")[2]
    module = model
    for parent in parents:
        module = getattr(module, parent)
    if slot == "embed_tokens":
        _check_class(module, family.embedding, path.rpartition(".")[0])
    elif kind in _EXPERTS:
        _check_class(module, f"{family.prefix}{_EXPERTS[kind]}", path.rpartition(".")[0])
    elif not slot.endswith(("_proj", "_bias")):
        _check_class(module, f"{family.prefix}RMSNorm", path.rpartition(".")[0])
    elif type(module) is not nn.Linear:
        found = f"{type(module).__module__}.{type(module).__name__}"
        raise UnsupportedModelError(
            f"{slot}: expected a plain torch.nn.Linear, got {found} ({_MERGE}, and load unquantised weights)"
        )
    if module._parameters.get(name) is None:
        if kind in _OPTIONAL:
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
            raise UnsupportedModelError(
                f"weight {ref.slot}: expected a plain tensor, got {type(tensor).__name__} (of a tensor-parallel or "
                "quantised model?)"
            )
        if tensor.device.type == "meta":
            raise UnsupportedModelError(
                f"weight {ref.slot}: expected loaded weights, got the meta device (offloaded by a device_map?)"
            )
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
    config, decoder = model.config.get_text_config(decoder=True), decoder_of(model)
    attention = decoder.layers[0].self_attn
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim % 8 != 0 or not 8 <= head_dim <= 256:
        raise UnsupportedModelError(f"config.head_dim: expected a multiple of 8 up to 256, got {head_dim}")
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError("config.use_bidirectional_attention: expected a causal model, got True")
    if family.norms_over_heads and "layers.0.q_bias" in refs:
        raise UnsupportedModelError("config.attention_bias: expected none before norms over all heads, got True")
    dropped = dropped_softcap(config)
    if dropped is not None:
        raise UnsupportedModelError(dropped)
    found = getattr(config, family.activation)
    activation = _ACTIVATIONS.get(found)
    if activation is None:
        raise UnsupportedModelError(
            f"config.{family.activation}: expected one of {', '.join(sorted(_ACTIVATIONS))}, got {found}"
        )
    embedding = refs["embed_tokens"].tensor
    if embedding.dtype not in _DTYPES:
        raise UnsupportedModelError(f"model: expected float32, bfloat16 or float16 weights, got {embedding.dtype}")
    layers = range(config.num_hidden_layers)
    return _core.ModelSpec(
        architecture=family.model_type,
        dtype=_DTYPES[embedding.dtype],
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        rotary_dim=_rotary_dim(family, decoder.rotary_emb),
        intermediate_size=config.intermediate_size,
        vocab_size=embedding.shape[0],
        rms_norm_eps=config.rms_norm_eps,
        attention_scale=getattr(attention, "scaling", None) or 1.0 / math.sqrt(head_dim),
        activation=activation,
        qkv_bias="layers.0.q_bias" in refs,
        o_bias="layers.0.o_bias" in refs,
        mlp_bias=any(slot.endswith(".gate_bias") for slot in refs),
        qk_norm="layers.0.q_norm" in refs,
        qk_norm_over_heads=family.norms_over_heads,
        norm_weight_offset=family.norm_weight_offset,
        input_norms="input_norm" in family.layer,
        output_norms="attention_out_norm" in family.layer,
        embed_scale=_embed_scale(decoder.embed_tokens, embedding.dtype),
        attention_softcap=(config.attn_logit_softcapping or 0.0) if family.caps_scores else 0.0,
        window=[family.window(config, layer) for layer in layers],
        rope_table=[_rope_table(family, config, layer) for layer in layers],
        **_experts(family, config),
    )


def _experts(family: Family, config: Any) -> dict[str, Any]:
    """What the spec says of sparse layers; nothing without any."""
    layers = range(config.num_hidden_layers)
    if family.experts is None or not any(family.is_sparse(config, layer) for layer in layers):
        return {}
    return {
        "sparse": [int(family.is_sparse(config, layer)) for layer in layers],
        "num_experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "moe_intermediate_size": getattr(config, family.experts.inner_size),
        "norm_topk": family.experts.norm_topk(config),
    }


def _embed_scale(embedding: Any, dtype: torch.dtype) -> float:
    """What ids' embeddings are multiplied by, rounded to the dtype as the stock model rounds it."""
    scale = getattr(embedding, "embed_scale", None)
    if scale is None:
        return 1.0
    if scale.device.type == "meta":
        scale = torch.tensor(embedding.scalar_embed_scale, device="cpu")
    return float(scale.to(dtype))  # the buffer's value: that of a widened model stays rounded as it was


def _rope_table(family: Family, config: Any, layer: int) -> int:
    return family.rope_kinds.index(config.layer_types[layer]) if family.rope_kinds else 0


def _rotary_dim(family: Family, rotary: Any) -> int:
    names = [f"{kind}_inv_freq" for kind in family.rope_kinds if kind in rotary.layer_types] or ["inv_freq"]
    widths = {2 * getattr(rotary, name).numel() for name in names}
    if len(widths) != 1:
        raise UnsupportedModelError(f"config.rope_parameters: expected one rotary width, got {sorted(widths)}")
    return widths.pop()


class WeightStamps:
    """The parameters that a model was loaded from, and what they were."""

    def __init__(self, refs: list[WeightRef]) -> None:
        self._refs = refs
        self._tensors: list[Any] = [ref.find() for ref in refs]
        self._versions = self._current_versions()
        self._fused = [(ref, tensor) for ref, tensor in zip(refs, self._tensors, strict=True) if ref.rows is not None]
        self._facts = self._current_facts()

    def _current_versions(self) -> list[int]:
        return [-1 if tensor.is_inference() else tensor._version for tensor in self._tensors]

    def _current_facts(self) -> list[tuple[object, ...]]:
        # The runtime looks at these of what it reads, but of fused parameters that is only a view. Through .data all of
        # them can change under one version: a transposed square matrix keeps even its address.
        return [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for _, tensor in self._fused]

    def moved(self) -> str | None:
        """The slot of a parameter that is not where it was, None: of none."""
        for ref, tensor in zip(self._refs, self._tensors, strict=True):
            if ref.find() is not tensor:
                return ref.slot
        return None

    def written(self) -> str | None:
        """The slot of a parameter that somebody wrote to, as far as Python sees; None: of none."""
        versions, facts = self._current_versions(), self._current_facts()
        if versions != self._versions:
            return self._refs[_first_difference(versions, self._versions)].slot
        return None if facts == self._facts else self._fused[_first_difference(facts, self._facts)][0].slot


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    return next(index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
