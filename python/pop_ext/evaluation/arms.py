"""Arms of an evaluation: the different ways to encode a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from pop_ext.hf.compat import cache_of, with_cache
from pop_ext.hf.decision import Products
from pop_ext.hf.enable import enabled
from pop_ext.hf.load import load
from pop_ext.hf.modules import input_device
from pop_ext.hf.portable_backend import PortableBackend
from pop_ext.methods.calibration import stock_evaluation, stock_model
from pop_ext.plans.plan import Plan
from pop_ext.utils.layer_ranges import format_layers

FULL, POP, FITTED = "full", "pop", "pop-fitted"
RIDGE, DISTILL = "ridge", "distill"
"""Methods of fits. A report that names none is of a ridge."""
FULL_FP8, POP_FP8, FITTED_FP8 = "full-fp8", "pop-fp8", "pop-fitted-fp8"
FULL_INT8, POP_INT8, FITTED_INT8 = "full-int8", "pop-int8", "pop-fitted-int8"
FULL_8_BITS = (FULL_FP8, FULL_INT8)
WITH_FIT = (FITTED, FITTED_FP8, FITTED_INT8)
"""Kinds that run the fitted projections of a plan. The others run the plan without them."""
DEFAULT_KINDS = (FULL, POP, FITTED, NO_KV, NO_BOUNDARY, DROPPED)
"""The default kinds: ``full`` is the stock model, ``pop`` the plan without fitted projections, ``pop-fitted`` the plan
with them, named ``pop-ridge`` or ``pop-distill`` by the method of the fit. The others are ablations."""
KINDS = (*DEFAULT_KINDS, FULL_FP8, POP_FP8, FITTED_FP8, FULL_INT8, POP_INT8, FITTED_INT8)
"""All kinds: also those that prefill prompts with products in 8-bit floats or integers (docs/fp8.md)."""


@dataclass(frozen=True)
class Arm:
    """One way to encode a prompt. The continuation runs at full depth in every kind but ``dropped``.

    Attributes:
        kind: One of ``KINDS``.
        plan: Plan whose layers are omitted. In ``full``, ``full-fp8`` and ``full-int8`` it omits nothing.
        tag: End of the name; tells fits apart that have the same method, layers and boundary.
    """

    kind: str
    plan: Plan
    tag: str = ""

    @property
    def products(self) -> Products | None:
        """Products in 8 bits that prompts are prefilled with, "fp8" or "int8"; None for the other kinds."""
        if self.kind in (FULL_FP8, POP_FP8, FITTED_FP8):
            return "fp8"
        return "int8" if self.kind in (FULL_INT8, POP_INT8, FITTED_INT8) else None

    @property
    def boundary(self) -> int | None:
        """Number of boundary rows; None for kinds without boundary rows."""
        return self.plan.boundary if self.kind in (POP, NO_KV, POP_FP8, POP_INT8, *WITH_FIT) else None

    @property
    def name(self) -> str:
        """Name made of kind or method, omitted layers and boundary, such as "pop 8-11 b16" or "pop-ridge 8-11 b1"."""
        if self.kind in (FULL, *FULL_8_BITS):
            return self.kind
        boundary = "" if self.boundary is None else f" b{self.boundary}"
        kind = self.kind if self.method is None else self.kind.replace(FITTED, f"pop-{self.method}")
        return f"{kind} {layers_text(self.plan)}{boundary}{self.tag}"

    @property
    def method(self) -> str | None:
        """Method of the fit, "ridge" or "distill"; None for kinds without one."""
        if self.kind not in WITH_FIT or self.plan.projections is None:
            return None
        return self.plan.projections.report.method

    @property
    def fit(self) -> str | None:
        """Digest of the fitted projections; None for a plan without them."""
        return None if self.plan.projections is None else self.plan.projections.digest


def omitted_text(omit: Sequence[int]) -> str:
    """Format omitted layers, such as "3,11-15" or "none"."""
    return format_layers(omit, ",") or "none"


def layers_text(plan: Plan) -> str:
    """Format the omitted layers of a plan, such as "3,11-15" or "none"."""
    return omitted_text(plan.omit)


def make_arms(plans: Sequence[Plan], kinds: Sequence[str] = DEFAULT_KINDS) -> list[Arm]:
    """Make the arms of an evaluation: the full model, then every kind of every plan, without duplicates.

    A plan without fitted projections has no arms of the ``pop-fitted`` kinds. Of several fits with the same method,
    layers and boundary, all but the first have the beginning of their digest in their names. Plans that differ only in
    their boundary share one ``no-boundary`` and one ``dropped`` arm. ``min_tokens`` of the plans is set to 0.

    Args:
        plans: Plans of one depth, at least one.
        kinds: Kinds from ``KINDS``. The full model is always included.

    Returns:
        The arms in the order of ``KINDS``.

    Raises:
        ValueError: There is no plan, the plans differ in depth, or a kind is unknown.
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
            if kind in WITH_FIT and plan.projections is None:
                continue
            plan = plan.replace(min_tokens=0)  # min_tokens only decides when pruning pays
            plan = plan if kind in WITH_FIT else plan.replace(projections=None)
            arm = Arm(kind, Plan(plan.num_layers, ()) if kind in FULL_8_BITS else plan)
            if arm.name in arms and arms[arm.name].fit != arm.fit:
                arm = replace(arm, tag=f" {str(arm.fit)[:6]}")
            arms.setdefault(arm.name, arm)
    return list(arms.values())


