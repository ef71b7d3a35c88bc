"""The reference of prefills with fp8, in plain torch: the stock modules with operands rounded to e4m3."""

from __future__ import annotations

import copy
from typing import Any

import torch
from pop_ext import Plan
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = 448.0


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of x in e4m3, and their scales, float32 ``[..., 1]``."""
    largest = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    factor = torch.full_like(largest, LARGEST) / largest  # dividing a number would make torch multiply by a reciprocal
    return (x.float() * factor).to(torch.float8_e4m3fn), largest * (1 / LARGEST)


def rounded(x: Tensor) -> Tensor:
    """Return x after rounding to e4m3, in float32."""
    values, scale = quantized(x)
    return values.float() * scale


class RoundedLinear(nn.Module):
    """A Linear whose weight and input are rounded to e4m3 row by row, computed in float32.

    With `noise`, elements of the input are first changed by about this relative amount.
    """

    def __init__(self, linear: nn.Linear, noise: float) -> None:
        super().__init__()
        self.linear, self.noise = linear, noise

    def forward(self, x: Tensor) -> Tensor:
        if self.noise:
            x = x * (1 + self.noise * torch.randn_like(x))
        bias = None if self.linear.bias is None else self.linear.bias.float()
        return F.linear(rounded(x), rounded(self.linear.weight), bias).to(x.dtype)


def rounded_twin(model: Any, plan: Plan, noise: float = 0.0) -> Any:
    """Return a copy whose layers round as the native prefill does: all layers that context rows pass through."""
    twin = copy.deepcopy(model)
    for index, layer in enumerate(twin.model.layers):
        if index in plan.omit or index == plan.num_layers - 1:
            continue
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                parent = layer.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], RoundedLinear(module, noise))
    return twin
