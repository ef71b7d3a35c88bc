"""``free_weights``: keep the matrices that ``int8`` rounds in integers alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from pop_ext.hf.architectures import UnsupportedModelError
from pop_ext.hf.decision import Products
from pop_ext.hf.int8_linear import Int8Linear, Int8Weight
from pop_ext.hf.int8_weights import int8_weight, q8_0_blocks
from pop_ext.hf.loaded import ROUNDED, check_option_supported
from pop_ext.hf.modules import rounds_inputs
from pop_ext.hf.native_model import NativeModel
from pop_ext.hf.native_trial import try_native
from pop_ext.hf.patches import find_module_patch
from pop_ext.hf.weight_map import quantization_method
from pop_ext.plans.default import PlanArgument


def check_free_weights(value: Any, products: Products | None, cuda_graphs: int) -> None:
    """Check the option of ``enable`` and ``load``.

    Raises:
        TypeError: It is no bool.
        ValueError: It is True without ``int8``, or with ``cuda_graphs``.
    """
    if not isinstance(value, bool):
        raise TypeError(f"free_weights: expected a bool, got {type(value).__name__}")
    if value and products != "int8":
        raise ValueError("free_weights: expected False without int8=True (there are no integers to keep), got True")
    if value and cuda_graphs > 0:
        raise ValueError("free_weights: expected False with cuda_graphs (int8 runs on a CPU), got True")


def keep_integers_alone(model: Any, plan: PlanArgument) -> None:
    """Replace the linear layers that ``int8`` rounds by `Int8Linear`, one at a time, so that their matrices are freed.

    These are q, o, gate, up and down of the layers that context rows pass through under ``plan``, but for a matrix that
    holds q, k and v. The integers of a quantised checkpoint are taken over; its layers then round no inputs. There is
    no way back.

    Raises:
        UnsupportedModelError: The model has no native form, or none with ``int8``, or one of the layers has a hook or
            another forward. It is unchanged.
    """
    # Copies in integers are made only for a checkpoint that loads in no other way.
    native = NativeModel(model, plan, "int8" if rounds_inputs(model) else None)
    check_option_supported("int8", native.description)
    try_native(native)
    projected = {layer for run in native.plan.projected_runs for layer in run}
    paths: dict[tuple[str, ...], bool] = {}  # of each linear layer: whether all of its slots are rounded
    weights = [ref.path for ref in native.description.weights]
    for (slot, layer, _), path in zip(native.spec.weight_slots(), weights, strict=True):
        if path[-1] == "weight":
            rounded = slot.endswith(ROUNDED) and layer not in projected
            paths[path[:-1]] = paths.get(path[:-1], True) and rounded
    del native
    paths = {path: rounded for path, rounded in paths.items() if rounded}
    linears = {path: model.get_submodule(".".join(path)) for path in paths}
    for path, linear in linears.items():
        patch = find_module_patch(linear)
        if patch is not None:
            raise UnsupportedModelError(f"free_weights: expected plain linear layers, got {patch} on {'.'.join(path)}")
    gguf = quantization_method(model) == "gguf"
    made: dict[int, Int8Linear] = {}  # a module may be in several places
    for path in paths:
        linear = linears.pop(path)
        if isinstance(linear, nn.Linear):
            if id(linear) not in made:
                made[id(linear)] = int8_linear_of(linear, gguf)
            model.get_submodule(".".join(path[:-1]))._modules[path[-1]] = made[id(linear)]
        del linear


def int8_linear_of(linear: nn.Linear, gguf: bool = False) -> Int8Linear:
    """Take over the integers of a layer, or round the matrix of a plain one as ``int8=True`` does.

    With ``gguf``, blocks of Q8_0 that were turned into floats are integers, too.
    """
    weight = int8_weight(linear)
    dtype = linear.weight.dtype if weight is None else None
    if weight is None:
        floats = linear.weight.detach()
        weight = (q8_0_blocks(floats) if gguf else None) or Int8Weight.rounded(floats)
    return Int8Linear(weight.values, weight.scale, linear.bias, dtype).train(linear.training)
