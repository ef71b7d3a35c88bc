"""The modules of a Hugging Face decoder, found without naming its family."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pop_ext.hf.compat import check_module

Module = Any
"""A Hugging Face module: an nn.Module whose submodules and attributes no type checker can know."""


@dataclass(frozen=True)
class DecoderModules:
    """The modules of a decoder-only model that the oracle touches."""

    decoder: Module
    layers: Sequence[Module]
    rotary: Module


def find_parts(model: Module) -> DecoderModules:
    """Decoder, its layers and its rotary module; a ValueError names what the model lacks, a TypeError what is none."""
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
        raise ValueError(f"model: expected a language-model head, {name} has none")
    for index, layer in enumerate(layers):
        attention = require(layer, "self_attn", f"layers.{index}.")
        projections = ("qkv_proj",) if hasattr(attention, "qkv_proj") else ("k_proj", "v_proj")
        for attribute in (*projections, "head_dim", "layer_idx"):
            require(attention, attribute, f"layers.{index}.self_attn.")
        family_function(attention, "apply_rotary_pos_emb")
    return DecoderModules(decoder, layers, rotary)


def family_function(attention: Module, name: str) -> Callable[..., Any]:
    """A function of the module that defines the family's attention."""
    home = type(attention).__module__
    function = getattr(sys.modules[home], name, None)
    if function is None:
        raise ValueError(f"model: expected {name} in {home}, the home of {type(attention).__name__}")
    return function
