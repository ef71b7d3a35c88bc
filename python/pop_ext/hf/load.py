"""``load``: load a model for native prefill, and try it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pop_ext.hf.architectures import UnsupportedModelError
from pop_ext.hf.compat import is_causal, uncompiled
from pop_ext.hf.loaded import check_options
from pop_ext.hf.native_model import NativeModel
from pop_ext.hf.native_trial import try_native
from pop_ext.plans.default import PlanArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    model: PreTrainedModel, plan: PlanArgument = None, fp8: bool = False, prepack: bool = False, int8: bool = False
) -> NativeModel:
    """Load a Hugging Face model for native prefill. The model itself is not changed.

    Args:
        model: causal language model of a supported family, on one device. Of a model compiled by ``torch.compile`` the
            model inside is loaded.
        plan: layers to omit: a plan, "third", "preset", a path, or None for the default, as in ``pop_ext.enable``.
        fp8: compute the products of retained layers in 8-bit floats (e4m3). This copies their matrices at half their
            size, and results differ slightly from the stock model's. Decode is unchanged.
        prepack: copy the matrices of retained layers into the layout of the CPU's product library, at their full size,
            for faster products in bfloat16 on a processor with AVX-512 BF16. Excludes ``fp8`` and ``int8``.
        int8: compute o, gate, up and down of retained layers in 8-bit integers, on a CPU. This copies these matrices at
            one byte an element, and results differ slightly from the stock model's. Decode is unchanged. Excludes
            ``fp8``.

    Returns:
        A ``NativeModel``, which refers to the weights of ``model``.

    Raises:
        UnsupportedModelError: The architecture or its weights have no native form, or none with ``fp8``,
            ``int8`` or ``prepack``, or a trial of a few tokens, once for a kind of model in a process, differs from
            the stock modules. A subclass of ValueError.
        ValueError, TypeError: The plan is for another depth or another model, ``plan`` or ``model`` is of the wrong
            type, or more than one of ``fp8``, ``int8`` and ``prepack`` is set.
    """
    products = check_options(fp8, int8, prepack)
    native = NativeModel(uncompiled(model), plan, products, prepack)
    if not is_causal(native.config.get_text_config()):
        raise UnsupportedModelError("config.is_causal: expected a causal model, got False")
    try_native(native)
    return native
