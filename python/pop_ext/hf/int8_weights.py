"""Find the integers of quantised checkpoints.

The native runtime reads matrices in int8 with one scale for each row (output channel), or for each 32, 64, 128 or 256
elements of a row:

- torchao, ``Int8WeightOnlyConfig`` and ``Int8DynamicActivationInt8WeightConfig``: ``weight.qdata``, ``weight.scale``,
  in place;
- compressed-tensors, symmetric 8-bit integers by channel, tensor or group: ``weight``, ``weight_scale``. The first call
  of a model replaces ``weight`` by its product with the scale, from which the integers are computed back, exactly;
- GGUF, Q8_0: transformers turns blocks into floats. Of float32 the blocks are computed back, exactly;
- `Int8Linear`: ``weight``, ``scale``, in place.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pop_ext.hf.int8_linear import FLOATS, Int8Linear, Int8Weight, spread_scale
from pop_ext.hf.modules import is_compressed, is_torchao_int8

_GROUPS = (32, 64, 128, 256)
_Q8_0 = 32
"""Elements of a block."""


def int8_weight(module: nn.Module) -> Int8Weight | None:
    """Return the integers of a linear module that the runtime can read; None for any other module."""
    if type(module) is Int8Linear:
        return Int8Weight(module.weight, module.scale)
    if type(module) is not nn.Linear:
        return None
    if is_torchao_int8(module.weight):
        return _from_torchao(module.weight)
    return _from_compressed_tensors(module) if is_compressed(module) else None


def is_integer_linear(module: nn.Module) -> bool:
    """Return whether a module is of one of the forms that hold integers, without reading its weights."""
    if type(module) is not nn.Linear:
        return type(module) is Int8Linear
    return is_torchao_int8(module._parameters.get("weight")) or is_compressed(module)


def tensors_of(module: nn.Module) -> tuple[Tensor, ...]:
    """Return the tensors that hold the matrix of a module with integers, to notice that one was changed."""
    own: dict[str, Any] = {**module._parameters, **module._buffers}
    weight: Any = own.get("weight")
    parts = [weight.qdata, weight.scale, weight.zero_point] if is_torchao_int8(weight) else []
    return tuple(one for one in (*own.values(), *parts) if one is not None)


def _from_torchao(weight: Any) -> Int8Weight | None:
    values, zero, rounding = weight.qdata, weight.zero_point, weight.act_quant_kwargs
    scale = _read_scale(weight.scale, values) if values.dtype == torch.int8 and values.ndim == 2 else None
    symmetric = zero is None or not bool(zero.any())
    if scale is None or not symmetric or weight.act_pre_scale is not None or weight.block_size[0] != 1:
        return None
    if rounding is not None:
        dynamic = weight.act_quant_scale is None and type(rounding.granularity).__name__ == "PerRow"
        if not dynamic or rounding.mapping_type.name != "SYMMETRIC":
            return None
    return Int8Weight(values, scale)


def is_known_scheme(module: nn.Module) -> bool:
    """Return whether the runtime can compute what a scheme of compressed-tensors says."""
    scheme: Any = module.quantization_scheme
    rounded = scheme.input_activations
    return (
        _is_int8(scheme.weights, ("channel", "tensor", "group"))
        and scheme.output_activations is None
        and (rounded is None or (_is_int8(rounded, ("token",)) and rounded.dynamic is True))
    )


def _from_compressed_tensors(module: nn.Module) -> Int8Weight | None:
    own = module._parameters
    weight, scale, zero = own.get("weight"), own.get("weight_scale"), own.get("weight_zero_point")
    if weight is None or scale is None or "weight_g_idx" in own or not is_known_scheme(module):
        return None  # with an index, groups are not adjacent
    read = _read_scale(scale.detach(), weight)
    if read is None or (zero is not None and bool(zero.any())):
        return None
    values = _integers_of(weight.detach(), read, scale.dtype)
    return None if values is None else Int8Weight(values, read, copied=True)


def _is_int8(scheme: Any, strategies: tuple[str, ...]) -> bool:
    """Return whether one part of a scheme of compressed-tensors says symmetric int8 by one of these strategies."""
    strategy, kind = getattr(scheme, "strategy", None), getattr(scheme, "type", None)
    return (
        scheme is not None
        and scheme.num_bits == 8
        and scheme.symmetric
        and getattr(kind, "value", kind) == "int"
        and getattr(strategy, "value", strategy) in strategies
    )


def _integers_of(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the int8 values whose products with ``scale``, computed in ``dtype``, are ``weight``; None without."""
    if weight.dtype not in FLOATS or weight.is_meta:
        return None
    spread = spread_scale(scale, weight.shape[1])
    values = (weight.float() / spread).round()
    fit = bool((values >= -128).all()) and bool((values <= 127).all())
    exact = fit and torch.equal((values.to(dtype) * spread.to(dtype)).to(weight), weight)
    return values.to(torch.int8) if exact else None


def q8_0_blocks(weight: Tensor) -> Int8Weight | None:
    """Return the blocks of a GGUF matrix in Q8_0 that was turned into float32; None for any other matrix.

    A block of 32 elements has one float16 scale d, and its largest integer is 127 or -127, so that d is exact here.
    """
    rows, width = weight.shape
    if weight.dtype != torch.float32 or weight.is_meta or width % _Q8_0 != 0:
        return None
    scale = weight.reshape(rows, -1, _Q8_0).abs().amax(-1) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    values = _integers_of(weight, scale, torch.float32)
    return None if values is None else Int8Weight(values, scale, copied=True)


def _read_scale(scale: Tensor, weight: Tensor) -> Tensor | None:
    """Return scales as float32 ``[out_features]``, or ``[out_features, groups]`` of a size that kernels take."""
    rows, width = weight.shape
    if scale.numel() in (1, rows):
        return scale.detach().float().reshape(-1).expand(rows).contiguous()
    if scale.ndim != 2 or len(scale) != rows or width % scale.shape[1] or width // scale.shape[1] not in _GROUPS:
        return None
    return scale.detach().float().contiguous()


def unpack_weights(model: Any) -> None:
    """Do now what compressed-tensors would do in the model's first call: replace its packed weights by floats."""
    handle = getattr(model, "ct_decompress_hook", None)
    hook = model._forward_pre_hooks.get(getattr(handle, "id", None)) if handle is not None else None
    if hook is not None:
        hook(model, ())


def is_quantised_forward(module: nn.Module, forward: Any) -> bool:
    """Return whether a ``forward`` on an instance is what compressed-tensors puts around the one of its class.

    It rounds the input row by row, if at all, so parts of a batch may pass it by themselves.
    """
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return False
    function: Any = forward.__func__
    while hasattr(function, "__wrapped__") and function is not type(module).forward:
        if not function.__globals__.get("__name__", "").startswith("compressed_tensors."):
            return False
        function = function.__wrapped__
    return function is type(module).forward
