"""The ``forward`` of an enabled model: a prefill that ``decide`` accepts runs natively, every other call as it did."""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from pop_ext import reference
from pop_ext.hf.architectures import UnsupportedModelError, decoder_of, vision_of
from pop_ext.hf.compat import field_of_cache, output_class
from pop_ext.hf.dispatch import Call, Decision, bind, decide, foreign_reason, is_decode
from pop_ext.hf.kv_cache import check_windows, new_cache
from pop_ext.hf.modules import find_parts
from pop_ext.hf.native_model import NativeModel
from pop_ext.hf.patches import InnerModules, is_own_forward, is_patched, runs_as_written
from pop_ext.hf.restore import cache_restored_on_error, shell_of
from pop_ext.hf.vision import prefill_around
from pop_ext.plans.plan import Plan
from pop_ext.plans.projections import FitMismatch, check_fit

# Frames that a warning about a call is not about.
_NOT_THE_CALLER = ("pop_ext", "torch", "transformers", "contextlib")


class PrefillDeclined(RuntimeError):
    """Under ``strict=True``: a call that the stock forward would have run, and why."""


class _Outdated(Exception):
    """The model is not what a call was begun on."""


class PrefillForward:
    """The ``forward`` of an enabled model.

    It travels with the model through deepcopy and pickle. A shallow copy (``copy.copy``) shares it with the original,
    as it shares all modules, until one of the two is enabled or disabled by itself.
    """

    _STATE = ("model", "plan", "strict", "backend", "replaced", "fp8", "prepack")

    def __init__(
        self, model: nn.Module, plan: Plan, strict: bool, backend: str, replaced: Any, fp8: bool, prepack: bool
    ) -> None:
        values = (model, plan, strict, backend, replaced, fp8, prepack)
        self.__setstate__({**dict(zip(self._STATE, values, strict=True)), "shell": shell_of(model)})

    def __getstate__(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in self._STATE}
        return {**state, "shell": shell_of(self.model)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The model owns this object: a reference back would keep a deleted model's memory until the collector runs.
        self._model = weakref.ref(state["model"])
        self._shell: nn.Module = state["shell"]  # stands for the model when only a shallow copy of it is left
        self.plan: Plan = state["plan"]
        self.strict: bool = state["strict"]
        self.backend: str = state["backend"]
        self.replaced: Any = state["replaced"]  # what stood in forward's place before
        self.fp8: bool = state.get("fp8", False)  # older pickles have none of the two
        self.prepack: bool = state.get("prepack", False)
        self.native: NativeModel | None = None
        self._found_as_before = False  # the last look at the model
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
        output = self._prefill_if_decided(args, kwargs)
        return self.stock(*args, **kwargs) if output is None else output

    @torch.compiler.disable
    def _prefill_if_decided(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any | None:
        """The output of a prefill; None: the call is one for the stock forward."""
        call = self._decide(args, kwargs)
        if call.decision.backend != "stock":
            output = self._start_before_the_look(call) if self._may_start_before_the_look(call) else None
            if output is not None:
                return output
            call = self._look(call)
        if call.decision.backend != "stock":
            return self._prefill(call)
        if call.decision.declined:
            self._decline(call.decision)
        return None

    @torch.compiler.disable
    def classify(self, *args: Any, **kwargs: Any) -> Call:
        """What would run for a call, without running it."""
        call = self._decide(args, kwargs)
        return call if call.decision.backend == "stock" else self._look(call)

    def _decide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        call = decide(self.model, self.plan, self.backend, bind(self.__signature__, args, kwargs))
        if call.decision.native:
            call.decision = replace(call.decision, fp8=self.fp8)
        return call

    def _look(self, call: Call) -> Call:
        """A call decided for a prefill, bound to the model as it is now, or found to be one for the stock forward."""
        model, native, rule, reason = self.model, None, "model", None
        before = None if self.native is None else self.native.handle  # the model itself would be kept
        if self._is_replaced(model):
            reason = "a replaced forward: it was there before enable, and may do more than transformers' own"
        elif self.backend == "native":
            inner = self._inner_modules()
            found = foreign_reason(model, inner)
            try:
                if found is not None:
                    rule, reason = found
                else:
                    native = self.bind_native(inner)
                    cache = call.arguments.get("past_key_values")
                    if cache is not None and call.packed is not None:
                        check_windows(cache, native.spec.window, call.packed.slots)
            except (UnsupportedModelError, FitMismatch) as error:
                reason = str(error)
            except ValueError as error:
                rule, reason = "cache", str(error)
        elif self.plan.projections is not None:
            try:
                check_fit(self.plan, find_parts(model).layers)
            except FitMismatch as error:
                reason = str(error)
        self._found_as_before = native is not None and native.handle == before
        if reason is not None:
            return replace(call, decision=Decision("stock", rule, reason, True, self.plan))
        return replace(call, native=native)

    def _may_start_before_the_look(self, call: Call) -> bool:
        """Whether a device may begin with a prefill while the host looks at the model.

        Not after a look that found something new: who changes a model again and again pays for one start in vain. And
        nothing of the model may run before the look but its own rotary embedding.
        """
        native, model = self.native, self.model
        if native is None or not self._found_as_before or not call.decision.native or native.family.vision is not None:
            return False
        if not works_beside_the_host(native.device) or native.description.model() is not model:
            return False
        rotary = decoder_of(model).rotary_emb
        return native.inner.has(rotary) and runs_as_written(rotary)

    def _start_before_the_look(self, call: Call) -> Any | None:
        """The output of a call that begins at once; None: something of the model has changed, nothing of the call has.

        Loads nothing: what was begun holds what was loaded before.
        """
        native = self.native
        if native is None:  # another thread loads
            return None

        def look() -> None:
            if not self._is_as_it_was(native):
                raise _Outdated

        try:
            return self._prefill(replace(call, native=native), look)
        except _Outdated:
            return None
        except (ValueError, TypeError):  # arguments that fit the model as it is now, say
            if self._is_as_it_was(native):
                raise
        except RuntimeError:
            if not torch.ops.pop.stale_weight(native.handle):  # what the operator looks at itself
                raise
        return None

    def _is_as_it_was(self, native: NativeModel) -> bool:
        """Whether ``_look`` would find that a prefill runs on ``native``."""
        model = self.model
        return (
            self.native is native
            and not self._is_replaced(model)
            and native.inner.are_those_of(model)
            and foreign_reason(model, native.inner) is None
            and native.written_weight() is None
        )

    def _is_replaced(self, model: nn.Module) -> bool:
        return is_patched(type(model)) or not (self.replaced is None or is_own_forward(model, self.replaced))

    def bind_native(self, inner: InnerModules | None = None) -> NativeModel:
        """Loads the model natively, or again when modules or weights have changed since.

        Args:
            inner: its modules for who has just looked; None: they are looked for.

        Raises:
            UnsupportedModelError: the model has no native form (any more).
        """
        with self._lock:
            native = self.native
            if native is not None and native.inner is not inner:  # not looked yet, or another thread has loaded since
                inner = self._inner_modules()
            if native is None or native.inner is not inner or native.written_weight() is not None:
                self.native = native = None  # frees what was folded before as much is folded again
                native = NativeModel(self.model, self.plan, self.fp8, self.prepack)  # type: ignore[arg-type]
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

    def _prefill(self, call: Call, look: Callable[[], None] | None = None) -> Any:
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
        inputs["past_key_values"] = arguments.get("past_key_values")
        rows: dict[str, Any] = {"boundary": list(decision.boundary), "logits_to_keep": decision.logits_to_keep}
        logits: Any
        cache: Cache
        if call.native is not None:
            prefilled = call.native.prefill_fresh(**inputs, **rows, packed=packed, look=look)
            logits, cache = prefilled.logits, prefilled.past_key_values
        else:
            logits, cache = self._run_oracle({**inputs, "attention_mask": call.mask}, rows, packed.columns)
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


def works_beside_the_host(device: torch.device) -> bool:
    """Whether what is launched on a device runs while the host goes on."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


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
