"""``enable``: the same model, its prefill pruned.

``enable`` replaces ``forward`` on the instance by a ``PrefillForward``, which runs a prefill that
``decide`` accepts natively and hands every other call to the stock forward.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from pop_ext import reference
from pop_ext.decision import Call, Decision, bind, decide, has_sliding_window
from pop_ext.families import UnsupportedModelError
from pop_ext.kv_cache import past_slots
from pop_ext.native import NativeModel, check_plan
from pop_ext.plan import Plan
from pop_ext.presets import default_plan

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutputWithPast

Model = TypeVar("Model", bound=nn.Module)
_BACKENDS = ("native", "reference")


class PrefillDeclined(RuntimeError):
    """Under ``strict=True``: a call that the stock forward would have run, and why."""


class PrefillForward:
    """The ``forward`` of an enabled model. Travels with the model through deepcopy and pickle."""

    def __init__(self, model: nn.Module, plan: Plan, strict: bool, backend: str) -> None:
        self.model = model
        self.plan = plan
        self.strict = strict
        self.backend = backend
        self.replaced = model.__dict__.get("forward")
        self._reset()

    def _reset(self) -> None:
        self.native: NativeModel | None = None
        self.last_call: Decision | None = None
        self._warned: set[str] = set()
        self._inside = threading.local()

    @property
    def __signature__(self) -> inspect.Signature:
        # Generation reads it to know which arguments the model takes.
        return inspect.signature(self.stock)

    @property
    def stock(self) -> Any:
        """The forward that ``enable`` found."""
        return self.replaced if self.replaced is not None else type(self.model).forward.__get__(self.model)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("model", "plan", "strict", "backend", "replaced")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def bind_native(self) -> None:
        """Loads the model natively, or refolds what has changed since.

        Raises:
            UnsupportedModelError: the model has no native form (any more).
        """
        if self.native is None:
            self.native = NativeModel(self.model, self.plan)
        elif self.native.stale_weight() is not None:
            self.native.refresh()

    def classify(self, *args: Any, **kwargs: Any) -> Call:
        """What would run for a call, without running it."""
        arguments = bind(self.__signature__, args, kwargs)
        description = self.native.description if self.native is not None else None
        window = has_sliding_window(description, self.model.config)
        call = decide(self.model, self.plan, self.backend, arguments, window)
        if call.decision.backend == "native":
            if self.replaced is not None:
                call.decision = Decision("stock", "forward was replaced before enable", True, self.plan)
                return call
            try:
                self.bind_native()
            except UnsupportedModelError as error:
                call.decision = Decision("stock", str(error), True, self.plan)
        return call

    # Compilers run this frame as it is, and compile the stock forward below it.
    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self._inside, "active", False):
            return self.stock(*args, **kwargs)
        call = self.classify(*args, **kwargs)
        decision = call.decision
        if decision.backend != "stock" or decision.declined:
            self.last_call = decision
        if decision.backend == "stock":
            if decision.declined:
                self._decline(decision.reason)
            return self.stock(*args, **kwargs)
        output = self._prefill(call)
        return output if self._returns_dict(call) else output.to_tuple()

    @contextmanager
    def stock_inside(self) -> Iterator[None]:
        """Within it this thread's calls of the model run the stock forward: the oracle calls the model."""
        self._inside.active = True
        try:
            yield
        finally:
            self._inside.active = False

    def _decline(self, reason: str) -> None:
        if self.strict:
            raise PrefillDeclined(f"pop_ext: the stock forward would run: {reason} (strict=True)")
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"pop_ext: the stock forward runs: {reason}", stacklevel=4)

    def _returns_dict(self, call: Call) -> bool:
        wanted = call.arguments.get("return_dict")
        return bool(wanted if wanted is not None else getattr(self.model.config, "return_dict", True))

    def _prefill(self, call: Call) -> CausalLMOutputWithPast:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        arguments, decision = call.arguments, call.decision
        inputs = {
            name: arguments.get(name)
            for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values")
        }
        if inputs["position_ids"] is None:
            inputs["position_ids"] = self._stock_positions(call)
        if decision.backend == "reference":
            with self.stock_inside():
                logits, cache = reference.prefill(
                    self.model,
                    plan=self.plan,
                    logits_to_keep=decision.logits_to_keep,
                    boundary=list(decision.boundary),
                    **inputs,
                )
            return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
        assert self.native is not None
        output = self.native.prefill(
            **inputs, boundary=list(decision.boundary), logits_to_keep=decision.logits_to_keep
        )
        return CausalLMOutputWithPast(logits=output.logits, past_key_values=output.past_key_values)

    def _stock_positions(self, call: Call) -> torch.Tensor:
        """Positions as the stock forward counts them without ``position_ids``: by column, masked or not."""
        assert call.packed is not None
        past = past_slots(call.arguments.get("past_key_values"))
        return torch.arange(past, past + call.packed.columns)[None]


