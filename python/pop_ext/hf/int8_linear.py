"""`Int8Linear`: a linear layer that holds its matrix in integers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the inputs that kernels for integers take."""


@dataclass(frozen=True)
class Int8Weight:
    """A matrix in integers with their scales.

    Attributes:
        values: ``[out_features, in_features]`` int8.
        scale: float32 ``[out_features]``, or ``[out_features, in_features / n]`` for groups of n elements of a row.
        copied: whether the integers are a copy, and not those of the module.
    """

    values: Tensor
    scale: Tensor
    copied: bool = False

    @property
    def copied_bytes(self) -> int:
        """Bytes that the runtime holds beside the module."""
        return self.values.nbytes + self.scale.nbytes if self.copied else 0

    @classmethod
    def rounded(cls, weight: Tensor, group: int = 0) -> Int8Weight:
        """Round a matrix ``[out_features, in_features]`` of floats as ``int8=True`` does.

        Args:
            weight: the matrix, on a CPU.
            group: elements with a scale of their own; 0: a row has one.
        """
        rows = weight if group == 0 else weight.reshape(len(weight), -1, group)
        values, scale = torch.ops.pop.quantize_rows(rows, "int8")
        return cls(values.view(weight.shape), scale)

    def copy_of_rows(self, first: int, end: int) -> Int8Weight:
        """Return a copy of the rows from ``first`` to ``end``."""
        return Int8Weight(self.values[first:end].clone(), self.scale[first:end].clone(), copied=True)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix as floats ``[out_features, in_features]``."""
        return (self.values.float() * spread_scale(self.scale, self.values.shape[1])).to(dtype)


def spread_scale(scale: Tensor, width: int) -> Tensor:
    """Return the scale of each element of the rows, ``[out_features, width]``, or ``[out_features, 1]`` if all are one.

    Args:
        scale: ``[out_features]`` or ``[out_features, groups]``.
        width: elements of a row.
    """
    return scale[:, None] if scale.ndim == 1 else scale.repeat_interleave(width // scale.shape[1], 1)


class Int8Linear(nn.Module):
    """A linear layer on a CPU whose matrix is int8. It computes with its input as it is.

    A state dict holds the matrix as floats, under the name and in the dtype that it had before, and so does what
    ``save_pretrained`` writes. ``load_state_dict`` rounds floats to integers. Both refuse a layer whose integers are
    those of a quantised checkpoint, since floats in its place would not load as that checkpoint.

    Attributes:
        weight: ``[out_features, in_features]`` int8, a buffer.
        scale: float32 ``[out_features]``, or a scale for each group of elements (`Int8Weight`), a buffer.
        bias: ``[out_features]``, or None.
        dtype: of the matrix in a state dict, which follows conversions of the module; None: the integers are those of a
            quantised checkpoint.
    """

    weight: Tensor
    scale: Tensor

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = bias
        self.dtype = dtype

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        """Move and convert like any module, but keep scales in float32."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        if self.dtype is not None:
            self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.dtype is None:
            raise RuntimeError(f"{prefix}weight: expected a matrix that was rounded by free_weights, got {_FOREIGN}")
        destination[prefix + "weight"] = Int8Weight(self.weight, self.scale).dense(self.dtype)
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name, scale_name = prefix + "weight", prefix + "scale"
        given = {**state_dict, scale_name: self.scale}
        weight = state_dict.get(name)
        if strict and scale_name in state_dict:
            unexpected_keys.append(scale_name)
        if weight is not None and weight.shape == self.weight.shape:  # else the call below says what is wrong
            wrong = _FOREIGN if self.dtype is None else _not_floats(weight)
            if wrong is not None:
                error_msgs.append(f"{name}: expected floats for a matrix that was rounded by free_weights, got {wrong}")
                given[name] = self.weight
            else:
                group = 0 if self.scale.ndim == 1 else self.in_features // self.scale.shape[1]
                floats = weight.detach().to(self.weight.device)
                rounded = Int8Weight.rounded(floats if floats.dtype in FLOATS else floats.float(), group)
                given[name], given[scale_name] = rounded.values, rounded.scale
                if local_metadata.get("assign_to_params_buffers", False):
                    self.dtype = weight.dtype
        super()._load_from_state_dict(given, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in FLOATS or (x.requires_grad and torch.is_grad_enabled()):  # not for the operator
            return F.linear(x, Int8Weight(self.weight, self.scale).dense(x.dtype), self.bias)
        out: Tensor = torch.ops.pop.int8_linear(x, self.weight, self.scale, False)
        return out if self.bias is None else out + self.bias


def _not_floats(weight: Tensor) -> str | None:
    """Return what a tensor is that cannot be rounded to integers, or None."""
    if weight.is_meta:
        return "a tensor without values, on the meta device"
    return None if weight.dtype.is_floating_point else str(weight.dtype)


_FOREIGN = "the integers of a quantised checkpoint, which free_weights neither writes nor replaces"
