"""Find the modules of a Hugging Face decoder, whatever its family."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pop_ext.hf.compat import check_module, text_config

Module = Any
"""A Hugging Face module. Typed as Any: type checkers do not know the submodules of an ``nn.Module``."""


@dataclass(frozen=True)
class DecoderModules:
    """Modules of a decoder-only model that the oracle calls.

    Attributes:
        decoder: the language model without its head.
        layers: its decoder layers.
        rotary: its rotary embedding.
    """

    decoder: Module
    layers: Sequence[Module]
    rotary: Module


def find_decoder_modules(model: Module) -> DecoderModules:
    """Return the decoder of a model, its layers and its rotary embedding.

    Raises:
        ValueError: The model lacks a module or an attribute that the oracle needs. The text names it.
        TypeError: ``model`` is no ``nn.Module``.
    """
    check_module(model)
    name = type(model).__name__

    def require(owner: Any, attribute: str, where: str) -> Any:
        value = getattr(owner, attribute, None)
        if value is None:
            raise ValueError(f"model: expected a decoder-only model that has {where}{attribute}, got {name} without it")
        return value

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not hasattr(decoder, "layers"):
        decoder = require(model, "model", "")
    layers = require(decoder, "layers", "decoder.")
    rotary = require(decoder, "rotary_emb", "decoder.")
    require(decoder, "norm", "decoder.")
    if model.get_output_embeddings() is None:
        raise ValueError(f"model: expected a language-model head, got {name} without one")
    for index, layer in enumerate(layers):
        attention = require(layer, "self_attn", f"layers.{index}.")
        projections = ("qkv_proj",) if hasattr(attention, "qkv_proj") else ("k_proj", "v_proj")
        for attribute in (*projections, "head_dim", "layer_idx"):
            require(attention, attribute, f"layers.{index}.self_attn.")
        family_function(attention, "apply_rotary_pos_emb")
    return DecoderModules(decoder, layers, rotary)


def check_oracle_runs(model: Module) -> None:
    """Check that the oracle computes what a pruned prefill of a model should.

    Raises:
        ValueError: The model lacks a module, has another number of layers than its config says, or attends in both
            directions.
        TypeError: ``model`` is no ``nn.Module``.
    """
    layers, config = find_decoder_modules(model).layers, text_config(model)
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"model: expected {config.num_hidden_layers} decoder layers (config.num_hidden_layers), got {len(layers)}"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError("config.use_bidirectional_attention: expected a causal model, got True")


def family_function(attention: Module, name: str) -> Callable[..., Any]:
    """Return a function from the Python module that defines a model's attention class.

    Args:
        attention: attention module of a layer.
        name: of the function, for example ``apply_rotary_pos_emb``.

    Raises:
        ValueError: The Python module has no such function.
    """
    defined_in = type(attention).__module__
    function = getattr(sys.modules[defined_in], name, None)
    if function is None:
        raise ValueError(
            f"model: expected a function {name} in {defined_in}, which defines {type(attention).__name__}, got none"
        )
    return function


def rope_follows_length(rotary: Module) -> bool:
    """Return whether RoPE frequencies depend on the longest sequence of a call ("dynamic", "longrope")."""
    kinds = getattr(rotary, "rope_type", None)
    return not {"dynamic", "longrope"}.isdisjoint(kinds.values() if isinstance(kinds, dict) else [kinds])


def input_device(model: Module) -> torch.device:
    """Return the device that ids go to: that of the embeddings, or where accelerate runs them if it offloads them."""
    embeddings: Any = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    hook = getattr(embeddings, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    return device if device.type != "meta" or execution is None else torch.device(execution)


def rounds_inputs(root: nn.Module) -> bool:
    """Return whether a linear layer inside ``root``, or itself, rounds its inputs to int8, as torchao's can.

    Two ways to compute such a model differ by more than rounding, since a value close to a tie becomes another integer.
    """
    return any(_rounds_input(module) for module in root.modules() if type(module) is nn.Linear)


def _rounds_input(module: nn.Module) -> bool:
    weight: Any = module._parameters.get("weight")
    if is_torchao_int8(weight):
        return weight.act_quant_kwargs is not None
    scheme: Any = getattr(module, "quantization_scheme", None)
    return is_compressed(module) and scheme.input_activations is not None


def is_torchao_int8(weight: Any) -> bool:
    """Return whether a weight is torchao's tensor of 8-bit integers."""
    return type(weight).__name__ == "Int8Tensor" and type(weight).__module__.partition(".")[0] == "torchao"


def is_compressed(module: nn.Module) -> bool:
    """Return whether compressed-tensors has given a linear module a scheme."""
    return type(getattr(module, "quantization_scheme", None)).__module__.startswith("compressed_tensors.")
