"""Prefill-Only Pruning (POP, arXiv 2602.03295) for Hugging Face language models.

``pop_ext.enable(model)``, then ``model.generate(...)`` as before: long prompts get their first token
sooner, decode stays the full model. ``torch.ops.pop.prefill`` is the same for an engine of one's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (its libraries must be in the process before ours load)

from pop_ext import operators as _operators  # noqa: F401  (registers torch.ops.pop)
from pop_ext._core import __version__
from pop_ext.plan import Plan

if TYPE_CHECKING:
    from pop_ext.decision import Decision
    from pop_ext.enabling import disable, enable, enabled, explain, last_call
    from pop_ext.evaluate import score
    from pop_ext.families import UnsupportedModelError
    from pop_ext.fitting import fit
    from pop_ext.forward import PrefillDeclined
    from pop_ext.latency import BudgetedPlan, plan_within, shortest_paying
    from pop_ext.layer_importance import Importance, importance
    from pop_ext.native import NativeModel, PrefillOutput, load
    from pop_ext.presets import supported_models
    from pop_ext.shortgpt import BlockInfluence, block_influence

__all__ = [
    "BlockInfluence",
    "BudgetedPlan",
    "Decision",
    "Importance",
    "NativeModel",
    "Plan",
    "PrefillDeclined",
    "PrefillOutput",
    "UnsupportedModelError",
    "__version__",
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
    "score",
    "shortest_paying",
    "supported_models",
]

# What needs transformers is imported at first use: the operators work without it.
_LAZY = {
    "BlockInfluence": "pop_ext.shortgpt",
    "BudgetedPlan": "pop_ext.latency",
    "Decision": "pop_ext.decision",
    "Importance": "pop_ext.layer_importance",
    "NativeModel": "pop_ext.native",
    "PrefillDeclined": "pop_ext.forward",
    "PrefillOutput": "pop_ext.native",
    "UnsupportedModelError": "pop_ext.families",
    "block_influence": "pop_ext.shortgpt",
    "disable": "pop_ext.enabling",
    "enable": "pop_ext.enabling",
    "enabled": "pop_ext.enabling",
    "explain": "pop_ext.enabling",
    "fit": "pop_ext.fitting",
    "importance": "pop_ext.layer_importance",
    "last_call": "pop_ext.enabling",
    "load": "pop_ext.native",
    "plan_within": "pop_ext.latency",
    "score": "pop_ext.evaluate",
    "shortest_paying": "pop_ext.latency",
    "supported_models": "pop_ext.presets",
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
