"""Map a Hugging Face model to the runtime's ``ModelSpec`` and find its weights."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from pop_ext import _core
from pop_ext.hf.architectures import (
    PORTABLE_ADVICE,
    UnsupportedModelError,
    decoder_of,
    family_of,
)
from pop_ext.hf.compat import check_module
from pop_ext.hf.families import WRAPPERS
from pop_ext.hf.family import Family
from pop_ext.hf.int8_linear import Int8Linear, Int8Weight
from pop_ext.hf.int8_weights import int8_weight, is_integer_linear
from pop_ext.hf.modules import is_compressed
from pop_ext.hf.spec import make_spec
from pop_ext.portable.decoder import may_run_portably
from pop_ext.utils.tensors import check_memory

# Weights that a model of a family may lack. The spec then says so.
_OPTIONAL = ("q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "o_bias", "gate_bias", "up_bias", "down_bias")

# Weight -> class name of its module without the family's prefix, where that is neither a norm nor nn.Linear.
_CLASSES = {
    "sinks": "Attention",
    **dict.fromkeys(("router", "router_logit_bias"), "TopKRouter"),
    **dict.fromkeys(("experts_gate_up", "experts_gate_up_bias", "experts_down", "experts_down_bias"), "Experts"),
}

# Parameters and buffers of a linear module with integers, other than its weight and bias.
_OF_INTEGERS = ("scale", "weight_scale", "weight_zero_point", "weight_shape")

_MERGE = "merge adapters into the weights, merge_and_unload of PEFT"


@dataclass(frozen=True)
class WeightRef:
    """Refer to a parameter by its path in the model, so that a replaced parameter or module is noticed.

    Attributes:
        slot: the runtime's name of the weight.
        model: weak, because an enabled model owns its description: a strong reference would be a cycle.
        path: names from the model down to the parameter.
        rows: (first, end) of this weight in a fused matrix; None: all rows.
        int8: the whole matrix in integers, or a copy of its ``rows`` in integers, if the runtime reads it so.
    """

    slot: str
    model: weakref.ref[nn.Module]
    path: tuple[str, ...]
    rows: tuple[int, int] | None = None
    int8: Int8Weight | None = field(default=None, compare=False, repr=False)

    @property
    def module(self) -> nn.Module | None:
        """The module that has the parameter now, or None if there is none any more."""
        module = self.model()
        for parent in self.path[:-1]:
            module = None if module is None else module._modules.get(parent)
        return module

    def find(self) -> torch.Tensor | None:
        """Return the whole parameter or buffer that is at the path now, or None if there is none any more."""
        module = self.module
        return None if module is None else _find_tensor(module, self.path[-1])

    @property
    def whole(self) -> torch.Tensor:
        """The parameter, or the integers in its place."""
        tensor = self.find() if self.int8 is None else self.int8.values
        assert tensor is not None
        return tensor

    @property
    def tensor(self) -> torch.Tensor:
        """`whole` or, of a fused matrix, the rows of this weight: what the runtime reads."""
        if self.rows is None or self._copies_rows:
            return self.whole
        return self.whole.detach()[slice(*self.rows)]

    @property
    def scale(self) -> torch.Tensor:
        """Scales of `tensor` if it holds integers, one or some for each row (`Int8Weight`); else empty."""
        if self.int8 is None:
            return torch.empty(0)
        return self.int8.scale if self.rows is None or self._copies_rows else self.int8.scale[slice(*self.rows)]

    @property
    def _copies_rows(self) -> bool:
        return self.int8 is not None and self.int8.copied


def _find_tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    parameter = module._parameters.get(name)
    return module._buffers.get(name) if parameter is None else parameter


@dataclass(frozen=True)
class Description:
    """Describe a model to the runtime. Made by ``describe``.

    Attributes:
        family: architecture of the model.
        spec: its shapes.
        weights: its weights in the order of ``ModelSpec.weight_slots``.
    """

    family: Family
    spec: _core.ModelSpec
    weights: list[WeightRef]

    def model(self) -> nn.Module | None:
        """Return the described model, or None if it no longer exists."""
        return self.weights[0].model()


def describe(model: Any) -> Description:
    """Map a Hugging Face causal language model to the runtime's spec and weights.

    Raises:
        UnsupportedModelError: The native runtime does not support the architecture, a module, or the dtype, device or
            layout of a weight.
        TypeError: ``model`` is no ``nn.Module``.
    """
    check_module(model)
    try:
        description = _map_known_weights(model)
        _check_tensors(description)
        check_memory({f"weight lm_head.{name}": value for name, value in model.lm_head.named_parameters()})
    except UnsupportedModelError as error:
        method = quantization_method(model)
        if method is not None:
            error.args = (f"model: expected unquantised weights, got a quantised checkpoint ({method}): {error}",)
        if may_run_portably(model):
            # Name the function, not only the option: the command line shows this text and has no --backend.
            error.args = (f"{error}. {PORTABLE_ADVICE}",)
        raise
    return description


def _map_known_weights(model: Any) -> Description:
    """Like ``map_weights``; a module or a member of the config that is not there is a model of another family."""
    try:
        return map_weights(model)
    except UnsupportedModelError:
        raise
    except ValueError as error:  # of the spec, which names its member
        raise UnsupportedModelError(f"config of {model.config.model_type}: {error}") from error
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise UnsupportedModelError(
            f"model: expected the modules and the config of {model.config.model_type} as pop_ext knows them, got "
            f"{error!r:.200}"
        ) from error


def map_weights(model: Any) -> Description:
    """Like ``describe``, without checking the tensors themselves: they may be on the meta device."""
    family = _check_family(model)
    config = model.config.get_text_config(decoder=True)
    _check_decoder(family, decoder_of(model), config)
    paths = {"embed_tokens": f"{family.decoder}.embed_tokens.weight", "norm": f"{family.decoder}.norm.weight"}
    for index in range(config.num_hidden_layers):
        for slot, path in family.paths(config, index).items():
            paths[f"layers.{index}.{slot}"] = f"{family.decoder}.layers.{index}.{path}"
    refs = {slot: ref for slot, path in paths.items() if (ref := _weight_ref(slot, model, path, family)) is not None}
    _check_whole(decoder_of(model), refs, family)
    spec = make_spec(family, model, refs)
    return Description(family, spec, _order_weights(spec, refs))


def _check_whole(decoder: Any, refs: dict[str, WeightRef], family: Family) -> None:
    """Raise UnsupportedModelError for a parameter or buffer of a layer that the runtime would not read."""
    known = {".".join(ref.path) for ref in refs.values()}
    for ref in refs.values():
        if ref.module is not None and is_integer_linear(ref.module):
            known |= {".".join((*ref.path[:-1], name)) for name in _OF_INTEGERS}
    layers, prefix = decoder.layers, f"{family.decoder}.layers"
    for name, _ in chain(layers.named_parameters(prefix=prefix), layers.named_buffers(prefix=prefix)):
        if name not in known:
            raise UnsupportedModelError(f"weight {name}: expected none of this name in {family.model_type}, got one")


def _check_decoder(family: Family, decoder: Any, config: Any) -> None:
    """Raise UnsupportedModelError unless a decoder has the layers and the module classes of its family."""
    layers = list(decoder.layers)
    root = family.decoder
    if len(layers) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"model: expected {config.num_hidden_layers} decoder layers (config.num_hidden_layers), got {len(layers)}"
        )
    for index, layer in enumerate(layers):
        _check_class(layer, family.class_name("DecoderLayer"), f"{root}.layers.{index}")
        _check_class(layer.self_attn, family.class_name("Attention"), f"{root}.layers.{index}.self_attn")
        kind = "SparseMoeBlock" if family.is_sparse(config, index) else "MLP"
        _check_class(layer.mlp, family.class_name(kind), f"{root}.layers.{index}.mlp")
    _check_class(decoder.norm, family.class_name("RMSNorm"), f"{root}.norm")
    _check_class(decoder.rotary_emb, family.class_name("RotaryEmbedding"), f"{root}.rotary_emb")


def _order_weights(spec: _core.ModelSpec, refs: dict[str, WeightRef]) -> list[WeightRef]:
    """Return the weights in the order of the spec, with their rows in fused matrices.

    Raises:
        UnsupportedModelError: A weight is missing, is one too many, or has another shape than the spec says.
    """
    remaining = dict(refs)
    slots_per_path = Counter(ref.path for ref in refs.values())
    fused_rows: Counter[tuple[str, ...]] = Counter()  # rows of each fused matrix that are assigned so far
    weights = []
    for name, _layer, shape in spec.weight_slots():
        ref = remaining.pop(name, None)
        if ref is None:
            raise UnsupportedModelError(f"model: expected a weight {name} in every layer, got none")
        if slots_per_path[ref.path] > 1:
            first = fused_rows[ref.path]
            ref = replace(ref, rows=(first, first + shape[0]))
            fused_rows[ref.path] += shape[0]
        if tuple(ref.tensor.shape) != tuple(shape):
            raise UnsupportedModelError(f"weight {name}: expected shape {list(shape)}, got {list(ref.tensor.shape)}")
        weights.append(ref)
    for ref in weights:
        fused = ref.find()
        if ref.rows is not None and fused is not None and len(fused) != fused_rows[ref.path]:
            raise UnsupportedModelError(
                f"weight {'.'.join(ref.path)}: expected {fused_rows[ref.path]} rows, got {len(fused)}"
            )
    if remaining:
        raise UnsupportedModelError(f"model: expected no further weights, got {', '.join(sorted(remaining))}")
    return weights


def _check_family(model: Any) -> Family:
    """Return the family of a model. Raise UnsupportedModelError if it has none."""
    config: Any = getattr(model, "config", None)
    family = family_of(config)
    if family is None:
        found = getattr(config, "model_type", None) or type(model).__name__
        if found in WRAPPERS:
            found += f" around {config.get_text_config(decoder=True).model_type}"
        raise UnsupportedModelError(f"model: expected an architecture that pop-ext info lists as native, got {found}")
    _check_class(model, family.model_class, "model")
    if family.vision is not None:
        _check_class(model.model, f"{family.vision.prefix}Model", "model.model")
    return family


def quantization_method(model: Any) -> str | None:
    """Return the method by which the checkpoint of a model was quantised; None if it was not.

    Only a name for errors: a checkpoint may have been dequantised when it was loaded, so the classes of the modules and
    the tensors decide.
    """
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is None:
        return None
    # A dict as in the checkpoint, or an object after transformers has parsed it.
    read = quantization.get if isinstance(quantization, dict) else partial(getattr, quantization)
    method = read("quant_method", None) or "unknown method"
    return str(getattr(method, "value", method))  # an enum in a parsed config


def _check_class(module: nn.Module, expected: str, path: str) -> None:
    """Raise UnsupportedModelError unless a module's class has the expected name."""
    # Compare names, no isinstance: subclasses in user code may compute something else, generated ones (FSDP, PEFT) do.
    found = type(module)
    if found.__module__.startswith("peft."):
        raise UnsupportedModelError(
            f"{path}: expected a {expected}, got {found.__module__}.{found.__name__} ({_MERGE})"
        )
    if found.__name__ != expected:
        raise UnsupportedModelError(f"{path}: expected a {expected}, got {found.__name__}")


