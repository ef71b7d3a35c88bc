"""Find hooks, replaced forwards and other code that changes what a model's modules compute.

The native loop calls none of the decoder's modules, so such code would not run. ``unsupported_reason`` makes the stock
forward run the call instead.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from types import CodeType, MethodType
from typing import Any

from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from pop_ext.hf.architectures import decoder_of, decoder_path, dropped_softcap_reason
from pop_ext.hf.compat import text_config
from pop_ext.hf.int8_weights import is_quantised_forward


class InnerModules:
    """The modules whose forward the native loop replaces, as they were when this object was made.

    ``lm_head`` is not among them: the native model calls it (``head.apply_head``).

    Every call must know whether the modules are still the same, and a GPU is idle until it does. Comparing hundreds of
    modules with those of the last call is faster than collecting them again.

    Attributes:
        decoder: the language model without its head.
        named: (name, module), in a fixed order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.named: list[tuple[str, Any]] = [(decoder_path(model), decoder_of(model))]
        for name, module in self.named:  # the list grows during the loop
            for child_name, child in module._modules.items():
                if child is not None:
                    self.named.append((f"{name}.{child_name}", child))
        self.decoder, self._wrapper = decoder_of(model), model.model
        if self.decoder is not self._wrapper:  # a vision wrapper runs as a shallow clone (vision.py)
            self.named.append(("model", self._wrapper))
        self._attributes = [module.__dict__ for _, module in self.named]
        self._children = [dict(module._modules) for _, module in self.named]
        self._parameters = [
            (own["_parameters"], name, parameter)
            for own in self._attributes
            for name, parameter in own["_parameters"].items()
        ]
        # Buffers that are saved are weights: the bias of a router. Others are caches of modules, which replace them.
        self._parameters += [
            (own["_buffers"], name, buffer)
            for own in self._attributes
            for name, buffer in own["_buffers"].items()
            if name not in own["_non_persistent_buffers_set"]
        ]

    def matches(self, model: nn.Module) -> bool:
        """Return whether ``model`` has exactly these modules, in the same places, with the same parameter objects."""
        if decoder_of(model) is not self.decoder or model.model is not self._wrapper:
            return False
        # Modules compare by identity, so equal dicts hold the same modules.
        if [own["_modules"] for own in self._attributes] != self._children:
            return False
        return all(own.get(name) is parameter for own, name, parameter in self._parameters)

    def has(self, module: nn.Module) -> bool:
        """Return whether ``module`` is one of these modules."""
        return any(own is module for _, own in self.named)

    def find_patch(self) -> str | None:
        """Describe the first hook or replaced forward that the native loop would not run; None without one."""
        if has_global_hooks():
            return "global module hooks"
        patched = next(filter(is_patched_class, dict.fromkeys(type(module) for _, module in self.named)), None)
        if patched is not None:
            return f"a replaced forward of {patched.__name__}"
        for own, (name, module) in zip(self._attributes, self.named, strict=True):
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_hf_hook" in own:
                found = find_module_patch(module)
                if found is not None:
                    return f"{found} on {name}"
        return None


def has_global_hooks() -> bool:
    """Return whether a global forward hook is registered, which PyTorch runs for every module."""
    return any(getattr(nn.modules.module, f"_global_forward{kind}_hooks", None) for kind in ("", "_pre"))


def find_module_patch(module: nn.Module) -> str | None:
    """Describe a hook or a replaced forward on one module instance; None without one."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        if not all(_is_output_recorder(hook) or _makes_inputs_require_grads(hook) for hook in hooks.values()):
            return "hooks"
    own = module.__dict__
    hook = own.get("_hf_hook")
    if hook is not None:
        return f"a hook of accelerate ({type(hook).__name__})"
    if "forward" not in own or is_own_forward(module, own["forward"]):
        return None
    # Weights that the runtime cannot read as this forward does are refused when they are loaded.
    return None if is_quantised_forward(module, own["forward"]) else "a replaced forward"


def is_unpatched(module: nn.Module) -> bool:
    """Return whether a call of a module runs its class's own forward and no hook that could change the result."""
    return find_module_patch(module) is None and not is_patched_class(type(module)) and not has_global_hooks()


def is_own_forward(module: nn.Module, forward: Any) -> bool:
    """Return whether a ``forward`` found on an instance is the method of its class, bound to it or compiled.

    accelerate leaves a bound method there when it removes its hooks.
    """
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    return isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is type(module).forward


def is_patched_class(cls: Any) -> bool:
    """Return whether the ``forward`` of a class comes from another Python module than the class that defines it.

    A decorated ``forward`` does not count: decorators keep ``__module__``.
    """
    return not _is_defined_with_class(cls, cls.forward)


