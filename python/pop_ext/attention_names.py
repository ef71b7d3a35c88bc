"""Which attention a model's layers name, and whether the native one stands for it.

transformers looks the function up by name at each call: ``_attn_implementation`` of the config that a layer's
attention holds, in a registry that anybody may add to.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pop_ext.families import decoder_of

_KVPRESS = "kvpress.attention_patch"


def foreign_attention(model: nn.Module) -> str | None:
    """An attention of some layer that the native one does not stand for, in words; None: there is none.

    Args:
        model: of one of the native families.
    """
    decoder = decoder_of(model)
    attentions = [decoder, *(layer._modules.get("self_attn") for layer in decoder.layers)]  # the first makes the mask
    seen = set()  # nearly always all layers have one config
    for number, module in enumerate(attentions):
        where = f" (layer {number - 1})" if number > 0 else ""
        config = getattr(module, "config", None)
        if (id(config), type(module)) not in seen:
            seen.add((id(config), type(module)))
            name = getattr(config, "_attn_implementation", None) or "eager"
            if name not in ("eager", "sdpa") and not name.startswith("flash"):
                return f"attention implementation {name}{where}: expected eager, sdpa or flash attention"
            home = _foreign_home(name, module)
            if home is not None:
                return f"attention implementation {name}{where}: expected transformers' own, got {home}'s"
        if module is not None and vars(module).get("masked_key_indices") is not None:
            return f"masked_key_indices{where}: kvpress masks some keys"
    return None


def _foreign_home(name: str, attention: nn.Module) -> str | None:
    """The module of a function behind ``name`` that is not transformers' own: attention, or what makes its mask."""
    function = _without_kvpress(ALL_ATTENTION_FUNCTIONS.get(name))
    if function is None:  # eager is a function beside the class
        function = getattr(sys.modules.get(type(attention).__module__), "eager_attention_forward", None)
    for found in (function, ALL_MASK_ATTENTION_FUNCTIONS.get(name)):
        home = None if found is None else getattr(found, "__module__", None) or type(found).__module__
        if home is not None and not home.startswith("transformers."):
            return home
    return None


def _without_kvpress(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """What kvpress wrapped: importing it wraps every registered function.

    Its wrapper changes keys where ``masked_key_indices`` of a module names some, and nothing else of a prefill.
    """
    while function is not None and getattr(function, "__module__", None) == _KVPRESS:
        inside = inspect.getclosurevars(function).nonlocals.get("func") if inspect.isfunction(function) else None
        if inside is None:
            return function
        function = inside
    return function
