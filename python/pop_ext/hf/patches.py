"""Code that somebody put in a module's place: hooks, replaced forwards, replaced classes.

The native loop calls no inner module, so none of it would run.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import lru_cache
from types import MethodType
from typing import Any

from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pop_ext.hf.architectures import decoder_of, decoder_path, dropped_softcap
from pop_ext.hf.compat import text_config


class InnerModules:
    """The modules whose forward the native loop stands for, as they were found. ``lm_head`` is none of them (head.py).

    A call looks at hundreds of them while a GPU has nothing to do yet: whether they are where they were is seen faster
    than they are found again.

    Attributes:
        named: (name, module), in a fixed order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.named: list[tuple[str, Any]] = [(decoder_path(model), decoder_of(model))]
        for name, module in self.named:  # grows as it goes
            for child_name, child in module._modules.items():
                if child is not None:
                    self.named.append((f"{name}.{child_name}", child))
        self._decoder, self._around = decoder_of(model), model.model
        if self._decoder is not self._around:  # what is around it runs, but not as it is (vision.py)
            self.named.append(("model", self._around))
        self._attributes = [module.__dict__ for _, module in self.named]
        self._children = [dict(module._modules) for _, module in self.named]
        self._parameters = [
            (own, name, parameter) for own in self._attributes for name, parameter in own["_parameters"].items()
        ]

    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` has these modules and no others, in their places, and no parameter of theirs is another."""
        if decoder_of(model) is not self._decoder or model.model is not self._around:
            return False
        if [own["_modules"] for own in self._attributes] != self._children:  # of modules none but itself is equal
            return False
        return all(own["_parameters"].get(name) is parameter for own, name, parameter in self._parameters)

    def has(self, module: nn.Module) -> bool:
        """Whether a module is among them."""
        return any(own is module for _, own in self.named)

    def foreign_code(self) -> str | None:
        """What the native loop would leave out, in words; None: nothing."""
        if has_global_hooks():
            return "global module hooks"
        patched = next(filter(is_patched, dict.fromkeys(type(module) for _, module in self.named)), None)
        if patched is not None:
            return f"a replaced forward of {patched.__name__}"
        for own, (name, module) in zip(self._attributes, self.named, strict=True):
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_hf_hook" in own:
                found = foreign_code_of(module)
                if found is not None:
                    return f"{found} on {name}"
        return None


def has_global_hooks() -> bool:
    """Whether somebody hooked every module there is."""
    return any(getattr(nn.modules.module, f"_global_forward{kind}_hooks", None) for kind in ("", "_pre"))


def foreign_code_of(module: nn.Module) -> str | None:
    """What was put on one module, in words; None: nothing."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        if not all(_is_idle(hook) for hook in hooks.values()):
            return "hooks"
    own = module.__dict__
    hook = own.get("_hf_hook")
    if hook is not None:
        return f"a hook of accelerate ({type(hook).__name__})"
    return "a replaced forward" if "forward" in own and not is_own_forward(module, own["forward"]) else None


def runs_as_written(module: nn.Module) -> bool:
    """Whether a call of a module runs its class's own forward, and no hook but idle ones."""
    return foreign_code_of(module) is None and not is_patched(type(module)) and not has_global_hooks()


def is_own_forward(module: nn.Module, forward: Any) -> bool:
    """Whether a ``forward`` put on an instance is its class's own, bound to it or compiled.

    accelerate leaves the first behind where it removes its hooks.
    """
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    return isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is type(module).forward


def is_patched(cls: Any) -> bool:
    """Whether a class's ``forward`` is not from the module that defines the class: decorators keep that."""
    return not _is_defined_with(cls, cls.forward)


def _is_idle(hook: Any) -> bool:
    # transformers' own recorders: installed by the first call that asks for hidden states, idle in others.
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


@lru_cache(maxsize=1024)
def _is_defined_with(cls: Any, forward: Any) -> bool:
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    return getattr(forward, "__module__", None) == owner.__module__


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


def unsupported_reason(model: nn.Module, inner: InnerModules) -> tuple[str, str] | None:
    """Return rule and reason why the native loop would compute something else than the model's modules, or None."""
    config = text_config(model)
    reason = dropped_softcap(config) or foreign_attention(model)
    if reason is not None:
        return "attention", reason
    experts = getattr(config, "_experts_implementation", None) or "eager"
    registered = ALL_EXPERTS_FUNCTIONS.get(experts)
    if registered is not None and not registered.__module__.startswith("transformers."):
        return "experts", f"experts implementation {experts}: expected transformers' own"
    foreign = inner.foreign_code()
    return None if foreign is None else ("hooks", f"{foreign}: the native loop would not run them")
