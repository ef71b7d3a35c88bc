"""Decide whether a call of an enabled model is a prefill to prune, and make its request.

docs/declined.md lists the rules. Pruning never changes which outputs a call returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from pop_ext.hf.architectures import PORTABLE_ADVICE, vision_of
from pop_ext.hf.compat import new_cache, rename_cache, text_config
from pop_ext.hf.decision import Decision, Decline, Products
from pop_ext.hf.family import VisionSpec
from pop_ext.hf.inputs import PrefillRequest
from pop_ext.hf.packed_step import PackedStep, is_packed, read_step
from pop_ext.hf.packing import PackedBatch, Spans, snap_to_span_start
from pop_ext.hf.rules import check_prefill
from pop_ext.plans.plan import Plan


@dataclass(frozen=True)
class Call:
    """Represent a call of ``forward`` whose arguments ask for a prefill.

    Attributes:
        arguments: by name, the cache as ``past_key_values``.
        decision: reports that the backend runs it.
        mask: 2-D padding mask, whatever form the call's mask had. None: no padding.
        packed: the real new tokens.
        spans: new tokens that attend to each other in both directions.
        vision: vision wrapper of the model, or None.
    """

    arguments: dict[str, Any]
    decision: Decision
    mask: torch.Tensor | None
    packed: PackedBatch
    spans: Spans
    vision: VisionSpec | None


class Runner(Protocol):
    """Run validated requests on one model. ``NativeModel`` is a runner; other backends bring their own.

    Attributes:
        backend: "native", "portable" or "reference", as ``Decision.backend`` shows it.
        calls_model: whether a run calls the model's ``forward``. The stock one must answer such calls.
    """

    backend: str
    calls_model: bool

    def check_values(self, request: PrefillRequest) -> None:
        """Raise ValueError or TypeError for values that the model cannot take, such as ids outside its vocabulary."""

    def run(self, request: PrefillRequest) -> Any:
        """Run a validated request; return a ``PrefillOutput`` or an object with its attributes."""


class Backend(Protocol):
    """Run the prefills of an enabled model. ``enable`` makes one and passes it to ``PrefillForward``.

    Attributes:
        name: "native", "portable" or "reference", as ``Decision.backend`` shows it.
        plan: what its prefills omit.
        products: "fp8" or "int8" if its products are in 8 bits; else None.
        runs_stock_forward: whether it hands the call to the forward of the model's class, which takes any argument and
            any cache that it knows.
        fallback: the backend for calls that this one cannot run; None without one.
        not_native: why the native backend does not run the model in its place; "" where that was not asked for.
    """

    name: str
    plan: Plan
    products: Products | None
    runs_stock_forward: bool
    not_native: str

    @property
    def fallback(self) -> Backend | None: ...

    def load(self, model: nn.Module) -> object:
        """Prepare to run ``model``. Raise ValueError if it cannot run."""

    def validate(self, model: nn.Module, call: Call) -> Runner:
        """Return a runner for ``call`` on the model as it is now. Raise ``Decline`` if the backend cannot run it."""

    def bind(self, model: nn.Module, call: Call) -> Runner:
        """Like ``validate``, but the runner may validate the model during its run, and raise ``Decline`` then."""

    def bind_step(self, model: nn.Module, step: PackedStep) -> Callable[[], Any]:
        """Return what runs a step of continuous batching, and returns an object with the attributes of a
        ``PrefillOutput``. Raise ``Decline`` if the backend cannot run it on the model as it is now."""


def dispatch(
    model: nn.Module, backend: Backend, arguments: dict[str, Any], replaced: Any
) -> tuple[Decision, Runner, PrefillRequest]:
    """Validate a call of an enabled model: make the one request that its backend runs.

    Args:
        model: the enabled model.
        backend: where its prefills run.
        arguments: of the call, from ``bind_arguments``.
        replaced: the forward that ``enable`` found on the instance, or None.

    Raises:
        Decline: The stock forward must run the call.
        ValueError, TypeError: An argument that the stock forward could not take either.
    """
    try:
        call = classify(model, backend, arguments, replaced)
        runner = backend.bind(model, call)
        request = _make_request(model, call)
        runner.check_values(request)
    except Decline as decline:
        if not decline.declined or backend.fallback is None:
            raise
        decision, runner, request = dispatch(model, backend.fallback, arguments, replaced)
        return _fallen_back(decision, backend, decline), runner, request
    return call.decision, runner, request


def dispatch_step(
    model: nn.Module, backend: Backend, arguments: dict[str, Any], replaced: Any
) -> tuple[Decision, Callable[[], Any]]:
    """Validate a step of continuous batching; return the decision and what runs it.

    Args, Raises: as for ``dispatch``.
    """
    step = read_step(model, backend.plan, arguments, replaced)
    try:
        run = backend.bind_step(model, step)
    except Decline as decline:
        fallback = backend.fallback
        if not decline.declined or fallback is None:
            raise
        run = fallback.bind_step(model, step)
        decision = step.decision(fallback.name, fallback.plan, fallback.not_native, fallback.products)
        return _fallen_back(decision, backend, decline), run
    return step.decision(backend.name, backend.plan, backend.not_native, backend.products), run


def explain_call(model: nn.Module, backend: Backend, arguments: dict[str, Any], replaced: Any) -> Decision:
    """Return what ``dispatch`` would decide, without checking the values of a call or running it."""
    try:
        if is_packed(arguments):
            return dispatch_step(model, backend, arguments, replaced)[0]
        call = classify(model, backend, arguments, replaced)
        backend.validate(model, call)
    except Decline as decline:
        if decline.declined and backend.fallback is not None:
            return _fallen_back(explain_call(model, backend.fallback, arguments, replaced), backend, decline)
        return decline.decision(backend.plan)
    return call.decision


def _fallen_back(decision: Decision, backend: Backend, decline: Decline) -> Decision:
    """Add to the decision of a fallback why the first backend does not run the call."""
    if decision.backend == "stock":
        return decision
    reason = decline.reason.removesuffix(f". {PORTABLE_ADVICE}")
    return replace(decision, reason=f"{decision.reason} (not {backend.name}: {reason})")


def bind_arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by name, with ``**kwargs`` merged in and the cache as ``past_key_values``.

    Raises:
        TypeError: As the call itself would.
    """
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    rename_cache(arguments, signature)
    return arguments


