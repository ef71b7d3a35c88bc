"""Code that somebody put in a module's place: hooks, replaced forwards, replaced classes.

The native loop calls no inner module, so none of it would run.
"""

from __future__ import annotations

from functools import lru_cache
from types import MethodType
from typing import Any

from torch import nn

from pop_ext.families import decoder_of, decoder_path


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

    def are_those_of(self, model: nn.Module) -> bool:
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
