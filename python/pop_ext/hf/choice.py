"""The plan that runs on a loaded model: the argument ``plan`` of every function and command, read in one place."""

from __future__ import annotations

from functools import partial
from typing import Any

from pop_ext.hf.compat import uncompiled
from pop_ext.hf.modules import find_decoder_modules
from pop_ext.plans.default import ChosenPlan, choose_plan, plan_to_measure
from pop_ext.plans.origin import check_weights_hash
from pop_ext.plans.plan import Plan
from pop_ext.plans.projections import check_fit


def plan_for(model: Any, plan: Any = None, *, measure: bool = False) -> ChosenPlan:
    """Return the plan that an argument ``plan`` stands for on a loaded model.

    Args:
        model: Hugging Face model.
        plan: As for ``choose_plan``. A plan beside the checkpoint runs only if it was measured, and fitted, on the
            weights that the model has.
        measure: Without a plan: True for one worth measuring, False for the one that ``pop_ext.enable`` runs.

    Raises:
        ValueError: As for ``choose_plan``.
        OSError: The file of a plan cannot be read.
    """
    check, adapted = partial(check_weights, model), plan is None and _has_adapters(model)
    if plan is None and measure:
        return plan_to_measure(model.config, check, adapted)
    return choose_plan(plan, model.config, check, adapted)


def _has_adapters(model: Any) -> bool:
    """Return True if adapters of PEFT lie in a model, merged into its weights or not."""
    return any(type(module).__module__.startswith("peft.") for module in model.modules())


def check_weights(model: Any, plan: Plan) -> None:
    """Check that a plan with a card was measured on the weights of a model, and fitted on them if it is fitted.

    Raises:
        ValueError: It was not, or the model's weights are not in memory.
    """
    stock: Any = uncompiled(model)
    if any(parameter.is_meta for parameter in stock.parameters()):
        raise ValueError("model: expected weights in memory, to compare them with the plan's, got offloaded ones")
    check_fit(plan, find_decoder_modules(stock).layers)
    if plan.card is not None:
        check_weights_hash(plan.card.weights_hash, stock, "card")
