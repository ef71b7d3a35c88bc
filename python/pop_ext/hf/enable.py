"""``enable``: prune the prefill of a Hugging Face model, in place.

``enable`` replaces ``forward`` of the model instance by a ``PrefillForward`` and gives that its backend.
"""

from __future__ import annotations

import reprlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from pop_ext.hf import speculative_launch
from pop_ext.hf.architectures import PORTABLE_ADVICE, UnsupportedModelError
from pop_ext.hf.choice import plan_for
from pop_ext.hf.compat import check_module, text_config, unwrapped
from pop_ext.hf.decision import Decision, Products
from pop_ext.hf.dispatch import Backend
from pop_ext.hf.forward import PrefillForward, find_prefill_forward
from pop_ext.hf.free_weights import check_free_weights, keep_integers_alone
from pop_ext.hf.int8_weights import unpack_weights
from pop_ext.hf.loaded import check_options
from pop_ext.hf.native_backend import NativeBackend
from pop_ext.hf.portable_backend import PortableBackend
from pop_ext.hf.prefill_graphs import check_shapes
from pop_ext.hf.reference_backend import ReferenceBackend
from pop_ext.hf.restore import forward_attribute
from pop_ext.hf.speculative_launch import SpeculativeBackend
from pop_ext.plans.default import PlanArgument
from pop_ext.plans.plan import Plan

Model = TypeVar("Model", bound=nn.Module)
_installed: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
"""Model -> weak reference to the ``PrefillForward`` that ``enable`` put on it last."""
_BACKENDS = ("auto", "native", "portable", "reference")


def _hidden(model: nn.Module) -> PrefillForward | None:
    """Return what ``enable`` installed last, if it lives: code that does not say what it calls may still call it."""
    return _installed.get(model, lambda: None)()


def _switch_off_hidden(model: nn.Module) -> None:
    """Run the stock forward where code that was put around ``model.forward`` still calls what ``enable`` installed."""
    hidden = _hidden(model)
    if hidden is not None and find_prefill_forward(model) is not hidden:
        hidden.switch_off()


def _is_wrapped(model: nn.Module, forward: PrefillForward) -> bool:
    """Return whether other code was put around the ``PrefillForward`` of a model.

    Raises:
        RuntimeError: It is that of another model: ``deepcopy`` has copied the model, but not the code around.
    """
    wrapped = model.__dict__.get(forward_attribute(model)) is not forward
    if wrapped and forward.model is not model:
        raise RuntimeError(
            "model.forward was replaced after pop_ext.enable, by something that calls the forward of another model, of "
            "which this one is a copy: del model.forward, then enable this model by itself"
        )
    return wrapped