def _is_output_recorder(hook: Any) -> bool:
    """Return whether a hook is one of transformers' output recorders.

    The first call that asks for hidden states installs them. They do nothing in calls that do not ask.
    """
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def _makes_inputs_require_grads(hook: Any) -> bool:
    """Return whether a hook is that of transformers' ``enable_input_require_grads``.

    Gradient checkpointing installs it on the embedding, where it stays after training. It changes no value.
    """
    code = getattr(hook, "__code__", None)
    return code is not None and code is _code_of_grad_hook()


@lru_cache(maxsize=1)
def _code_of_grad_hook() -> CodeType | None:
    # The hook is a new function for each model; its code is a constant of the method that makes it.
    method = inspect.unwrap(PreTrainedModel.enable_input_require_grads)
    constants = [constant for constant in method.__code__.co_consts if isinstance(constant, CodeType)]
    return next((code for code in constants if code.co_name == "make_inputs_require_grads"), None)


@lru_cache(maxsize=1024)
def _is_defined_with_class(cls: Any, forward: Any) -> bool:
    """Return whether ``forward`` names the Python module of the class in the MRO that defines it."""
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    return getattr(forward, "__module__", None) == owner.__module__


_KVPRESS = "kvpress.attention_patch"


def unsupported_attention(decoder: Any, layers: Iterable[Any] | None = None, paged: bool = False) -> str | None:
    """Describe the first layer's attention that the native attention does not reproduce; None if all are supported.

    Args:
        decoder: language model without its head.
        layers: its decoder layers; ``decoder.layers`` if None.
        paged: whether the attentions of continuous batching are supported, too. They apply no soft cap of scores.
    """
    # The decoder's own config decides which mask is made.
    layers = decoder.layers if layers is None else layers
    attentions = [decoder, *(layer._modules.get("self_attn") for layer in layers)]
    seen = set()  # usually all layers share one config, so one check is enough
    for number, module in enumerate(attentions):
        where = f" (layer {number - 1})" if number > 0 else ""
        config = getattr(module, "config", None)
        if (id(config), type(module)) not in seen:
            seen.add((id(config), type(module)))
            name = getattr(config, "_attn_implementation", None) or "eager"
            if paged and name == "paged|eager" and getattr(config, "attn_logit_softcapping", None):
                return f"attention implementation {name}{where}: it leaves out the soft cap of scores"
            kind = name.removeprefix("paged|") if paged else name
            if kind not in ("eager", "sdpa") and not kind.startswith("flash"):
                return f"attention implementation {name}{where}: expected eager, sdpa or flash attention"
            outside = _module_outside_transformers(name, module)
            if outside is not None:
                return f"attention implementation {name}{where}: expected transformers' own, got one from {outside}"
        if module is not None and vars(module).get("masked_key_indices") is not None:
            return f"masked_key_indices{where}: expected none, got some (kvpress masks these keys)"
    return None


def _module_outside_transformers(name: str, attention: nn.Module) -> str | None:
    """Return the Python module of an attention function or mask function that is not from transformers, or None.

    Args:
        name: under which both functions are registered with transformers.
        attention: a module that uses them.
    """
    function = _unwrap_kvpress(ALL_ATTENTION_FUNCTIONS.get(name))
    if function is None:  # eager attention is not registered: it is a function in the module of the class
        function = getattr(sys.modules.get(type(attention).__module__), "eager_attention_forward", None)
    for found in (function, ALL_MASK_ATTENTION_FUNCTIONS.get(name)):
        defined_in = None if found is None else getattr(found, "__module__", None) or type(found).__module__
        if defined_in is not None and not defined_in.startswith("transformers."):
            return defined_in
    return None


def _unwrap_kvpress(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Return the function inside the wrapper of kvpress, which wraps every registered function when it is imported.

    In a prefill the wrapper only changes keys that ``masked_key_indices`` of a module names.
    """
    while function is not None and getattr(function, "__module__", None) == _KVPRESS:
        inside = inspect.getclosurevars(function).nonlocals.get("func") if inspect.isfunction(function) else None
        if inside is None:
            return function
        function = inside
    return function


def unsupported_reason(model: nn.Module, inner: InnerModules, paged: bool = False) -> tuple[str, str] | None:
    """Return why the native loop would compute something else than the model's modules, or None.

    Args:
        model: of one of the native families.
        inner: its modules.
        paged: as for ``unsupported_attention``.

    Returns:
        (rule, reason), as in ``Decision``.
    """
    config = text_config(model)
    reason = dropped_softcap_reason(config) or unsupported_attention(inner.decoder, paged=paged)
    if reason is not None:
        return "attention", reason
    experts = getattr(config, "_experts_implementation", None) or "eager"
    registered = ALL_EXPERTS_FUNCTIONS.get(experts)
    if registered is not None and not registered.__module__.startswith("transformers."):
        return (
            "experts",
            f"experts implementation {experts}: expected transformers' own, got one from {registered.__module__}",
        )
    patch = inner.find_patch()
    return None if patch is None else ("hooks", f"{patch}: the native loop would not run this code")
