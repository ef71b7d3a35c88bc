"""The arms of a comparison: one call on the same weights, by Hugging Face and in several ways by pop_ext."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pop_ext
import torch
from pop_ext import _core
from pop_ext.plans.plan import Plan
from pop_ext.utils.layer_ranges import format_layers

from bench.measure import Timed, tuned
from bench.memory import MemoryUse

VIA = ("enable", "prefill")
_GRAPHS = 4  # shapes that an arm keeps; a case has one
HF_EAGER, HF_COMPILE, NATIVE_FULL = "hf-eager", "hf-compile", "native-full"


@dataclass(kw_only=True)
class Arm(Timed):
    """One way to prefill.

    Attributes:
        what: the call in words.
        cost: FLOPs and bytes of one call by the cost model, in all and of each stage.
        make: builds ``call``; if it raises, the arm has failed.
        plan: plan of a native arm; None for Hugging Face.
        options: backend options during its calls.
        copies: copies of weights that it is loaded with: "fp8", "int8" or "prepack"; None: none.
        graphs: whether its prefills run as CUDA graphs.
        folded_bytes: memory beyond the checkpoint's: folded K/V weights, and the copies.
        warmup: seconds of the calls before the timed ones; the first may compile.
        memory: memory of one call.
        error: RMS difference of its logits from hf-eager's, relative to the RMS of hf-eager's.
    """

    what: str
    cost: dict[str, Any]
    make: Callable[[Arm], Callable[[], Any]]
    plan: Plan | None = None
    options: Mapping[str, int] = field(default_factory=dict)
    copies: str | None = None
    graphs: bool = False
    folded_bytes: int | None = None
    warmup: tuple[float, ...] = ()
    memory: MemoryUse | None = None
    error: float | None = None

    @property
    def flops(self) -> float:
        """FLOPs of one call by the cost model."""
        return float(self.cost["flops"])

    @property
    def load_options(self) -> dict[str, bool]:
        """Keyword arguments for ``pop_ext.load`` and ``enable``."""
        options: dict[str, Any] = {} if self.copies is None else {self.copies: True}
        return {**options, "cuda_graphs": _GRAPHS} if self.graphs else options

    @property
    def full_depth(self) -> bool:
        """Whether its result should equal the stock model's: at most the last layer is omitted."""
        return self.plan is None or set(self.plan.omit) <= {self.plan.num_layers - 1}

    def prepare(self) -> None:
        """Build ``call``, or set ``failed``."""
        self.call = self.attempt(lambda: tuned(self.make(self), self.options))


def sequence_shapes(batch: int, tokens: int, plan: Plan | None = None) -> list[_core.SequenceShape]:
    """Return a batch for the cost model: no past, one row of logits a sequence, ``min_tokens`` as under ``enable``."""
    boundary = 1 if plan is None else tokens if tokens < plan.min_tokens else min(plan.boundary, tokens)
    return [_core.SequenceShape(tokens, boundary=boundary, logits_to_keep=1)] * batch


def stock_cost(spec: _core.ModelSpec, batch: int, tokens: int) -> dict[str, Any]:
    """Return FLOPs and bytes of Hugging Face's full prefill."""
    return _core.stock_cost(spec, sequence_shapes(batch, tokens))


def plan_cost(spec: _core.ModelSpec, plan: Plan, batch: int, tokens: int) -> dict[str, Any]:
    """Return FLOPs and bytes of a native prefill under a plan."""
    return _core.plan_cost(spec, plan, sequence_shapes(batch, tokens, plan))


def stock_flops(spec: _core.ModelSpec, batch: int, tokens: int) -> float:
    """Return the FLOPs of Hugging Face's full prefill."""
    return float(stock_cost(spec, batch, tokens)["flops"])


def plan_flops(spec: _core.ModelSpec, plan: Plan, batch: int, tokens: int) -> float:
    """Return the FLOPs of a native prefill under a plan."""
    return float(plan_cost(spec, plan, batch, tokens)["flops"])