def classify(model: nn.Module, backend: Backend, arguments: dict[str, Any], replaced: Any) -> Call:
    """Read a bound call. Raise ``Decline`` unless its arguments ask for a prefill that a pruned one can answer."""
    plan = backend.plan
    vision = vision_of(model)
    mask, packed, spans = check_prefill(
        model, text_config(model), vision, plan, arguments, replaced, backend.runs_stock_forward
    )
    keep = arguments["logits_to_keep"]
    # Decided for each sequence by itself: the other sequences of a batch never change a result.
    boundaries = [t if t < plan.min_tokens else min(max(plan.boundary, keep), t) for t in packed.tokens]
    boundary = tuple(snap_to_span_start(boundaries, packed.tokens, spans))
    full = all(t == b for t, b in zip(packed.tokens, boundary, strict=True))
    reason = "every row runs at full depth" if full else "a prefill"
    if not plan.omit:
        reason = "the plan omits no layer"
    if backend.not_native:
        reason += f" (not native: {backend.not_native})"
    decision = Decision(
        backend.name, "prefill", reason, False, plan, tuple(packed.tokens), boundary, keep, products=backend.products
    )
    return Call(arguments, decision, mask, packed, spans, vision)


def _make_request(model: nn.Module, call: Call) -> PrefillRequest:
    """Make the request of a checked call.

    Positions: those of the call, else counted by column as the stock forward does. In a vision-language model the
    wrapper gives the positions of its own call, and those counted by column serve where it gives none.
    """
    arguments, packed, decision, vision = call.arguments, call.packed, call.decision, call.vision
    tokens = arguments["inputs_embeds"] if arguments.get("input_ids") is None else arguments["input_ids"]
    cache = arguments.get("past_key_values")
    given = arguments.get("position_ids")
    position_ids = packed.column_position_ids(tokens.device) if given is None or vision is not None else given
    return PrefillRequest(
        rows=packed.pack(tokens),
        packed=packed,
        positions=packed.pack_positions(position_ids),
        cache=new_cache(model.config) if cache is None else cache,
        boundary=list(decision.boundary),
        num_logits=[decision.logits_to_keep] * packed.batch,
        output_shape=(packed.batch, decision.logits_to_keep),
        spans=call.spans,
        arguments={
            "input_ids": arguments.get("input_ids"),
            "inputs_embeds": arguments.get("inputs_embeds"),
            "attention_mask": call.mask,
            "position_ids": position_ids if vision is None else given,
            "past_key_values": cache,
            **({} if vision is None else {name: arguments[name] for name in vision.arguments & arguments.keys()}),
        },
    )
