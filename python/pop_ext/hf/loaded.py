"""Load weights into the native runtime, and notice when the model no longer has these weights."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from pop_ext.hf.architectures import UnsupportedModelError
from pop_ext.hf.decision import Products
from pop_ext.hf.patches import InnerModules
from pop_ext.hf.weight_map import Description, WeightRef
from pop_ext.plans.plan import Plan
from pop_ext.utils.forks import check_threads


class LoadedWeights:
    """Weights that one ``pop::load`` has loaded, and the state of the model at that time.

    The runtime frees them when the last reference to this object is gone. A running call holds one.

    Attributes:
        handle: for the operators of ``torch.ops.pop``.
        description: spec of the model and places of its weights.
        inner: the modules that the native loop replaces, as they were at the load.
        like: one of the weights, for their dtype and device.
        family, spec, dtype, device: of the model, as plain attributes, since a call reads them often.
        config: config of the model.
        extra_bytes: size of the folded and copied weights.
    """

    def __init__(
        self, model: nn.Module, description: Description, plan: Plan, products: Products | None, prepack: bool
    ) -> None:
        weights = [ref.tensor for ref in description.weights]
        fitted = None if plan.projections is None else plan.projections.stack_rows(weights[0])
        if weights[0].device.type == "cpu":
            check_threads()
        texts = description.spec.to_json(), plan.to_json()
        try:
            with torch.no_grad():
                self.handle = torch.ops.pop.load(
                    *texts, weights, fitted, products == "fp8", prepack, products == "int8"
                )
        except RuntimeError:
            if products is not None:
                check_option_supported(products, description)
            if prepack:
                check_option_supported("prepack", description)
            raise
        weakref.finalize(self, _unload, self.handle)
        self.description = description
        self.family, self.spec = description.family, description.spec
        self.dtype, self.device = weights[0].dtype, weights[0].device
        self.config: Any = model.config
        self.inner = InnerModules(model)
        self.like = weights[0].detach()
        self.extra_bytes: int = torch.ops.pop.extra_bytes(self.handle)
        self._stamps = WeightStamps(description.weights)

    def stale_weight(self) -> str | None:
        """Return the name of a weight that was replaced or overwritten since the load, or None."""
        model = self.description.model()
        in_place = model is not None and self.inner.matches(model)
        return (None if in_place else self._stamps.replaced_parameter()) or self.overwritten_weight()

    def overwritten_weight(self) -> str | None:
        """Like ``stale_weight``, but the caller knows that no parameter was replaced: ``inner`` matches the model."""
        overwritten = self._stamps.overwritten_parameter()
        if overwritten is not None:
            return overwritten
        index = torch.ops.pop.stale_index(self.handle)
        return None if index < 0 else self.description.weights[index].slot


def _unload(handle: int) -> None:
    """Free what ``pop::load`` made; not as a part of what torch.export or another mode records at that moment."""
    with _disable_current_modes():
        torch.ops.pop.unload(handle)


class WeightStamps:
    """Notice parameters that were replaced or overwritten since they were loaded, as far as Python can tell.

    Args:
        refs: the loaded weights.
    """

    def __init__(self, refs: list[WeightRef]) -> None:
        self._refs = refs
        self._tensors: list[Any] = [ref.find() for ref in refs]
        self._versions = self._current_versions()
        self._fused = [(ref, tensor) for ref, tensor in zip(refs, self._tensors, strict=True) if ref.rows is not None]
        self._layouts = self._current_layouts()

    def _current_versions(self) -> list[int]:
        return [-1 if tensor.is_inference() else tensor._version for tensor in self._tensors]

    def _current_layouts(self) -> list[tuple[object, ...]]:
        # Needed for fused parameters only: the runtime compares the layouts of the tensors that it reads, and of these
        # it reads views, which do not follow the parameter. An assignment to .data can change the layout without the
        # version counter. A transposed square matrix even keeps its address.
        return [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for _, tensor in self._fused]

    def replaced_parameter(self) -> str | None:
        """Return the slot of a parameter that is no longer at its path in the model, or None."""
        for ref, tensor in zip(self._refs, self._tensors, strict=True):
            if ref.find() is not tensor:
                return ref.slot
        return None

    def overwritten_parameter(self) -> str | None:
        """Return the slot of a parameter whose version counter or, if fused, layout has changed, or None."""
        versions, layouts = self._current_versions(), self._current_layouts()
        if versions != self._versions:
            return self._refs[_first_difference(versions, self._versions)].slot
        return None if layouts == self._layouts else self._fused[_first_difference(layouts, self._layouts)][0].slot


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the index of the first unequal pair of items."""
    return next(index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)


def check_options(fp8: bool, int8: bool, prepack: bool) -> Products | None:
    """Check the options of ``pop_ext.load`` and ``pop_ext.enable``.

    Returns:
        "fp8" or "int8" for 8-bit products, or None.

    Raises:
        TypeError: One of them is no bool.
        ValueError: More than one is True.
    """
    for name, value in {"fp8": fp8, "int8": int8, "prepack": prepack}.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    if fp8 and int8:
        raise ValueError("int8: expected False with fp8=True (a product has one type of operands), got True")
    products: Products | None = "fp8" if fp8 else "int8" if int8 else None
    if products is not None and prepack:
        raise ValueError(
            f"prepack: expected False with {products}=True ({products} products do not read prepacked weights), "
            "got True"
        )
    return products


def check_option_supported(option: str, description: Description) -> None:
    """Raise UnsupportedModelError if a model cannot be loaded with an option.

    Args:
        option: "fp8", "int8" or "prepack".
        description: of the model.
    """
    of_model = description.spec.to_json(), description.weights[0].tensor
    if option == "prepack":
        missing = torch.ops.pop.prepack_missing(*of_model)
    else:
        missing = torch.ops.pop.products_missing(option, *of_model)
    if missing:
        raise UnsupportedModelError(f"{option}: {missing}; without {option} the model runs natively")
