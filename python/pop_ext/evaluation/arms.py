"""The arms of an evaluation: one way each to encode a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pop_ext.evaluation.ablations import (
    ABLATIONS,
    DROPPED,
    NO_BOUNDARY,
    NO_KV,
    ablated_logits,
    group_by_shape,
    stock_logits,
)
from pop_ext.evaluation.prompts import Pair
from pop_ext.evaluation.score import continuation_logits
from pop_ext.hf.architectures import UnsupportedModelError
from pop_ext.hf.compat import with_cache
from pop_ext.hf.enable import enabled
from pop_ext.hf.native_model import load
from pop_ext.methods.calibration import stock_evaluation
from pop_ext.plans.plan import Plan

FULL, POP, FITTED = "full", "pop", "pop-fitted"
FULL_FP8, POP_FP8 = "full-fp8", "pop-fp8"
DEFAULT_KINDS = (FULL, POP, FITTED, NO_KV, NO_BOUNDARY, DROPPED)
"""``full``: the stock model. ``pop``: the plan. ``pop-fitted``: with its fitted projections. Then the ablations."""
KINDS = (*DEFAULT_KINDS, FULL_FP8, POP_FP8)
"""Also ``full-fp8`` and ``pop-fp8``: prompts prefilled with products in 8-bit floats (docs/fp8.md)."""


@dataclass(frozen=True)
class Arm:
    """One way to encode a prompt; what follows it runs at full depth in all of them but ``dropped``.

    Attributes:
        kind: of ``KINDS``.
        plan: whose layers it omits; of ``full`` and ``full-fp8`` one that omits nothing.
    """

    kind: str
    plan: Plan

    @property
    def fp8(self) -> bool:
        """Whether its prompts' products are in 8-bit floats."""
        return self.kind in (FULL_FP8, POP_FP8)

    @property
    def boundary(self) -> int | None:
        """Rows at full depth, of the kinds that have such rows."""
        return self.plan.boundary if self.kind in (POP, FITTED, NO_KV, POP_FP8) else None

    @property
    def name(self) -> str:
        """ "pop 8-11 b16": kind, omitted layers and boundary."""
        if self.kind in (FULL, FULL_FP8):
            return self.kind
        boundary = "" if self.boundary is None else f" b{self.boundary}"
        return f"{self.kind} {layers_text(self.plan)}{boundary}"

    @property
    def fit(self) -> str | None:
        """The digest of its fitted projections, of the kind that has some."""
        return None if self.plan.projections is None else self.plan.projections.digest


def omitted_text(omit: Sequence[int]) -> str:
    """ "3,11-15"; "none"."""
    return layers_text(Plan(max(omit, default=0) + 2, omit))


def layers_text(plan: Plan) -> str:
    """ "3,11-15"."""
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in plan.runs) or "none"


def make_arms(plans: Sequence[Plan], kinds: Sequence[str] = DEFAULT_KINDS) -> list[Arm]:
    """Every kind of every plan that has it, each once; the full model first.

    A plan without fitted projections has no ``pop-fitted``; plans that differ in their boundary alone share their
    ``no-boundary`` and ``dropped``.

    Raises:
        ValueError: no plan, plans of different depth, two fits of the same layers, or an unknown kind.
    """
    depths = sorted({plan.num_layers for plan in plans})
    if len(depths) != 1:
        raise ValueError(f"plans: expected at least one, all of one depth, got depths {depths}")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds: expected of {', '.join(KINDS)}, got {kind!r}")
    arms = {FULL: Arm(FULL, Plan(depths[0], ()))}
    for kind in (kind for kind in KINDS if kind in kinds and kind != FULL):
        for plan in plans:
            if kind == FITTED and plan.projections is None:
                continue
            plan = plan.replace(min_tokens=0)  # that is about speed
            plan = plan if kind == FITTED else plan.replace(projections=None)
            arm = Arm(kind, Plan(plan.num_layers, ()) if kind == FULL_FP8 else plan)
            if arms.setdefault(arm.name, arm).plan.projections != arm.plan.projections:
                raise ValueError(f"plans: expected one fit of layers {layers_text(plan)}, got two")
    return list(arms.values())


def backend_of(model: Any) -> str:
    """ "native", or "reference" for a model that has no native form."""
    try:
        load(model, Plan(model.config.get_text_config().num_hidden_layers, ()))
    except UnsupportedModelError:
        return "reference"
    return "native"


def prefilled_logits(model: Any, prefill: Callable[[Tensor], Any], context: Tensor, continuation: Tensor) -> Tensor:
    """Logits [batch, n, vocab] that predict a continuation that the stock model reads after a native prefill.

    As generation computes them, but for the continuation in one piece: no row of it meets what only a prefill does.
    """
    prefilled = prefill(context)
    if continuation.shape[1] == 1:
        return prefilled.logits
    with stock_evaluation(model), torch.no_grad():
        cache = with_cache(model, prefilled.past_key_values)
        rest = model(input_ids=continuation[:, :-1], **cache).logits
    return torch.cat([prefilled.logits, rest], dim=1)


def arm_logits(
    model: Any, arm: Arm, pairs: Sequence[Pair], batch_size: int, backend: str
) -> Iterator[tuple[int, Tensor]]:
    """(index, logits [n, vocab] that predict the n tokens of its continuation) of every pair, in any order.

    ``pop`` and ``pop-fitted`` run as ``pop_ext.score`` does, by ``backend``; those with 8-bit products natively, and
    the stock model after their prompt; all others in plain PyTorch.
    """
    if arm.kind in (POP, FITTED):
        contexts, continuations = [context for context, _ in pairs], [continuation for _, continuation in pairs]
        with enabled(model, arm.plan, backend=backend):
            for index, (rows, _) in enumerate(continuation_logits(model, contexts, continuations, batch_size)):
                yield index, rows
        return
    device = model.get_input_embeddings().weight.device
    native = load(model, arm.plan, fp8=True) if arm.fp8 else None
    for group in group_by_shape(pairs, batch_size):
        context = torch.stack([pairs[index][0] for index in group]).to(device)
        continuation = torch.stack([pairs[index][1] for index in group]).to(device)
        if native is not None:
            logits = prefilled_logits(native.model, native.prefill, context, continuation)
        elif arm.kind in ABLATIONS:
            logits = ablated_logits(model, arm.kind, arm.plan, context, continuation)
        else:
            ids = torch.cat([context, continuation[:, :-1]], dim=1)
            logits = stock_logits(model, ids, continuation.shape[1])
        yield from zip(group, logits, strict=True)