def enable(
    model: Model,
    plan: PlanArgument = None,
    strict: bool = False,
    backend: str = "auto",
    fp8: bool = False,
    prepack: bool = False,
    int8: bool = False,
    cuda_graphs: int = 0,
    free_weights: bool = False,
) -> Model:
    """Prune the prefill of ``model``, in place. ``generate`` and ``pipeline`` need no change.

    Args:
        model: a Hugging Face causal language model.
        plan: layers to omit. None: the plan beside the checkpoint if its card holds figures that were measured on
            these weights, else the preset that the paper publishes for this checkpoint, by its hub id, else one that
            omits no layer: the model runs natively at full depth, and one ``NoPlanWarning`` says so. "third": the
            deepest third. "preset": the preset of a model of this shape, published or not. Any other string or path: a
            plan file, or a folder with a ``plan.json``.
        strict: raise ``PrefillDeclined`` where the stock forward would otherwise run with a warning. In continuous
            batching (``generate_batch``) each request gets its text as its error.
        backend: "auto" for native where the model has a native form, and portable elsewhere, also for single calls that
            the native prefill cannot run. "native" and "portable" for one of them alone; "portable" runs the model's
            own modules, in whatever form their weights are. "reference" for the plain PyTorch oracle, which is slow.
        fp8: compute the products of native prefills in 8-bit floats, as in ``pop_ext.load``.
        prepack: copy weights for faster products on a CPU, as in ``pop_ext.load``.
        int8: compute the products of native prefills in 8-bit integers, as in ``pop_ext.load``.
        cuda_graphs: keep as many CUDA graphs of native prefills, as in ``pop_ext.load``.
        free_weights: with ``int8``, keep its matrices in integers alone, as in ``pop_ext.load``. ``disable`` does not
            bring them back.

    Returns:
        The same model. Enabling an enabled model replaces its plan and options, also inside code that was put around
        its forward since.

    Raises:
        UnsupportedModelError: No backend runs the model, or the native one not with ``fp8``, ``int8``, ``prepack``
            or ``cuda_graphs``.
            The text of a model that is refused natively names ``backend="portable"`` if that runs it. A subclass of
            ValueError.
        ValueError, TypeError: A bad argument. The model is unchanged.
        OSError: The file of a plan cannot be read.
        RuntimeError: ``model`` is a copy of an enabled one whose forward was wrapped, or a shallow copy of one with
            accelerate's hooks, and still calls the original.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(_BACKENDS)}, got {reprlib.repr(backend)}")
    check_module(model)
    if not isinstance(strict, bool):
        raise TypeError(f"strict: expected a bool, got {type(strict).__name__}")
    products = check_options(fp8, int8, prepack)
    check_shapes(cuda_graphs)
    check_free_weights(free_weights, products, cuda_graphs)
    for name, value in {"fp8": fp8, "int8": int8, "prepack": prepack}.items():
        if value and backend not in ("auto", "native"):
            raise ValueError(f'{name}: expected False with backend="{backend}", which calls the model, got True')
    if cuda_graphs > 0 and backend not in ("auto", "native"):
        raise ValueError(f'cuda_graphs: expected 0 with backend="{backend}", which calls the model, got {cuda_graphs}')
    inner = unwrapped(model)
    if text_config(inner) is None:
        raise TypeError(f"model: expected a Hugging Face model with a config, got {type(inner).__name__}")
    _check_hooks(inner)
    previous, attribute = find_prefill_forward(inner), forward_attribute(inner)
    wrapped = previous is not None and _is_wrapped(inner, previous)
    unpack_weights(inner)
    chosen = plan_for(inner, plan)
    if free_weights:
        chosen.warn(inner)
        keep_integers_alone(inner, chosen.plan)
    runs = _load_backend(backend, inner, chosen.plan, products, prepack, cuda_graphs)
    if not free_weights:
        chosen.warn(inner)  # before the model changes: a filter may turn the warning into an error
    if previous is not None and wrapped:
        previous.configure(runs, strict)
    else:
        replaced = previous.replaced if previous is not None else inner.__dict__.get(attribute)
        _switch_off_hidden(inner)
        installed = PrefillForward(inner, runs, strict, replaced)
        setattr(inner, attribute, installed)
        _installed[inner] = weakref.ref(installed)
    return model


def _check_hooks(model: nn.Module) -> None:
    """Raise RuntimeError for a shallow copy of a model with accelerate's hooks: its forward runs the original."""
    hooked = model.__dict__.get("forward") if hasattr(model, "_hf_hook") else None
    if isinstance(hooked, partial) and hooked.args and hooked.args[0] is not model:
        raise RuntimeError("model: expected the model that accelerate has hooked, got a copy of it: copy.deepcopy it")


def _load_backend(
    name: str, model: nn.Module, plan: Plan, products: Products | None, prepack: bool, cuda_graphs: int
) -> Backend:
    """Make the backend of this name for a model.

    Raises:
        ValueError, TypeError: As for ``enable``.
    """
    if name in ("portable", "reference"):
        chosen: Backend = PortableBackend(plan) if name == "portable" else ReferenceBackend(plan)
        chosen.load(model)
        return chosen
    make = SpeculativeBackend if speculative_launch.ENABLED else NativeBackend
    native = make(plan, products, prepack, cuda_graphs)
    portable = PortableBackend(plan)
    try:
        native.load(model).check_graphs_supported()
    except UnsupportedModelError as error:
        if name == "native" or products is not None or prepack or cuda_graphs > 0:
            raise
        portable.not_native = str(error).removesuffix(f". {PORTABLE_ADVICE}")
        try:
            portable.load(model)
        except ValueError as other:
            raise UnsupportedModelError(f"{portable.not_native}. The portable backend: {other}") from other
        return portable
    if name == "auto":
        native.fallback = portable
    return native


