"""Measure the machine's peaks in this run, matrix products and memory bandwidth; shares are relative to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pop_ext import _core

from bench.measure import KernelClock, Summary, Timed, interleave

_SQUARE = {"cpu": 2048, "cuda": 8192}
_ROWS_AT_ONCE = {"fp8": 2048, "int8": 512}  # of the MLP's products in 8 bits, as a prefill computes them
_LIBRARY_INT8 = ("avx512_vnni", "amx")  # sets with which torch's product of integers is more than a plain loop


@dataclass(kw_only=True)
class Gemm(Timed):
    """``[m, k] x [n, k]^T`` in a model's dtype: ``2 m n k`` FLOPs."""

    m: int
    n: int
    k: int

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k

    @property
    def rate(self) -> float | None:
        """FLOP/s of the median sample."""
        return self.flops / Summary.of(self.samples).median if self.samples else None


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Prepare = Callable[[torch.Tensor, torch.Tensor], Callable[[], object]]  # what is done once with the operands


def own_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute ``x . weight^T`` as a native prefill does; the stock model calls ``F.linear``."""
    return torch.ops.pop.linear(x, weight)


def make_gemm(
    name: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, product: Product = F.linear
) -> Gemm:
    """Return a product of random operands; it is marked as failed if they cannot be allocated."""
    return _prepared_gemm(name, m, n, k, dtype, device, lambda x, w: lambda: product(x, w))


def _prepared_gemm(
    name: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, prepare: Prepare
) -> Gemm:
    gemm = Gemm(name=name, m=m, n=n, k=k)

    def make() -> object:
        x = torch.empty(m, k, dtype=dtype, device=device).normal_()
        w = torch.empty(n, k, dtype=dtype, device=device).normal_()
        return prepare(x, w)

    gemm.call = gemm.attempt(make)
    return gemm


def layer_gemms(spec: _core.ModelSpec, tokens: int, dtype: torch.dtype, device: torch.device) -> list[Gemm]:
    """Return the matrix products of a layer for ``tokens`` rows, one for each shape.

    On a CPU those of a native prefill are added; on CUDA it calls the same library as torch.
    """
    sizes = {
        "q_proj": (spec.q_dim, spec.hidden_size),
        "k_proj, v_proj": (spec.kv_dim, spec.hidden_size),
        "o_proj": (spec.hidden_size, spec.q_dim),
        "gate_proj, up_proj": (spec.intermediate_size, spec.hidden_size),
        "down_proj": (spec.hidden_size, spec.intermediate_size),
    }
    names: dict[tuple[int, int], str] = {}
    for name, size in sizes.items():
        names[size] = f"{names[size]}, {name}" if size in names else name
    products: dict[str, Product] = {"gemm": F.linear} | ({"own gemm": own_product} if device.type == "cpu" else {})
    return [
        make_gemm(f"{kind} {name}", tokens, n, k, dtype, device, product)
        for (n, k), name in names.items()
        for kind, product in products.items()
    ]


def reference_gemms(spec: _core.ModelSpec, rows: int, dtype: torch.dtype, device: torch.device) -> list[Gemm]:
    """Return the products that define the peak for ``rows`` rows: the MLP's product and a square one.

    On a CPU there are two more: the MLP's product as a native prefill computes it, and for 16-bit weights a square
    product in float32. Where the library has only a plain loop for 16 bits, weights are widened to float32, which is
    faster than that loop.
    """
    side = _SQUARE.get(device.type, _SQUARE["cpu"])
    inner, hidden = spec.intermediate_size, spec.hidden_size
    square = f"[{side}, {side}] x [{side}, {side}]"
    products = [
        make_gemm(f"[{rows}, {hidden}] x [{hidden}, {inner}]", rows, inner, hidden, dtype, device),
        make_gemm(square, side, side, side, dtype, device),
    ]
    if device.type == "cpu":
        products.insert(1, make_gemm(f"{products[0].name} (own)", rows, inner, hidden, dtype, device, own_product))
    if device.type == "cpu" and dtype.itemsize == 2:
        products.append(make_gemm(f"{square} float32", side, side, side, torch.float32, device))
    return products


def rounded_gemms(
    spec: _core.ModelSpec, rows: int, dtype: torch.dtype, device: torch.device, products: str
) -> list[Gemm]:
    """Return the products in 8 bits that define their peak for ``rows`` rows: the MLP's and a square one.

    They have as many rows as a prefill multiplies at once. They are the library's own, which also round their rows, and
    for "int8" those of torch, where these are no plain loops.

    Args:
        spec: shape of the model.
        rows: rows of the prompt.
        dtype: of the input.
        device: of both operands.
        products: "fp8" or "int8".
    """
    side = _SQUARE.get(device.type, _SQUARE["cpu"])
    inner, hidden = spec.intermediate_size, spec.hidden_size
    at_once = _ROWS_AT_ONCE[products]
    linear = {"fp8": torch.ops.pop.fp8_linear, "int8": torch.ops.pop.int8_linear}[products]
    quantise = torch.ops.pop.quantize_rows

    def own(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
        quantised = quantise(weight, products)
        return lambda: linear(x, *quantised)

    def of_torch(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
        integers, columns = quantise(x, products)[0], quantise(weight, products)[0].t()
        return lambda: torch._int_mm(integers, columns)

    makers: dict[str, Prepare] = {f"{products} (own)": own}
    if products == "int8" and torch.ops.pop.int8_isa() in _LIBRARY_INT8:
        makers[products] = of_torch
    return [
        _prepared_gemm(f"[{m}, {k}] x [{k}, {n}] {name}", m, n, k, dtype, device, prepare)
        for m, n, k in ((min(rows, at_once), inner, hidden), (at_once, side, side))
        for name, prepare in makers.items()
    ]


def peak_rate(gemms: list[Gemm]) -> float | None:
    """Return the highest median FLOP/s of these products."""
    return max((gemm.rate for gemm in gemms if gemm.rate is not None), default=None)


def measure_bandwidth(device: torch.device, repeats: int = 7) -> dict[str, float]:
    """Return the bytes per second of a large copy (read plus written) and of a large read."""
    elements = 2**28 if device.type == "cuda" else 2**25  # of float32: 1 GiB, 128 MiB
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    copy = Timed("copy", lambda: target.copy_(source))
    read = Timed("read", lambda: source.sum())
    clock = KernelClock(device)
    for item in (copy, read):
        item.warm_up()  # the system maps the pages now
    interleave([copy, read], clock, repeats)
    size = source.nbytes
    moved = {"copy": 2 * size, "read": size}
    return {item.name: moved[item.name] / Summary.of(item.samples).median for item in (copy, read) if item.samples}
