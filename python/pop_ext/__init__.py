"""Prefill-Only Pruning (POP, arXiv 2602.03295) for Hugging Face language models.

After ``pop_ext.enable(model, plan)``, ``model.generate(...)`` works as before. Long prompts get their first token
sooner, because their context rows skip the layers that the plan omits. Decode runs the full model. An engine that does
not use ``generate`` can call the same prefill as ``torch.ops.pop.prefill``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (its shared libraries must be loaded before those of pop_ext)

from pop_ext import ops as _ops  # noqa: F401  (registers torch.ops.pop)
from pop_ext._core import __version__
from pop_ext.plans.card import PlanCard
from pop_ext.plans.default import NoPlanWarning
from pop_ext.plans.plan import Plan

if TYPE_CHECKING:
    from pop_ext.evaluation.score import score
    from pop_ext.hf.architectures import UnsupportedModelError, supported_models
    from pop_ext.hf.decision import Decision
    from pop_ext.hf.enable import disable, enable, enabled, explain, last_call, stats
    from pop_ext.hf.families import register_family
    from pop_ext.hf.forward import PrefillDeclined
    from pop_ext.hf.load import load
    from pop_ext.hf.native_model import NativeModel, PrefillOutput
    from pop_ext.methods.autoplan import AutoPlan, autoplan
    from pop_ext.methods.block_influence import BlockInfluence, block_influence
    from pop_ext.methods.candidates import Trial
    from pop_ext.methods.fit import fit
    from pop_ext.methods.importance import Importance, importance
    from pop_ext.methods.latency import BudgetedPlan, plan_within, shortest_paying

__all__ = [
    "AutoPlan",
    "BlockInfluence",
    "BudgetedPlan",
    "Decision",
    "Importance",
    "NativeModel",
    "NoPlanWarning",
    "Plan",
    "PlanCard",
    "PrefillDeclined",
    "PrefillOutput",
    "Trial",
    "UnsupportedModelError",
    "__version__",
    "autoplan",
    "block_influence",
    "disable",
    "enable",
    "enabled",
    "explain",
    "fit",
    "importance",
    "last_call",
    "load",
    "plan_within",
    "reference",
    "register_family",
    "score",
    "shortest_paying",
    "stats",
    "supported_models",
]

# Names that need transformers are imported at first use, because the operators work without it.
_LAZY = {
    "AutoPlan": "pop_ext.methods.autoplan",
    "BlockInfluence": "pop_ext.methods.block_influence",
    "BudgetedPlan": "pop_ext.methods.latency",
    "Decision": "pop_ext.hf.decision",
    "Importance": "pop_ext.methods.importance",
    "NativeModel": "pop_ext.hf.native_model",
    "PrefillDeclined": "pop_ext.hf.forward",
    "PrefillOutput": "pop_ext.hf.native_model",
    "Trial": "pop_ext.methods.candidates",
    "UnsupportedModelError": "pop_ext.hf.architectures",
    "autoplan": "pop_ext.methods.autoplan",
    "block_influence": "pop_ext.methods.block_influence",
    "disable": "pop_ext.hf.enable",
    "enable": "pop_ext.hf.enable",
    "enabled": "pop_ext.hf.enable",
    "explain": "pop_ext.hf.enable",
    "fit": "pop_ext.methods.fit",
    "importance": "pop_ext.methods.importance",
    "last_call": "pop_ext.hf.enable",
    "load": "pop_ext.hf.load",
    "plan_within": "pop_ext.methods.latency",
    "register_family": "pop_ext.hf.families",
    "score": "pop_ext.evaluation.score",
    "shortest_paying": "pop_ext.methods.latency",
    "stats": "pop_ext.hf.enable",
    "supported_models": "pop_ext.hf.architectures",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "reference":
        return import_module("pop_ext.reference")
    if name not in _LAZY:
        raise AttributeError(f"module 'pop_ext' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
