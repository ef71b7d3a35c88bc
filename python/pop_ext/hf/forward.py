"""``PrefillForward``: the ``forward`` of an enabled model.

Prefills that ``dispatch`` accepts run on the backend that ``enable`` injected; the stock forward runs every other call.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from types import CodeType, MethodType
from typing import Any

import torch
from torch import nn

from pop_ext.hf.compat import NEW_CACHE_NAME, OLD_CACHE_NAME, cache_field, field_names, output_class
from pop_ext.hf.decision import Decision, Decline
from pop_ext.hf.dispatch import Backend, bind_arguments, dispatch, dispatch_step, explain_call
from pop_ext.hf.packed_step import is_packed
from pop_ext.hf.restore import forward_attribute, shallow_clone
from pop_ext.hf.rules import is_traced
from pop_ext.plans.plan import Plan
from pop_ext.utils.callers import caller_level
from pop_ext.utils.forks import check_threads

# Fields of a vision wrapper's output that are not copied to the model's output.
_OWN_FIELDS = {"loss", "logits", "hidden_states", "attentions", OLD_CACHE_NAME, NEW_CACHE_NAME}


class PrefillDeclined(RuntimeError):
    """Raised under ``strict=True`` where the stock forward would have run a call. The text says why."""


class _Explained(BaseException):
    """Carry a ``Decision`` out of the code that was put around a ``PrefillForward``, which may catch exceptions."""

    def __init__(self, decision: Decision) -> None:
        super().__init__()
        self.decision = decision


class PrefillForward:
    """Answer calls of an enabled model: run prefills on the backend, and all other calls by the stock forward.

    Deepcopy and pickle of the model copy this object, too. A shallow copy (``copy.copy``) shares it with the original,
    as it shares all modules, until one of the two is enabled or disabled by itself.

    Attributes:
        backend: where prefills run.
        strict: whether a declined call raises ``PrefillDeclined``.
        replaced: the forward that ``enable`` found on the instance, or None.
        enabled: False after a ``disable`` that could not take this object away, since other code calls it. Every call
            runs the stock forward then.
        last_call: decision of the latest call that was or might have been a prefill.
        counts: number of calls by the rule that decided, without decode steps.
    """

    def __init__(self, model: nn.Module, backend: Backend, strict: bool, replaced: Any) -> None:
        self.__setstate__(
            {
                "model": model,
                "backend": backend,
                "strict": strict,
                "replaced": replaced,
                "clone": shallow_clone(model),
                "enabled": True,
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "backend": self.backend,
            "strict": self.strict,
            "replaced": self.replaced,
            "clone": shallow_clone(self.model),
            "enabled": self.enabled,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Weak: the model owns this object, and a cycle would keep a deleted model until the garbage collector runs.
        self._model = weakref.ref(state["model"])
        self._clone: nn.Module = state["clone"]  # used when the model is gone and a shallow copy of it is left
        self.replaced: Any = state["replaced"]
        self._counting = threading.Lock()
        self._inside = threading.local()
        self.configure(state["backend"], state["strict"], state["enabled"])

    def configure(self, backend: Backend, strict: bool, enabled: bool = True) -> None:
        """Set what ``enable`` chooses, in place, and begin anew to count and to warn."""
        self.backend, self.strict, self.enabled = backend, strict, enabled
        self.last_call: Decision | None = None
        self.counts: dict[str, int] = {}
        self._warned: set[str] = set()

    def switch_off(self) -> None:
        """Run the stock forward from now on, and free what the backend has loaded."""
        self.configure(copy.copy(self.backend), self.strict, enabled=False)

    @torch.compiler.disable
    def of(self, model: nn.Module) -> PrefillForward:
        """Return the object to answer calls that bring their model: after ``MethodType(forward, model)``.

        accelerate's ``unwrap_model`` makes such a method, and this replaces it by the object. ``deepcopy`` copies the
        model of a method, but not its function, so a copied model gets an object of its own.
        """
        forward, attribute = self, forward_attribute(model)
        if model is not self.model:
            forward = PrefillForward.__new__(PrefillForward)
            forward.__setstate__(
                {
                    **self.__getstate__(),
                    "model": model,
                    "backend": copy.copy(self.backend),
                    "replaced": copy.deepcopy(self.replaced, {id(self.model): model}),
                    "clone": shallow_clone(model),
                }
            )
        method = model.__dict__.get(attribute)
        if isinstance(method, MethodType) and method.__func__ is self:
            model.__dict__[attribute] = forward
        return forward

    @property
    def model(self) -> nn.Module:
        """The enabled model, or a shallow copy of it if the model itself is gone."""
        model = self._model()
        return self._clone if model is None else model

    @property
    def plan(self) -> Plan:
        """Layers that prefills omit."""
        return self.backend.plan

    @property
    def __signature__(self) -> inspect.Signature:
        # generate reads it to find out which arguments the model takes.
        return _signature_of(type(self.model).forward) if self.replaced is None else inspect.signature(self.replaced)

    @property
    def __name__(self) -> str:
        # pickle would write a method by its name, and read the class's own forward.
        raise AttributeError(
            "model.forward: expected what pop_ext.enable put there, got a method of it (types.MethodType), which no "
            "pickle keeps: call pop_ext.last_call(model) first, which puts it back"
        )

    @property
    def __code__(self) -> CodeType:
        # torch.export names its graph after it.
        return type(self).__call__.__code__

    # torch.compile traces decode steps here. The other calls leave the graph in _prefill_or_stock, below which only the
    # stock forward is compiled.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], nn.Module):
            return self.of(args[0])(*args[1:], **kwargs)
        if not self.enabled or is_traced() or _is_decode(args, kwargs):
            return self.stock(*args, **kwargs)
        return self._prefill_or_stock(*args, **kwargs)

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward that ``enable`` found."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        model = self.model
        return type(model).forward(model, *args, **kwargs)

    @torch.compiler.disable(recursive=False)
    def _prefill_or_stock(self, *args: Any, **kwargs: Any) -> Any:
        """Run a call that may be a prefill: on the backend if ``dispatch`` accepts it, else by the stock forward."""
        if getattr(self._inside, "active", False):
            return self.stock(*args, **kwargs)
        if getattr(self._inside, "explains", False):
            raise _Explained(self.explain(*args, **kwargs))
        output = self._prefill(args, kwargs)
        return self.stock(*args, **kwargs) if output is None else output

    @torch.compiler.disable
    def _prefill(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any | None:
        """Return the output of a prefill; None if the stock forward must run the call."""
        model, backend = self.model, self.backend
        arguments = bind_arguments(self.__signature__, args, kwargs)
        try:
            if is_packed(arguments):
                decision, run = dispatch_step(model, backend, arguments, self.replaced)
                result = run()
            else:
                decision, runner, request = dispatch(model, backend, arguments, self.replaced)
                with self.stock_inside() if runner.calls_model else nullcontext():
                    result = runner.run(request)
        except Decline as decline:
            decision = decline.decision(backend.plan)
            self._count(decision)
        else:
            self.last_call = decision
            self._count(decision)
            return _model_output(model, result, arguments.get("return_dict"))
        if decision.declined:
            self._decline(decision)
        return None

    @torch.compiler.disable
    def explain(self, *args: Any, **kwargs: Any) -> Decision:
        """Return what would run a call, without running it."""
        arguments = bind_arguments(self.__signature__, args, kwargs)
        decision = explain_call(self.model, self.backend, arguments, self.replaced)
        if decision.backend != "stock" and next(self.model.parameters()).device.type == "cpu":
            check_threads()  # as the call itself will
        return decision

    def explain_inside(self, outer: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Decision:
        """Like ``explain``, for a call that reaches this object through ``outer``.

        ``outer`` may change the call, or enter autocast as accelerate does, so it runs up to the call inside it.
        """
        outer = _uncompiled(outer)
        if outer is not self and not _is_decode(args, kwargs):
            self._inside.explains = True
            try:
                outer(*args, **kwargs)
            except _Explained as explained:
                return explained.decision
            finally:
                self._inside.explains = False
        return self.explain(*args, **kwargs)

    @contextmanager
    def stock_inside(self) -> Iterator[None]:
        """Send calls of the model to the stock forward inside the block, in this thread only."""
        before = getattr(self._inside, "active", False)
        self._inside.active = True
        try:
            yield
        finally:
            self._inside.active = before

    def _count(self, decision: Decision) -> None:
        with self._counting:
            self.counts[decision.rule] = self.counts.get(decision.rule, 0) + 1

    def _decline(self, decision: Decision) -> None:
        """Report a call that the stock forward runs: raise under ``strict``, else warn once for each rule."""
        self.last_call = decision
        if self.strict:
            raise PrefillDeclined(f"pop_ext: the stock forward would run: {decision.reason} (strict=True)")
        if decision.rule not in self._warned:
            warnings.warn(f"pop_ext: the stock forward runs: {decision.reason}", stacklevel=caller_level())
            self._warned.add(decision.rule)  # not before: a warning that is an error is raised by the next call, too


def find_prefill_forward(model: nn.Module) -> PrefillForward | None:
    """Return the ``PrefillForward`` of a model, also of one that is disabled but still called; None without one.

    Compilers, accelerate and users put other code around ``model.forward``. It is followed as far as it says what it
    calls, as ``functools.wraps`` does.
    """
    forward = model.__dict__.get(forward_attribute(model))
    for _ in range(16):
        if isinstance(forward, PrefillForward):
            return forward
        if isinstance(forward, MethodType) and isinstance(forward.__func__, PrefillForward):
            return forward.__func__.of(model)
        forward = _inside_of(forward)
    return None


def _inside_of(forward: Any) -> Any:
    """Return what a forward says it calls: that of a method, compiled code, a partial, a wrapper. None: nothing."""
    if isinstance(forward, MethodType):
        return forward.__func__
    if isinstance(forward, partial):
        return forward.func
    return getattr(forward, "_torchdynamo_orig_callable", getattr(forward, "__wrapped__", None))


def _uncompiled(forward: Any) -> Any:
    """Return the forward inside ``torch.compile(forward)``; any other is returned as it is."""
    return getattr(forward, "_torchdynamo_orig_callable", forward)


def _is_decode(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call brings one new token per sequence. Reads only shapes, so that compilers can trace it."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if not isinstance(tokens, torch.Tensor) or tokens.is_nested:
        return False
    return tokens.ndim >= 2 and tokens.shape[1] == 1


def _model_output(model: nn.Module, result: Any, return_dict: bool | None) -> Any:
    """Convert a ``PrefillOutput`` to what the model's own ``forward`` returns.

    Args:
        model: the enabled model.
        result: a ``PrefillOutput``.
        return_dict: of the call. None: as the config says. False: return a tuple.
    """
    output_type = output_class(type(model).forward)
    fields = {"logits": result.logits, **cache_field(output_type, result.past_key_values)}
    if result.wrapper_output is not None:
        taken_over = (field_names(output_type) & field_names(type(result.wrapper_output))) - _OWN_FIELDS
        fields |= {name: getattr(result.wrapper_output, name) for name in taken_over}
    output = output_type(**fields)
    if return_dict is None:
        return_dict = getattr(model.config, "return_dict", True)
    return output if return_dict else output.to_tuple()


@lru_cache(maxsize=256)
def _signature_of(method: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a method without ``self``."""
    return inspect.signature(method.__get__(object()))
