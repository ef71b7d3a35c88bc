"""``enable``: the same model, its prefill pruned.

``enable`` replaces ``forward`` on the instance by a ``PrefillForward``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from pop_ext.hf.compat import check_module, uncompiled
from pop_ext.hf.dispatch import Decision, text_config
from pop_ext.hf.forward import PrefillForward
from pop_ext.hf.loaded import check_options
from pop_ext.hf.modules import find_parts
from pop_ext.hf.native_model import check_plan
from pop_ext.hf.restore import forward_place
from pop_ext.plans.plan import Plan
from pop_ext.plans.presets import default_plan
from pop_ext.plans.projections import check_fit

Model = TypeVar("Model", bound=nn.Module)
_BACKENDS = ("native", "reference")


def _inner(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of ``torch.compile`` and PEFT, which call its ``forward``."""
    inner: Any = uncompiled(model)
    if type(inner).__module__.startswith("peft.") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return inner


def _forward_of(model: nn.Module) -> PrefillForward | None:
    check_module(model)
    inner = _inner(model)
    forward = inner.__dict__.get(forward_place(inner))
    if isinstance(forward, PrefillForward):
        return forward
    below = forward
    for _ in range(16):
        below = getattr(below, "_torchdynamo_orig_callable", getattr(below, "__wrapped__", None))
        if isinstance(below, PrefillForward):
            raise RuntimeError(
                "model.forward was replaced after pop_ext.enable, by something that calls what enable put there "
                f"({type(forward).__name__}): put back what was there first, and enable last"
            )
    return None


def enable(
    model: Model,
    plan: Plan | None = None,
    strict: bool = False,
    backend: str = "native",
    fp8: bool = False,
    prepack: bool = False,
) -> Model:
    """Prunes the prefill of ``model``, in place; ``generate`` and ``pipeline`` need no change.

    Args:
        model: a Hugging Face causal language model.
        plan: what to omit. None: the preset whose config matches, else the deepest third, boundary 1.
        strict: raise ``PrefillDeclined`` where otherwise the stock forward would run with a warning.
        backend: "native", or "reference" for the plain PyTorch oracle, slow but for any decoder.
        fp8: products of native prefills in 8-bit floats, as in ``pop_ext.load`` (docs/fp8.md).
        prepack: a second copy of weights, for faster products on a CPU, as in ``pop_ext.load`` (docs/cpu.md).

    Returns:
        The same model. Enabling again replaces plan and options.

    Raises:
        UnsupportedModelError (a ValueError): no native form; ``backend="reference"`` works. Or none with ``fp8`` or
            ``prepack``.
        ValueError, TypeError: a bad plan, strict, backend, fp8, prepack or model. The model is as before.
        RuntimeError: an enabled model whose forward something else has wrapped since.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(_BACKENDS)}, got {backend!r}")
    check_module(model)
    if not isinstance(strict, bool):
        raise TypeError(f"strict: expected a bool, got {type(strict).__name__}")
    check_options(fp8, prepack)
    for name, value in {"fp8": fp8, "prepack": prepack}.items():
        if value and backend != "native":
            raise ValueError(f'{name}: expected False with backend="{backend}", which calls the model, got True')
    inner = _inner(model)
    config = text_config(inner)
    if config is None:
        raise TypeError(f"model: expected a Hugging Face model with a config, got {type(inner).__name__}")
    previous = _forward_of(model)
    place = forward_place(inner)
    replaced = previous.replaced if previous is not None else inner.__dict__.get(place)
    chosen = default_plan(config) if plan is None else plan
    forward = PrefillForward(inner, chosen, strict, backend, replaced, fp8, prepack)
    if backend == "native":
        forward.bind_native()
    else:
        layers = find_parts(inner).layers
        check_plan(forward.plan, config.num_hidden_layers, config)
        check_fit(forward.plan, layers)
    setattr(inner, place, forward)
    return model


def disable(model: Model) -> Model:
    """Gives ``model`` its own forward back. A model that is not enabled stays as it is."""
    forward = _forward_of(model)
    if forward is not None:
        _restore(_inner(model), forward.replaced)
    return model


@contextmanager
def enabled(
    model: Model,
    plan: Plan | None = None,
    strict: bool = False,
    backend: str = "native",
    fp8: bool = False,
    prepack: bool = False,
) -> Iterator[Model]:
    """``enable`` for the length of a ``with`` block; afterwards the model is as it was before, enabled or not."""
    check_module(model)
    inner = _inner(model)
    before = inner.__dict__.get(forward_place(inner))
    enable(model, plan, strict, backend, fp8, prepack)
    try:
        yield model
    finally:
        _restore(inner, before)


def _restore(model: nn.Module, forward: Any) -> None:
    place = forward_place(model)
    model.__dict__.pop(place, None)
    if forward is None and place != "forward":  # hooks came after enable, and call it
        forward = MethodType(type(model).forward, model)
    if forward is not None:
        setattr(model, place, forward)


def explain(model: nn.Module, *args: Any, **call: Any) -> Decision:
    """What ``model(*args, **call)`` would run here and now, and why, without running it. str() of it is a sentence.

    ``generate`` calls the model under ``torch.no_grad`` with ``logits_to_keep=1``: to ask about
    it, do the same.

    Raises:
        ValueError: the model is not enabled.
        TypeError: arguments that ``forward`` does not take.
    """
    return require_enabled(model).classify(*args, **call).decision


def last_call(model: nn.Module) -> Decision | None:
    """What ran, and why, for the latest call that was a prefill or might have been one; decode steps do not count.

    Raises:
        ValueError: the model is not enabled.
    """
    return require_enabled(model).last_call


def require_enabled(model: nn.Module) -> PrefillForward:
    """The forward that ``enable`` put there. Raises ValueError if there is none."""
    forward = _forward_of(model)
    if forward is None:
        raise ValueError("model: expected an enabled model (pop_ext.enable), got one that is not")
    return forward