def _inner(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s wrapper."""
    return getattr(model, "_orig_mod", model)


def _text_config(model: nn.Module) -> Any:
    """The config of the language model; a multimodal one keeps it inside its own."""
    config = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _forward_of(model: nn.Module) -> PrefillForward | None:
    forward = _inner(model).__dict__.get("forward")
    return forward if isinstance(forward, PrefillForward) else None


def enable(model: Model, plan: Plan | None = None, strict: bool = False, backend: str = "native") -> Model:
    """Prunes the prefill of ``model``, in place; ``generate`` and ``pipeline`` need no change.

    Args:
        model: a Hugging Face causal language model.
        plan: what to omit. None: the preset whose config matches, else the deepest third, boundary 1.
        strict: raise ``PrefillDeclined`` where otherwise the stock forward would run with a warning.
        backend: "native", or "reference" for the plain PyTorch oracle, slow but for any decoder.

    Returns:
        The same model. Enabling again replaces plan, strict and backend.

    Raises:
        UnsupportedModelError (a ValueError): no native form; ``backend="reference"`` works.
        ValueError, TypeError: a bad plan or backend. The model is as before.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(_BACKENDS)}, got {backend!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Hugging Face model, got {type(model).__name__}")
    inner = _inner(model)
    config = _text_config(inner)
    if config is None:
        raise TypeError(f"model: expected a Hugging Face model with a config, got {type(inner).__name__}")
    if plan is None:
        plan = default_plan(config)
    previous = _forward_of(model)
    if previous is not None:
        del inner.forward
    try:
        forward = PrefillForward(inner, plan, strict, backend)
        if previous is not None:
            forward.replaced = previous.replaced
        if backend == "native":
            forward.bind_native()
        else:
            check_plan(plan, config.num_hidden_layers)
    except BaseException:
        if previous is not None:
            inner.forward = previous
        raise
    inner.forward = forward
    return model


def disable(model: Model) -> Model:
    """Gives ``model`` its own forward back. A model that is not enabled stays as it is."""
    forward = _forward_of(model)
    if forward is not None:
        inner = _inner(model)
        del inner.forward
        if forward.replaced is not None:
            inner.forward = forward.replaced
    return model


@contextmanager
def enabled(
    model: Model, plan: Plan | None = None, strict: bool = False, backend: str = "native"
) -> Iterator[Model]:
    """``enable`` for the length of a ``with`` block; afterwards the model is as it was before, enabled or not."""
    before = _forward_of(model)
    enable(model, plan, strict, backend)
    try:
        yield model
    finally:
        disable(model)
        if before is not None:
            _inner(model).forward = before


def explain(model: nn.Module, *args: Any, **call: Any) -> Decision:
    """What ``model(*args, **call)`` would run here and now, and why, without running it. str() of it is a sentence.

    ``generate`` calls the model under ``torch.no_grad`` with ``logits_to_keep=1``: to ask about
    it, do the same.

    Raises:
        ValueError: the model is not enabled.
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
