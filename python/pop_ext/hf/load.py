"""``load``: load a model for native prefill, and try it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pop_ext.hf.architectures import UnsupportedModelError
from pop_ext.hf.compat import is_causal, uncompiled
from pop_ext.hf.free_weights import check_free_weights, keep_integers_alone
from pop_ext.hf.int8_weights import unpack_weights
from pop_ext.hf.loaded import check_options
from pop_ext.hf.native_model import NativeModel
from pop_ext.hf.native_trial import try_native
from pop_ext.hf.prefill_graphs import check_shapes
from pop_ext.plans.default import PlanArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    model: PreTrainedModel,
    plan: PlanArgument = None,
    fp8: bool = False,
    prepack: bool = False,
    int8: bool = False,
    cuda_graphs: int = 0,
    free_weights: bool = False,
) -> NativeModel:
    """Load a Hugging Face model for native prefill. The model itself is not changed, but for ``free_weights``.

    Packed weights of compressed-tensors become floats, as in the first call of such a model.

    Args:
        model: causal language model of a supported family, on one device. Of a model compiled by ``torch.compile`` the
            model inside is loaded.
        plan: layers to omit: a plan, "third", "preset", a path, or None for the default, as in ``pop_ext.enable``.
        fp8: compute the products of retained layers in 8-bit floats (e4m3). This copies their matrices at half their
            size, and results differ slightly from the stock model's. Decode is unchanged.
        prepack: copy the matrices of retained layers into the layout of the CPU's product library, at their full size,
            for faster products in bfloat16 on a processor with AVX-512 BF16. Excludes ``fp8`` and ``int8``.
        int8: compute q, o, gate, up and down of retained layers in 8-bit integers, on a CPU. This copies these matrices
            at one byte an element, and results differ slightly from the stock model's. Decode is unchanged. Excludes
            ``fp8``.
        cuda_graphs: run prefills of prompts without a past as CUDA graphs, recorded when a shape first comes, and keep
            as many, those used last. A shape is the number of tokens of each sequence with boundary, rows of logits and
            padding. A replay leaves no gaps between kernels. It costs a copy of K and V into the cache, and memory:
            each graph keeps the workspace of a call, and K and V of its prompts. The first call of a shape runs twice,
            waits for the device and empties torch's cache of free memory, and later ones keep its options of
            ``torch.ops.pop.tune``. Calls with a past or images run without a graph. The results are the same. A model
            that is loaded again keeps the option; one that has left CUDA runs without graphs until it is back. This
            has not run on a GPU.
        free_weights: with ``int8``, keep its matrices in integers alone: the linear layers of the model are replaced by
            ``Int8Linear``, also for the stock forward, decode among it, which then multiplies by the rounded matrices
            and rounds nothing else. They take half of the memory of bfloat16, no copy is made but of q where one
            matrix holds q, k and v, and decode reads half of the bytes. There is no way back.

    Returns:
        A ``NativeModel``, which refers to the weights of ``model``.

    Raises:
        UnsupportedModelError: The architecture or its weights have no native form, or none with ``fp8``, ``int8``,
            ``prepack`` or ``cuda_graphs`` (of which the last wants a CUDA device and no experts), or a trial of a few
            tokens, once for a kind of model in a process, differs from the stock modules. A subclass of ValueError.
        ValueError, TypeError: The plan is for another depth or another model, ``plan`` or ``model`` is of the wrong
            type, more than one of ``fp8``, ``int8`` and ``prepack`` is set, ``free_weights`` without ``int8``, or
            ``cuda_graphs`` is no int or negative.
    """
    products = check_options(fp8, int8, prepack)
    check_shapes(cuda_graphs)
    check_free_weights(free_weights, products, cuda_graphs)
    unpack_weights(uncompiled(model))
    if free_weights:
        keep_integers_alone(uncompiled(model), plan)
    native = NativeModel(uncompiled(model), plan, products, prepack, cuda_graphs)
    native.check_graphs_supported()
    if not is_causal(native.config.get_text_config()):
        raise UnsupportedModelError("config.is_causal: expected a causal model, got False")
    try_native(native)
    return native
