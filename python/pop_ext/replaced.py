"""Code that somebody put in a module's place: hooks, replaced forwards, replaced classes.

The native loop calls no inner module, so none of it would run.
"""

from __future__ import annotations

from functools import lru_cache
from types import MethodType
from typing import Any

from torch import nn

from pop_ext.families import decoder_of, decoder_path


def inner_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules whose forward the native loop stands for, in a fixed order. ``lm_head`` is called as a module."""
    found: list[tuple[str, Any]] = [(decoder_path(model), decoder_of(model))]
    for name, module in found:  # grows as it goes
        for child_name, child in module._modules.items():
            if child is not None:
                found.append((f"{name}.{child_name}", child))
    if found[0][1] is not model.model:  # what is around it runs, but not as it is (vision.py)
        found.append(("model", model.model))
    return found


def is_own_forward(module: nn.Module, forward: Any) -> bool:
    """Whether a ``forward`` put on an instance is its class's own, bound to it or compiled.

    accelerate leaves the first behind where it removes its hooks.
    """
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    return isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is type(module).forward


def foreign_code(modules: list[tuple[str, nn.Module]]) -> str | None:
    """What the native loop would leave out, in words; None: nothing."""
    for registry in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        if getattr(nn.modules.module, registry, None):
            return "global module hooks"
    for name, module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                if not all(_is_idle(hook) for hook in hooks.values()):
                    return f"hooks on {name}"
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            return f"a hook of accelerate ({type(hook).__name__}) on {name}"
        if "forward" in module.__dict__ and not is_own_forward(module, module.__dict__["forward"]):
            return f"a replaced forward on {name}"
        if is_patched(type(module)):
            return f"a replaced forward of {type(module).__name__}"
    return None


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