def disable(model: Model) -> Model:
    """Give ``model`` its own forward back. A model that is not enabled stays as it is.

    Code that was put around its forward since, such as ``torch.compile(model.forward)``, stays and calls the model's
    own forward.

    Raises:
        RuntimeError: As for ``enable``.
    """
    check_module(model)
    inner = unwrapped(model)
    forward = find_prefill_forward(inner)
    if forward is None:
        _switch_off_hidden(inner)
        return model
    if _is_wrapped(inner, forward):
        forward.switch_off()
    else:
        _restore(inner, forward.replaced)
    return model


@contextmanager
def enabled(
    model: Model,
    plan: PlanArgument = None,
    strict: bool = False,
    backend: str = "auto",
    fp8: bool = False,
    prepack: bool = False,
    int8: bool = False,
    cuda_graphs: int = 0,
) -> Iterator[Model]:
    """Enable ``model`` inside a ``with`` block. Afterwards restore its former state, enabled or not.

    Arguments and errors are those of ``enable``, without ``free_weights``, which nothing could restore.
    """
    check_module(model)
    inner = unwrapped(model)
    forward = find_prefill_forward(inner) or _hidden(inner)
    before = inner.__dict__.get(forward_attribute(inner))
    state = {} if forward is None or forward is before else dict(vars(forward))
    enable(model, plan, strict, backend, fp8, prepack, int8, cuda_graphs)
    try:
        yield model
    finally:
        _restore(inner, before)
        if forward is not None and state:
            vars(forward).update(state)  # other code was put around it, so it was configured in place
            _installed[inner] = weakref.ref(forward)


def _restore(model: nn.Module, forward: Any) -> None:
    """Put ``forward`` back on the instance; None: the class's own."""
    attribute = forward_attribute(model)
    model.__dict__.pop(attribute, None)
    # accelerate was attached after enable, and its hooks call what is in this attribute: leave the class's own there.
    if forward is None and attribute != "forward":
        forward = MethodType(type(model).forward, model)
    if forward is not None:
        setattr(model, attribute, forward)


def explain(model: nn.Module, *args: Any, **call: Any) -> Decision:
    """Return what ``model(*args, **call)`` would run here and now, and why, without running it.

    ``generate`` calls the model under ``torch.no_grad`` with ``logits_to_keep=1``. To ask about ``generate``, do the
    same. Code that was put around ``model.forward`` after ``enable`` runs up to the call inside it.

    Returns:
        A ``Decision``; ``str()`` of it is a sentence.

    Raises:
        ValueError: The model is not enabled.
        TypeError: ``forward`` does not take these arguments.
    """
    forward, inner = require_enabled(model), unwrapped(model)
    return forward.explain_inside(inner.__dict__[forward_attribute(inner)], args, call)


def last_call(model: nn.Module) -> Decision | None:
    """Return what ran the latest call that was or might have been a prefill, and why. Decode steps do not count.

    Returns:
        A ``Decision``, or None before the first such call.

    Raises:
        ValueError: The model is not enabled.
    """
    return require_enabled(model).last_call


def stats(model: nn.Module) -> dict[str, int]:
    """Return how often each rule decided a call since ``enable``, where ``last_call`` shows the latest alone.

    ``"prefill"`` counts the prefills that the backend ran. Decode steps do not count.

    Returns:
        Rule -> number of calls, by falling number. docs/declined.md explains the rules.

    Raises:
        ValueError: The model is not enabled.
    """
    counts = require_enabled(model).counts.copy()
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def require_enabled(model: nn.Module) -> PrefillForward:
    """Return the ``PrefillForward`` of an enabled model; raise ValueError if the model is not enabled."""
    check_module(model)
    forward = find_prefill_forward(unwrapped(model))
    if forward is None or not forward.enabled:
        raise ValueError("model: expected an enabled model (pop_ext.enable), got one that is not")
    return forward
