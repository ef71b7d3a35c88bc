"""``enable``: the same model, its prefill pruned.

``enable`` replaces ``forward`` on the instance by a ``PrefillForward``, which runs a prefill that
``decide`` accepts natively and hands every other call to the stock forward.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.cache_utils import Cache

from pop_ext import reference
from pop_ext.cache_names import field_of_cache, output_class
from pop_ext.decision import Call, Decision, bind, decide, is_decode, text_config
from pop_ext.families import UnsupportedModelError, vision_of
from pop_ext.kv_cache import check_windows, new_cache
from pop_ext.native import NativeModel, check_fp8, check_plan
from pop_ext.plan import Plan
from pop_ext.presets import default_plan
from pop_ext.projections import FitMismatch, check_fit
from pop_ext.reference_checks import find_parts
from pop_ext.replaced import InnerModules, is_own_forward, is_patched
from pop_ext.restore import cache_restored_on_error, forward_place
from pop_ext.shells import shell_of
from pop_ext.vision import prefill_around

Model = TypeVar("Model", bound=nn.Module)
_BACKENDS = ("native", "reference")
# Frames that a warning about a call is not about.
_NOT_THE_CALLER = ("pop_ext", "torch", "transformers", "contextlib")


class PrefillDeclined(RuntimeError):
    """Under ``strict=True``: a call that the stock forward would have run, and why."""


class PrefillForward:
    """The ``forward`` of an enabled model.

    It travels with the model through deepcopy and pickle. A shallow copy (``copy.copy``) shares it with the original,
    as it shares all modules, until one of the two is enabled or disabled by itself.
    """

    def __init__(self, model: nn.Module, plan: Plan, strict: bool, backend: str, replaced: Any, fp8: bool) -> None:
        state = {"model": model, "plan": plan, "strict": strict, "backend": backend, "replaced": replaced, "fp8": fp8}
        self.__setstate__({**state, "shell": shell_of(model)})

    def __getstate__(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in ("model", "plan", "strict", "backend", "replaced", "fp8")}
        return {**state, "shell": shell_of(self.model)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The model owns this object: a reference back would keep a deleted model's memory until the collector runs.
        self._model = weakref.ref(state["model"])
        self._shell: nn.Module = state["shell"]  # stands for the model when only a shallow copy of it is left
        self.plan: Plan = state["plan"]
        self.strict: bool = state["strict"]
        self.backend: str = state["backend"]
        self.replaced: Any = state["replaced"]  # what stood in forward's place before
        self.fp8: bool = state.get("fp8", False)  # older pickles have none
        self.native: NativeModel | None = None
        self.last_call: Decision | None = None
        self._warned: set[str] = set()
        self._inside = threading.local()
        self._lock = threading.Lock()

    @property
    def model(self) -> nn.Module:
        model = self._model()
        return self._shell if model is None else model

    @property
    def __signature__(self) -> inspect.Signature:
        # Generation reads it to know which arguments the model takes.
        return _signature_of(type(self.model).forward) if self.replaced is None else inspect.signature(self.replaced)

    # Compilers trace a decode step, run the rest of this frame as it is, and compile the stock forward below it.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_decode(args, kwargs):
            return self.stock(*args, **kwargs)
        return self._dispatch(*args, **kwargs)

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that ``enable`` found."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        model = self.model
        return type(model).forward(model, *args, **kwargs)

    @torch.compiler.disable(recursive=False)
    def _dispatch(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self._inside, "active", False):
            return self.stock(*args, **kwargs)
        call = self.classify(*args, **kwargs)
        decision = call.decision
        if decision.backend == "stock":
            if decision.declined:
                self._decline(decision)
            return self.stock(*args, **kwargs)
        return self._prefill(call)

    @torch.compiler.disable
    def classify(self, *args: Any, **kwargs: Any) -> Call:
        """What would run for a call, without running it."""
        model = self.model
        inner = self._inner_modules() if self.backend == "native" else None
        call = decide(model, inner, self.plan, bind(self.__signature__, args, kwargs))
        if call.decision.backend == "stock":
            return call
        rule, reason = "model", None
        if is_patched(type(model)) or not (self.replaced is None or is_own_forward(model, self.replaced)):
            reason = "a replaced forward: it was there before enable, and may do more than transformers' own"
        elif self.backend == "native":
            try:
                call.native = self.bind_native(inner)
                call.decision = replace(call.decision, fp8=self.fp8)
                cache = call.arguments.get("past_key_values")
                if cache is not None and call.packed is not None:
                    check_windows(cache, call.native.spec.window, call.packed.slots)
            except (UnsupportedModelError, FitMismatch) as error:
                reason = str(error)
            except ValueError as error:
                rule, reason = "cache", str(error)
        elif self.plan.projections is not None:
            try:
                check_fit(self.plan, find_parts(model).layers)
            except FitMismatch as error:
                reason = str(error)
        if reason is not None:
            call.decision = Decision("stock", rule, reason, True, self.plan)
        return call

    def bind_native(self, inner: InnerModules | None = None) -> NativeModel:
        """Loads the model natively, or again when modules or weights have changed since.

        Args:
            inner: its modules for who has just looked; None: they are looked for.

        Raises:
            UnsupportedModelError: the model has no native form (any more).
        """
        with self._lock:
            native = self.native
            if native is not None:
                inner = self._inner_modules() if inner is None else inner
            if native is None or native.inner is not inner or native.written_weight() is not None:
                self.native = None  # frees what was folded before as much is folded again
                native = NativeModel(self.model, self.plan, self.fp8)  # type: ignore[arg-type]
                native.model = weakref.proxy(self.model)  # type: ignore[assignment]
                self.native = native
            return native

    def _inner_modules(self) -> InnerModules:
        native, model = self.native, self.model
        if native is not None and native.description.model() is model and native.inner.are_those_of(model):
            return native.inner
        return InnerModules(model)

    @contextmanager
    def stock_inside(self) -> Iterator[None]:
        """Within it this thread's calls of the model run the stock forward: the oracle calls the model."""
        before = getattr(self._inside, "active", False)
        self._inside.active = True
        try:
            yield
        finally:
            self._inside.active = before

    def _decline(self, decision: Decision) -> None:
        self.last_call = decision
        if self.strict:
            raise PrefillDeclined(f"pop_ext: the stock forward would run: {decision.reason} (strict=True)")
        if decision.rule not in self._warned:
            self._warned.add(decision.rule)
            warnings.warn(f"pop_ext: the stock forward runs: {decision.reason}", stacklevel=_caller_level())

    @torch.compiler.disable
    def _prefill(self, call: Call) -> Any:
        arguments, decision = call.arguments, call.decision
        if call.native is not None and call.native.family.vision is not None:
            output = prefill_around(self.model, call)
            self.last_call = decision
            return output
        inputs: dict[str, Any] = {name: arguments.get(name) for name in ("input_ids", "inputs_embeds", "position_ids")}
        packed, around = call.packed, vision_of(self.model)
        assert packed is not None  # decided for a prefill
        inputs |= {name: arguments[name] for name in around.arguments & arguments.keys()} if around else {}
        if inputs["position_ids"] is None and around is None:
            # As the stock forward counts them: by column, masked or not.
            tokens = inputs["input_ids"] if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]
            inputs["position_ids"] = torch.arange(packed.past_slots, packed.slots, device=tokens.device)[None]
        inputs["attention_mask"] = None if packed.is_dense else call.mask  # one on a device is waited for
        inputs["past_key_values"] = arguments.get("past_key_values")
        rows: dict[str, Any] = {"boundary": list(decision.boundary), "logits_to_keep": decision.logits_to_keep}
        logits: Any
        cache: Cache
        if call.native is not None:
            prefilled = call.native.prefill_fresh(**inputs, **rows)  # classify has just bound it
            logits, cache = prefilled.logits, prefilled.past_key_values
        else:
            logits, cache = self._run_oracle(inputs, rows, packed.columns)
        self.last_call = decision
        made = output_class(type(self.model).forward)
        output = made(logits=logits, **field_of_cache(made, cache))
        return_dict = arguments.get("return_dict")
        if return_dict is None:
            return_dict = getattr(self.model.config, "return_dict", True)
        return output if return_dict else output.to_tuple()

    def _run_oracle(self, inputs: dict[str, Any], rows: dict[str, Any], columns: int) -> tuple[torch.Tensor, Cache]:
        model = self.model
        with self.stock_inside():
            logits, filled = reference.prefill(model, plan=self.plan, **inputs, **rows)
        # The oracle reads the caller's cache and returns another: the new columns go where the call said.
        given = inputs["past_key_values"]
        cache = new_cache(model.config) if given is None else given
        layers: list[Any] = filled.layers
        with cache_restored_on_error(cache):
            for index, layer in enumerate(layers):
                cache.update(layer.keys[:, :, -columns:], layer.values[:, :, -columns:], index)
        return logits, cache