def backend_of(model: Any) -> str:
    """Return "native", else "portable", or "reference" for a model that neither of them runs."""
    model = stock_model(model)
    full = Plan(model.config.get_text_config().num_hidden_layers, ())
    try:
        load(model, full)
    except UnsupportedModelError:
        try:
            with stock_evaluation(model):  # in training mode nothing is tried
                PortableBackend(full).load(model)
        except ValueError:
            return "reference"
        return "portable"
    return "native"


def logits_after_prefill(model: Any, prefill: Callable[[Tensor], Any], context: Tensor, continuation: Tensor) -> Tensor:
    """Return the logits that predict a continuation which the stock model reads after a native prefill.

    This is what generation computes, except that the continuation runs in one call. Its rows have no 8-bit products.

    Args:
        model: Stock model, which reads the continuation.
        prefill: Method that prefills int [batch, prompt] and returns logits [batch, 1, vocab] and a cache.
        context: Prompts, int [batch, prompt].
        continuation: int [batch, n].

    Returns:
        [batch, n, vocab].
    """
    prefilled = prefill(context)
    if continuation.shape[1] == 1:
        return prefilled.logits
    with stock_evaluation(model), torch.no_grad():
        cache = with_cache(model, cache_of(prefilled))
        rest = model(input_ids=continuation[:, :-1], **cache).logits
    return torch.cat([prefilled.logits, rest], dim=1)


def arm_logits(
    model: Any, arm: Arm, pairs: Sequence[Pair], batch_size: int, backend: str
) -> Iterator[tuple[int, Tensor]]:
    """Yield the index of each pair and the logits that predict its continuation, in any order.

    ``pop`` and ``pop-fitted`` run as in ``pop_ext.score``. The fp8 and int8 kinds prefill the prompt natively, and the
    stock model reads the continuation. All other kinds run in plain PyTorch.

    Args:
        model: Stock model.
        arm: The arm.
        pairs: (prompt, continuation) each.
        batch_size: Pairs per forward.
        backend: As of ``backend_of``, for ``pop`` and ``pop-fitted``.

    Yields:
        (index of the pair, logits [n, vocab] for the n tokens of its continuation).
    """
    if arm.kind in (POP, FITTED):
        contexts, continuations = [context for context, _ in pairs], [continuation for _, continuation in pairs]
        with stock_evaluation(model), enabled(model, arm.plan, backend=backend):
            for index, (rows, _) in enumerate(continuation_logits(model, contexts, continuations, batch_size)):
                yield index, rows
        return
    device = input_device(model)
    native = load(model, arm.plan, **{arm.products: True}) if arm.products else None
    for group in group_by_shape(pairs, batch_size):
        context = torch.stack([pairs[index][0] for index in group]).to(device)
        continuation = torch.stack([pairs[index][1] for index in group]).to(device)
        if native is not None:
            logits = logits_after_prefill(native.model, native.prefill, context, continuation)
        elif arm.kind in ABLATIONS:
            logits = ablated_logits(model, arm.kind, arm.plan, context, continuation)
        else:
            ids = torch.cat([context, continuation[:, :-1]], dim=1)
            logits = stock_logits(model, ids, continuation.shape[1])
        yield from zip(group, logits, strict=True)
