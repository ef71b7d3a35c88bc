"""The reference of prefills with fp8 and int8, in plain torch: the stock modules with operands rounded to 8 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from pop_ext import Plan
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = {"fp8": 448.0, "int8": 127.0}
INT8_LEAVES = (".k_proj", ".v_proj")
"""What int8 leaves in the model's dtype, as it does the rows of k and v in a qkv_proj."""


def quantized(x: Tensor, products: str = "fp8") -> tuple[Tensor, Tensor]:
    """Return the rows of finite x in e4m3 or int8, and their scales, float32 ``[..., 1]``."""
    largest = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    # Dividing a number, not a tensor, would make torch multiply by a reciprocal.
    most = torch.full_like(largest, LARGEST[products])
    scaled = x.float() * (most / largest)
    if products == "int8":
        return scaled.round().to(torch.int8), largest / most
    return scaled.to(torch.float8_e4m3fn), largest * (1 / LARGEST["fp8"])


def rounded(x: Tensor, products: str = "fp8") -> Tensor:
    """Return x after rounding to 8 bits, in float32."""
    values, scale = quantized(x, products)
    return values.float() * scale


class RoundedLinear(nn.Module):
    """A Linear whose weight and input are rounded to 8 bits row by row, computed in float32.

    With `noise`, elements of the input are first changed by about this relative amount.
    """

    def __init__(self, linear: nn.Linear, products: str, noise: float) -> None:
        super().__init__()
        self.linear, self.products, self.noise = linear, products, noise

    def forward(self, x: Tensor) -> Tensor:
        if self.noise:
            x = x * (1 + self.noise * torch.randn_like(x))
        bias = None if self.linear.bias is None else self.linear.bias.float()
        product = F.linear(rounded(x, self.products), rounded(self.linear.weight, self.products), bias)
        return product.to(x.dtype)


def rounded_twin(model: Any, plan: Plan, products: str = "fp8", noise: float = 0.0) -> Any:
    """Return a copy whose layers round as the native prefill does: all layers that context rows pass through."""
    twin = copy.deepcopy(model)
    for index, layer in enumerate(twin.model.layers):
        if index in plan.omit or index == plan.num_layers - 1:
            continue
        replace_rounded(layer, lambda linear: RoundedLinear(linear, products, noise), twin.config, products)
    return twin


def replace_rounded(layer: nn.Module, make: Callable[[nn.Linear], nn.Module], config: Any, products: str) -> None:
    """Replace each Linear of a layer whose products are in 8 bits by ``make(linear)``; of a qkv_proj its rows of q."""
    for name, module in list(layer.named_modules()):
        if not isinstance(module, nn.Linear) or (products == "int8" and name.endswith(INT8_LEAVES)):
            continue
        made = make(module)
        if products == "int8" and name.endswith("qkv_proj"):
            made = FirstRows(made, module, q_rows(config))
        parent, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(parent), leaf, made)


def q_rows(config: Any) -> int:
    """Return the number of rows of q in a qkv_proj."""
    return config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)


class FirstRows(nn.Module):
    """Two forms of a Linear: the first rows of its result come from one, the others from the other."""

    def __init__(self, one: nn.Module, other: nn.Module, rows: int) -> None:
        super().__init__()
        self.one, self.other, self.rows = one, other, rows

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x)[..., : self.rows], self.other(x)[..., self.rows :]], dim=-1)