def make_arms(
    model: Any,
    spec: _core.ModelSpec,
    input_ids: torch.Tensor,
    plans: Iterable[Plan],
    compile_mode: str | None = None,
    via: str = "enable",
    tunings: Sequence[Mapping[str, int]] = (),
    copies: Sequence[str] = (),
    graphs: bool = False,
) -> list[Arm]:
    """Return all arms of a case, not yet prepared.

    Args:
        model: a stock Hugging Face model; it is not changed.
        spec: its shape.
        input_ids: ``[batch, tokens]``, the prompt of every arm.
        plans: one arm each, beside native-full.
        compile_mode: mode of ``torch.compile`` for hf-compile. None: no such arm.
        via: "enable": call the enabled model like the stock one; "prefill": call ``native.prefill``.
        tunings: backend options; each adds an arm for every plan.
        copies: "fp8", "int8", "prepack"; each adds an arm for native-full and for every plan.
        graphs: add an arm that runs as CUDA graphs for native-full and for every plan.
    """
    batch, tokens = input_ids.shape
    cost = stock_cost(spec, batch, tokens)
    stock = "model(input_ids, use_cache=True, logits_to_keep=1), sdpa, no_grad"
    arms = [Arm(name=HF_EAGER, what=stock, cost=cost, make=lambda _: _forward(model, input_ids))]
    if compile_mode is not None:
        arms.append(
            Arm(
                name=HF_COMPILE,
                what=f'torch.compile(model, mode="{compile_mode}", dynamic=False), else as {HF_EAGER}',
                cost=cost,
                make=lambda _: _compiled(model, input_ids, compile_mode),
            )
        )
    full = Plan(spec.num_layers, ())
    names = [NATIVE_FULL]
    for plan in (full, *plans):
        name = NATIVE_FULL if plan is full else _unused(plan_name(plan), names)
        what = {
            "enable": f"pop_ext.enable(model, plan, strict=True), else as {HF_EAGER}",
            "prefill": "pop_ext.load(model, plan).prefill(input_ids)",
        }[via]
        what = f"{what}; omits {layers_text(plan)}"
        cost = plan_cost(spec, plan, batch, tokens)
        make = _enabled_maker(model, input_ids) if via == "enable" else _loaded_maker(model, input_ids)
        arms.append(Arm(name=name, what=what, cost=cost, make=make, plan=plan))
        for copy_ in copies:
            text = f"{what}; {copy_}"
            arms.append(Arm(name=f"{name} {copy_}", what=text, cost=cost, make=make, plan=plan, copies=copy_))
        if graphs:
            text = f"{what}; cuda_graphs={_GRAPHS}"
            arms.append(Arm(name=f"{name} graphs", what=text, cost=cost, make=make, plan=plan, graphs=True))
        for options in tunings if plan is not full else ():
            text = options_text(options)
            arms.append(
                Arm(name=f"{name} {text}", what=f"{what}; {text}", cost=cost, make=make, plan=plan, options=options)
            )
    return arms


def options_text(options: Mapping[str, int]) -> str:
    """Format backend options as ``--tune`` takes them: "early_launch=1,sdpa_rows=0"."""
    return ",".join(f"{name}={value}" for name, value in options.items())


def plan_name(plan: Plan) -> str:
    """Format a plan's number of omitted layers, "pop 5/16", and its boundary if that is not 1."""
    boundary = f" b{plan.boundary}" if plan.boundary > 1 else ""
    return f"pop {len(plan.omit)}/{plan.num_layers}{boundary}"


def layers_text(plan: Plan) -> str:
    """Format the omitted layers: "layers 3, 11-15"."""
    return f"layers {format_layers(plan.omit)}" if plan.omit else "nothing"


def _unused(name: str, names: list[str]) -> str:
    same = sum(known == name or known.startswith(f"{name} #") for known in names)
    names.append(name if same == 0 else f"{name} #{same + 1}")
    return names[-1]


def _forward(model: Any, input_ids: torch.Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return model(input_ids=input_ids, use_cache=True, logits_to_keep=1)

    return call


def _compiled(model: Any, input_ids: torch.Tensor, mode: str) -> Callable[[], Any]:
    torch.compiler.reset()  # also drops what was compiled for the shape before this one
    return _forward(torch.compile(model, mode=mode, dynamic=False), input_ids)


def _enabled_maker(model: Any, input_ids: torch.Tensor) -> Callable[[Arm], Callable[[], Any]]:
    def make(arm: Arm) -> Callable[[], Any]:
        view = copy.copy(model)  # shares modules and weights, but not `forward`
        pop_ext.enable(view, arm.plan, strict=True, **arm.load_options)
        arm.folded_bytes = view.forward.backend.native.extra_bytes
        with torch.no_grad():
            decision = pop_ext.explain(view, input_ids=input_ids, use_cache=True, logits_to_keep=1)
        if decision.backend != "native":
            raise RuntimeError(f"expected a native prefill, got {decision}")
        return _forward(view, input_ids)

    return make


def _loaded_maker(model: Any, input_ids: torch.Tensor) -> Callable[[Arm], Callable[[], Any]]:
    def make(arm: Arm) -> Callable[[], Any]:
        native = pop_ext.load(model, arm.plan, **arm.load_options)
        arm.folded_bytes = native.extra_bytes
        return lambda: native.prefill(input_ids)

    return make


def find(arms: Sequence[Arm], name: str) -> Arm | None:
    """Return the arm with this name; None if it failed or does not exist."""
    return next((arm for arm in arms if arm.name == name and arm.failed is None), None)