def _weight_ref(slot: str, model: nn.Module, path: str, family: Family) -> WeightRef | None:
    """Return a reference to a weight, or None if it is optional and the model lacks it.

    Raises:
        UnsupportedModelError: The module at the path is of another class than the family's, or lacks the parameter.
    """
    *parents, name = path.split(".")
    kind = slot.rpartition(".")[2]
    outer = module = model
    for parent in parents:
        if kind in _OPTIONAL and parent not in module._modules:
            return None
        outer, module = module, getattr(module, parent)
    if kind == "shared_gate_proj":
        _check_class(outer, family.class_name("MLP"), ".".join(parents[:-1]))
    if slot == "embed_tokens":
        _check_class(module, family.embedding, path.rpartition(".")[0])
    elif kind in _CLASSES:
        _check_class(module, family.class_name(_CLASSES[kind]), path.rpartition(".")[0])
    elif kind == "router_bias":
        pass  # in the router or in the block around it, whose classes are checked
    elif not slot.endswith(("_proj", "_bias", ".shared_gate")):
        _check_class(module, family.class_name("RMSNorm"), path.rpartition(".")[0])
    elif type(module) not in (nn.Linear, Int8Linear):
        found = f"{type(module).__module__}.{type(module).__name__}"
        raise UnsupportedModelError(
            f"{slot}: expected a plain torch.nn.Linear, got {found} ({_MERGE}, and load unquantised weights)"
        )
    if _find_tensor(module, name) is None:
        if kind in _OPTIONAL:
            return None
        raise UnsupportedModelError(f"{slot}: expected a parameter {path}, got none (parametrised or fused weights)")
    integers = int8_weight(module) if name == "weight" else None
    if integers is None and name == "weight" and is_compressed(module):
        raise UnsupportedModelError(
            f"{slot}: expected weights of compressed-tensors in symmetric 8-bit integers by channel, tensor or group, "
            "unchanged, and inputs as they are or rounded by token, got others: "
            f"{module.quantization_scheme!s:.200}"
        )
    if integers is not None and integers.copied:  # floats hold the same values, and most matrices are read from them
        integers = None
    return WeightRef(slot, weakref.ref(model), (*parents, name), int8=integers)


def _devices() -> tuple[str, ...]:
    """Return the device types that this build has kernels for."""
    return ("cpu", "cuda") if _core.build_info()["cuda"] else ("cpu",)


def _check_tensors(description: Description) -> None:
    """Raise UnsupportedModelError unless all weights are plain tensors of one dtype on one supported device.

    The weights of a router that computes in float32 are float32.
    """
    weights, in_float32 = description.weights, description.spec.router_float32
    first = weights[0].tensor
    for ref in weights:
        tensor = ref.tensor
        dtype = torch.float32 if in_float32 and ref.slot.endswith((".router", ".router_bias")) else first.dtype
        dtype = torch.int8 if ref.int8 is not None else dtype
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
        if tensor.dtype != dtype or tensor.device != first.device:
            like = f" like {weights[0].slot}" if dtype == first.dtype else ", as from_pretrained keeps it"
            raise UnsupportedModelError(
                f"weight {ref.slot}: expected {dtype} on {first.device}{like}, got {tensor.dtype} on {tensor.device}"
            )
    missing = torch.ops.pop.device_missing(first)
    if missing:
        raise UnsupportedModelError(f"device {first.device}: {missing}")
