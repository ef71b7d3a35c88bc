"""What loading a model natively makes: the runtime's handle, and how it is known whether that is still the model."""

from __future__ import annotations

import json
import weakref

import torch
from torch import nn

from pop_ext.hf.architectures import UnsupportedModelError
from pop_ext.hf.patches import InnerModules
from pop_ext.hf.weight_map import Description, WeightStamps
from pop_ext.plans.plan import Plan


class Loaded:
    """What one ``pop::load`` made, freed when nobody refers to it any more: a running call does."""

    def __init__(self, model: nn.Module, description: Description, plan: Plan, fp8: bool, prepack: bool) -> None:
        weights = [ref.tensor for ref in description.weights]
        fitted = None if plan.projections is None else plan.projections.stack_rows(weights[0])
        for option, wanted in {"fp8": fp8, "prepack": prepack}.items():
            if wanted:
                check_possible(option, description)
        with torch.no_grad():
            self.handle = torch.ops.pop.load(description.spec.to_json(), plan.to_json(), weights, fitted, fp8, prepack)
        weakref.finalize(self, torch.ops.pop.unload, self.handle)
        self.description = description
        self.inner = InnerModules(model)
        self.like = weights[0].detach()
        self.extra_bytes: int = json.loads(torch.ops.pop.info(self.handle))["extra_bytes"]
        self._stamps = WeightStamps(description.weights)

    def stale_weight(self) -> str | None:
        model = self.description.model()
        in_place = model is not None and self.inner.matches(model)
        return (None if in_place else self._stamps.moved()) or self.written_weight()

    def written_weight(self) -> str | None:
        """``stale_weight`` for who has just asked whether ``inner`` are the model's modules."""
        return self._stamps.written() or torch.ops.pop.stale_weight(self.handle) or None


def check_options(fp8: bool, prepack: bool) -> None:
    """Raises TypeError unless both are bools, ValueError where both are True."""
    for name, value in {"fp8": fp8, "prepack": prepack}.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    if fp8 and prepack:
        raise ValueError("prepack: expected False with fp8=True, whose products read other weights, got True")


def check_possible(option: str, description: Description) -> None:
    """Raises UnsupportedModelError unless such a model can be loaded with "fp8" or "prepack"."""
    missing = getattr(torch.ops.pop, f"{option}_missing")(description.spec.to_json(), description.weights[0].tensor)
    if missing:
        raise UnsupportedModelError(f"{option}: {missing}; without {option} the model runs natively")
