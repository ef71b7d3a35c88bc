"""Load weights into the native runtime, and notice when the model no longer has these weights."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from pop_ext.hf.architectures import UnsupportedModelError, decoder_of
from pop_ext.hf.decision import Products
from pop_ext.hf.int8_linear import Int8Weight
from pop_ext.hf.int8_weights import int8_weight, is_integer_linear, q8_0_blocks, tensors_of
from pop_ext.hf.modules import rounds_inputs
from pop_ext.hf.patches import InnerModules
from pop_ext.hf.weight_map import Description, WeightRef, quantization_method
from pop_ext.plans.plan import Plan
from pop_ext.utils.forks import check_threads

ROUNDED = (".q_proj", ".o_proj", ".gate_proj", ".up_proj", ".down_proj")
"""Ends of the slots that ``int8`` rounds (``is_copied`` in cpp/torch/copied_matrices.h)."""


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
        check_integers(model, description, products, prepack)
        description = choose_integers(model, description, plan, products)
        weights = [ref.tensor for ref in description.weights]
        fitted = None if plan.projections is None else plan.projections.stack_rows(weights[0])
        if weights[0].device.type == "cpu":
            check_threads()
        scales = [ref.scale for ref in description.weights]
        texts = description.spec.to_json(), plan.to_json()
        options = products == "fp8", prepack, products == "int8"
        quantised = any(ref.int8 is not None for ref in description.weights)
        try:
            with torch.no_grad():
                self.handle = torch.ops.pop.load(*texts, weights, fitted, *options, scales if quantised else None)
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
        integers = {(ref.path, ref.rows): ref.int8.copied_bytes for ref in description.weights if ref.int8 is not None}
        self.extra_bytes: int = torch.ops.pop.extra_bytes(self.handle) + sum(integers.values())
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
        self._fused = [(ref, _parameter_memory(ref)) for ref in refs if ref.rows is not None]
        quantised = (ref for ref in refs if ref.module is not None and is_integer_linear(ref.module))
        self._integers = [(ref, *_stamps_of(ref.module)) for ref in quantised]
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
        for ref, tensors, stamps in self._integers:
            current, now = _stamps_of(ref.module)
            if now != stamps or any(a is not b for a, b in zip(current, tensors, strict=True)):
                return ref.slot
        versions, layouts = self._current_versions(), self._current_layouts()
        if versions != self._versions:
            return self._refs[_first_difference(versions, self._versions)].slot
        return None if layouts == self._layouts else self._fused[_first_difference(layouts, self._layouts)][0].slot


def _stamps_of(module: nn.Module | None) -> tuple[tuple[torch.Tensor, ...], list[int]]:
    """Return the tensors of a module with integers, and their version counters."""
    tensors = () if module is None else tensors_of(module)
    return tensors, [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def _parameter_memory(ref: WeightRef) -> torch.Tensor:
    """Return the tensor whose layout tells whether a parameter was assigned other memory."""
    copied = ref.int8 is not None and ref.int8.copied
    return replace(ref, int8=None).whole if copied else ref.whole


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the index of the first unequal pair of items."""
    return next(index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)


def check_integers(model: Any, description: Description, products: Products | None, prepack: bool) -> None:
    """Raise UnsupportedModelError if a checkpoint with integers cannot be loaded with these options."""
    if products != "int8" and rounds_inputs(decoder_of(model).layers):
        raise UnsupportedModelError(
            "model: expected int8=True for a checkpoint whose linear layers round their inputs to int8, got "
            f"{f'{products}=True' if products else 'int8=False'}"
        )
    slot = next((ref.slot for ref in description.weights if ref.int8 is not None), None)
    if slot is None:
        return
    if description.spec.num_experts > 0:
        raise UnsupportedModelError(f"weight {slot}: expected no integers in a model with experts, got int8")
    if description.weights[0].tensor.device.type != "cpu":
        raise UnsupportedModelError(f"weight {slot}: expected integers on a CPU alone, got int8 on another device")
    if products == "fp8" or prepack:
        raise UnsupportedModelError(
            f"{products or 'prepack'}: expected weights in the model's dtype, got int8 in {slot}; without "
            f"{products or 'prepack'} the model runs natively"
        )


def check_runs_without_int8(model: Any) -> None:
    """Raise UnsupportedModelError for a checkpoint whose prefills cannot be compared with the same without int8."""
    if rounds_inputs(decoder_of(model).layers):
        raise UnsupportedModelError(
            "int8: expected a model that runs natively without it, to compare both, got a checkpoint whose linear "
            "layers round their inputs to int8"
        )


def choose_integers(model: Any, description: Description, plan: Plan, products: Products | None) -> Description:
    """Return the description with the integers that ``int8`` reads and that are computed back from floats.

    Matrices that are not rounded are read from the floats.
    """
    gguf = quantization_method(model) == "gguf"
    projected = {layer for run in plan.projected_runs for layer in run}
    path: tuple[str, ...] = ()
    found: Int8Weight | None = None  # at the path; the weights of a fused matrix follow each other
    weights = []
    for (slot, layer, _), ref in zip(description.spec.weight_slots(), description.weights, strict=True):
        rounded = products == "int8" and slot.endswith(ROUNDED) and layer not in projected
        if ref.int8 is None and rounded:
            if ref.path != path:
                path, found = ref.path, int8_weight(ref.module) if ref.module is not None else None
                if found is None and gguf:
                    found = q8_0_blocks(ref.whole.detach())
            if found is None or not found.copied or ref.rows is None:
                ref = replace(ref, int8=found)
            else:
                ref = replace(ref, int8=found.copy_of_rows(*ref.rows))
        weights.append(ref)
    return replace(description, weights=weights)


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