@lru_cache(maxsize=256)
def _signature_of(method: Callable[..., Any]) -> inspect.Signature:
    """Of a method once it is bound."""
    return inspect.signature(method.__get__(object()))


def _caller_level() -> int:
    """``stacklevel`` that puts a warning of the calling function on the line that called the model."""
    frame = inspect.currentframe()
    level = 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_CALLER:
        frame = frame.f_back
        level += 1
    return level


def _inner(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of ``torch.compile`` and PEFT, which call its ``forward``."""
    inner: Any = getattr(model, "_orig_mod", model)
    if type(inner).__module__.startswith("peft.") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return inner


def _forward_of(model: nn.Module) -> PrefillForward | None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Hugging Face model, got {type(model).__name__}")
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
    model: Model, plan: Plan | None = None, strict: bool = False, backend: str = "native", fp8: bool = False
) -> Model:
    """Prunes the prefill of ``model``, in place; ``generate`` and ``pipeline`` need no change.

    Args:
        model: a Hugging Face causal language model.
        plan: what to omit. None: the preset whose config matches, else the deepest third, boundary 1.
        strict: raise ``PrefillDeclined`` where otherwise the stock forward would run with a warning.
        backend: "native", or "reference" for the plain PyTorch oracle, slow but for any decoder.
        fp8: products of native prefills in 8-bit floats, as in ``pop_ext.load`` (docs/fp8.md).

    Returns:
        The same model. Enabling again replaces plan, strict, backend and fp8.

    Raises:
        UnsupportedModelError (a ValueError): no native form; ``backend="reference"`` works. Or none with ``fp8``.
        ValueError, TypeError: a bad plan, strict, backend, fp8 or model. The model is as before.
        RuntimeError: an enabled model whose forward something else has wrapped since.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(_BACKENDS)}, got {backend!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Hugging Face model, got {type(model).__name__}")
    if not isinstance(strict, bool):
        raise TypeError(f"strict: expected a bool, got {type(strict).__name__}")
    check_fp8(fp8)
    if fp8 and backend != "native":
        raise ValueError(f'fp8: expected False with backend="{backend}", which computes in full, got True')
    inner = _inner(model)
    config = text_config(inner)
    if config is None:
        raise TypeError(f"model: expected a Hugging Face model with a config, got {type(inner).__name__}")
    previous = _forward_of(model)
    place = forward_place(inner)
    replaced = previous.replaced if previous is not None else inner.__dict__.get(place)
    forward = PrefillForward(inner, default_plan(config) if plan is None else plan, strict, backend, replaced, fp8)
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
    model: Model, plan: Plan | None = None, strict: bool = False, backend: str = "native", fp8: bool = False
) -> Iterator[Model]:
    """``enable`` for the length of a ``with`` block; afterwards the model is as it was before, enabled or not."""
    inner = _inner(model)
    before = inner.__dict__.get(forward_place(inner))
    enable(model, plan, strict, backend, fp8)
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
