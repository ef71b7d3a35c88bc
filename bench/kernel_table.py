"""Measure the kernel table: each operator alone, on cold caches, as a share of the machine's peak."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from pop_ext import _core
from pop_ext.hf.native_model import NativeModel
from pop_ext.utils.progress import ProgressBar

from bench.arms import sequence_shapes
from bench.measure import KernelClock, Summary, Timed, captured, interleave, tuned
from bench.operands import BoundaryStep, Operands, with_layers
from bench.rates import Gemm, layer_gemms, make_gemm, measure_bandwidth, reference_gemms

Maker = Callable[[Operands], tuple[Callable[[], Any], int]]


@dataclass(kw_only=True)
class Row(Timed):
    """A row of the table.

    Attributes:
        tokens: rows of the prompt.
        flops: FLOPs of one call by the cost model; None for a kernel that is bound by memory.
        bytes: bytes read and written, each operand once; None for a kernel that is bound by FLOPs.
        beside: name of the row that this one is compared with.
    """

    tokens: int
    flops: float | None = None
    bytes: float | None = None
    beside: str | None = None

    @property
    def rate(self) -> float | None:
        """FLOP/s, or bytes per second for a kernel that is bound by memory; None without samples."""
        work = self.bytes if self.flops is None else self.flops
        return work / Summary.of(self.samples).median if self.samples and work else None


@dataclass
class KernelTable:
    """The measured rows and the machine's peaks in this run.

    Attributes:
        bandwidth: bytes per second of a large "copy" and of a large "read".
        peak: FLOP/s of the fastest matrix product among the rows.
    """

    model: str
    dtype: str
    rows: list[Row]
    bandwidth: dict[str, float]
    peak: float | None
    repeats: int
    warnings: list[str] = field(default_factory=list)

    def share(self, row: Row) -> float | None:
        """Return a row's rate as a share of the peak that bounds it, FLOP/s or bandwidth."""
        peak = max(self.bandwidth.values(), default=None) if row.flops is None else self.peak
        return row.rate / peak if row.rate is not None and peak else None

    def relative(self, row: Row) -> float | None:
        """Return the median time of the row that ``row`` is compared with, divided by its own; None without one."""
        other = next((r for r in self.rows if r.name == row.beside and r.tokens == row.tokens), None)
        if other is None or not other.samples or not row.samples:
            return None
        return Summary.of(other.samples).median / Summary.of(row.samples).median


def measure_kernels(
    name: str,
    native: NativeModel,
    lengths: list[int],
    repeats: int = 11,
    budget: float | None = None,
    quiet: bool = False,
) -> KernelTable:
    """Time every row at every length.

    Args:
        name: name of the model.
        native: the model; kv_project and the boundary step are measured on the longest run of its plan.
        lengths: tokens of the prompts, each at least 2.
        repeats: number of rounds.
        budget: seconds, shared by the lengths; a length that has spent its share starts no further round. None: no
            limit.
        quiet: show no progress bar.
    """
    started = time.monotonic()
    clock = KernelClock(native.device)
    table = KernelTable(name, str(native.dtype).removeprefix("torch."), [], measure_bandwidth(native.device), None, 0)
    rounds = []
    with ProgressBar(f"kernels, {name}", quiet=quiet) as bar:
        bar.log(f"kernels, {name}")
        for index, tokens in enumerate(lengths):
            operands = Operands(native.spec, tokens, native.dtype, native.device)
            rows = kernel_rows(native, operands)
            square = reference_gemms(native.spec, tokens, *operands.kind)[-1]
            products = [*layer_gemms(native.spec, tokens, *operands.kind), square]
            for item in (*rows, *products):
                item.warm_up()
                _capture(item, native.device)
            deadline = None if budget is None else started + budget * (index + 1) / len(lengths)
            timed = [*rows, *products]
            bar.total = len(timed) * repeats * len(lengths)
            rounds.append(interleave(timed, clock, repeats, deadline, step=lambda item: bar.advance(label=item.name)))
            table.rows += [*rows, *(_gemm_row(gemm, tokens) for gemm in products)]
            for item in (*rows, *products):
                item.call = None
    table.repeats = min(rounds, default=0)
    table.peak = max((row.rate for row in table.rows if "gemm" in row.name and row.rate), default=None)
    if table.repeats < repeats:
        table.warnings.append(f"{table.repeats} of {repeats} repeats: the time budget was spent")
    return table


def _capture(item: Timed, device: torch.device) -> None:
    """Replace an item's call by the replay of its graph on CUDA."""
    call = item.call
    if call is not None and item.failed is None:
        item.call = item.attempt(lambda: captured(call, device))


def kernel_rows(native: NativeModel, operands: Operands) -> list[Row]:
    """Return rows of the operators of ``torch.ops.pop``, of the boundary step, and of torch's attention."""
    spec, tokens = operands.spec, operands.tokens
    attention = stock_stage(spec, tokens, "attention")["flops"]
    rows = [
        _row("rms_norm", operands, _rms_norm),
        _row("add_rms_norm", operands, _add_rms_norm),
        _row("gated_act", operands, _gated_act),
        _row("rope_cache_write", operands, _rope_cache_write),
        _row("attention", operands, _attention, attention, beside="torch sdpa"),
        _row("torch sdpa", operands, _sdpa, attention),
    ]
    on_gpu = native.device.type == "cuda"
    if on_gpu:
        rows += [
            _row("quantize_rows", operands, _quantize_rows(operands.spec.hidden_size)),
            _row("quantize_rows, mlp", operands, _quantize_rows(operands.spec.intermediate_size)),
            *_products_rows(operands, "fp8"),
            _row("attention, flash", operands, _under(_attention, sdpa_rows=0), attention, beside="torch sdpa"),
            _row("attention, own", operands, _under(_attention, library_attention=0), attention, beside="torch sdpa"),
        ]
    else:
        rows += _products_rows(operands, "int8")
    run = max(native.plan.runs, key=len, default=None)
    if run is None:
        return rows
    layers = "1 layer" if len(run) == 1 else f"{len(run)} layers"
    bare = make_gemm("its bare gemm", tokens, len(run) * 2 * spec.kv_dim, spec.hidden_size, *operands.kind)
    projected = run_stage(spec, run, tokens + 1, "kv_project")["flops"]  # the cost of `tokens` context rows
    rows += [
        _row(f"kv_project, {layers}", operands, _kv_project(len(run)), projected, beside=bare.name),
        Row(name=bare.name, tokens=tokens, call=bare.call, failed=bare.failed, flops=bare.flops),
    ]
    if on_gpu:
        # In a prefill the row scales come from the pass that adds the update; here from a pass of their own.
        for name, value in (("kv_project fused with rstd", 2), ("kv_project fused, sums of squares within", 1)):
            fused = _under(_kv_project(len(run)), fused_kv_project=value)
            rows.append(_row(f"{name}, {layers}", operands, fused, projected, beside=bare.name))
        halves = _under(_kv_project(len(run)), fused_kv_project=2, kv_project_halves=1)
        rows.append(
            _row(f"kv_project fused, last round in halves, {layers}", operands, halves, projected, beside=bare.name)
        )
        in_cache = _under(_kv_project(len(run)), kv_project_kib=24 << 10)
        rows.append(_row(f"kv_project by 24 MiB, {layers}", operands, in_cache, projected, beside=bare.name))
    rows.append(_boundary_row(native, run, tokens, 1))
    if on_gpu:
        rows.append(_boundary_row(native, run, tokens, 1, early_launch=1))
        for count in (8, 16, 64):
            rows.append(_boundary_row(native, run, tokens, count))
            rows.append(_boundary_row(native, run, tokens, count, skinny_mma_rows=64))
    return rows


def _products_rows(operands: Operands, products: str) -> list[Row]:
    """Return the row of the MLP's product in 8 bits, rounding of its input included; none if that is not supported."""
    spec = operands.spec
    if torch.ops.pop.products_missing(products, spec.to_json(), operands.rows()):
        return []
    flops = 2.0 * operands.tokens * spec.hidden_size * spec.intermediate_size
    make = {"fp8": _fp8_linear, "int8": _int8_linear}[products]
    return [_row(f"{products} linear, gate_proj, up_proj", operands, make, flops, beside="gemm gate_proj, up_proj")]


def _boundary_row(native: NativeModel, run: range, tokens: int, count: int, **options: int) -> Row:
    """Return the row of ``count`` boundary rows through a run, under backend options."""
    layers = "1 layer" if len(run) == 1 else f"{len(run)} layers"
    parts = ["boundary step", layers, *([f"{count} rows"] if count > 1 else []), *options]
    row = Row(name=", ".join(parts), tokens=tokens)
    row.bytes = run_stage(native.spec, run, tokens, "boundary", count)["bytes"]
    row.call = row.attempt(lambda: tuned(BoundaryStep(native, run, tokens, count), options))
    return row


def stock_stage(spec: _core.ModelSpec, tokens: int, stage: str) -> dict[str, float]:
    """Return FLOPs and bytes of a stage of one layer by the cost model."""
    return _core.stock_cost(with_layers(spec, [0]), sequence_shapes(1, tokens))["stages"][stage]


def run_stage(spec: _core.ModelSpec, run: range, tokens: int, stage: str, boundary: int = 1) -> dict[str, float]:
    """Return FLOPs and bytes of a stage of a run of omitted layers by the cost model, behind one retained layer."""
    retained = 0 if run.start > 0 else run.stop
    cut = with_layers(spec, [retained, *run])
    plan = _core.Plan(len(run) + 1, list(range(1, len(run) + 1)))
    shape = _core.SequenceShape(tokens, boundary=min(boundary, tokens), logits_to_keep=1)
    return _core.plan_cost(cut, plan, [shape])["stages"][stage]


def _under(make: Maker, **options: int) -> Maker:
    """Return a maker whose call runs under options of the CUDA backend."""

    def under(operands: Operands) -> tuple[Callable[[], Any], int]:
        call, moved = make(operands)
        return tuned(call, options), moved

    return under


def _row(name: str, operands: Operands, make: Maker, flops: float | None = None, beside: str | None = None) -> Row:
    row = Row(name=name, tokens=operands.tokens, flops=flops, beside=beside)
    made = row.attempt(lambda: make(operands))
    if made is not None:
        row.call, moved = made
        row.bytes = float(moved) if flops is None else None
    return row


def _gemm_row(gemm: Gemm, tokens: int) -> Row:
    name = gemm.name if "gemm" in gemm.name else f"gemm {gemm.name}"
    beside = name.removeprefix("own ") if name.startswith("own ") else None
    return Row(name=name, tokens=tokens, samples=gemm.samples, failed=gemm.failed, flops=gemm.flops, beside=beside)


# A maker returns a call and the bytes that it reads and writes, every operand and result once (0: not used).


def _rms_norm(operands: Operands) -> tuple[Callable[[], Any], int]:
    x, gamma = operands.rows(), operands.rand(operands.spec.hidden_size)
    eps = operands.spec.rms_norm_eps
    return lambda: torch.ops.pop.rms_norm(x, gamma, eps), 2 * x.nbytes


def _add_rms_norm(operands: Operands) -> tuple[Callable[[], Any], int]:
    x, delta, gamma = operands.rows(), operands.rows(), operands.rand(operands.spec.hidden_size)
    delta.zero_()  # repeated calls leave x unchanged
    eps = operands.spec.rms_norm_eps
    return lambda: torch.ops.pop.add_rms_norm(x, delta, gamma, eps), 4 * x.nbytes


def _quantize_rows(width: int) -> Maker:
    def make(operands: Operands) -> tuple[Callable[[], Any], int]:
        x = operands.rand(operands.tokens, width)
        return lambda: torch.ops.pop.quantize_rows(x), x.nbytes + x.numel()

    return make


def _fp8_linear(operands: Operands) -> tuple[Callable[[], Any], int]:
    spec = operands.spec
    x, quantized = operands.rows(), torch.ops.pop.quantize_rows(operands.rand(spec.intermediate_size, spec.hidden_size))
    return lambda: torch.ops.pop.fp8_linear(x, *quantized), 0


def _int8_linear(operands: Operands) -> tuple[Callable[[], Any], int]:
    spec = operands.spec
    weight = operands.rand(spec.intermediate_size, spec.hidden_size)
    x, quantized = operands.rows(), torch.ops.pop.quantize_rows(weight, "int8")
    return lambda: torch.ops.pop.int8_linear(x, *quantized), 0


def _gated_act(operands: Operands) -> tuple[Callable[[], Any], int]:
    gate, up = (operands.rand(operands.tokens, operands.spec.intermediate_size) for _ in range(2))
    activation = operands.spec.activation
    return lambda: torch.ops.pop.gated_act(gate, up, activation), 3 * gate.nbytes


def _rope_cache_write(operands: Operands) -> tuple[Callable[[], Any], int]:
    query, key, value = operands.queries(), operands.keys(), operands.keys()
    caches = operands.cache(), operands.cache()
    tables = operands.cos, operands.sin
    moved = 2 * (query.nbytes + key.nbytes + value.nbytes) + sum(table.nbytes for table in tables)
    return lambda: torch.ops.pop.rope_cache_write(query, key, value, *tables, *operands.lengths, *caches), moved


def _attention(operands: Operands) -> tuple[Callable[[], Any], int]:
    query, key, value = operands.queries(), operands.cache(), operands.cache()
    scale = operands.spec.attention_scale
    return lambda: torch.ops.pop.attention(query, key, value, *operands.lengths, scale), 0


def _sdpa(operands: Operands) -> tuple[Callable[[], Any], int]:
    query = operands.queries().transpose(0, 1)[None]
    key, value = operands.cache(), operands.cache()
    scale = operands.spec.attention_scale
    return (
        lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True),
        0,
    )


def _kv_project(layers: int) -> Maker:
    def make(operands: Operands) -> tuple[Callable[[], Any], int]:
        spec = operands.spec
        hidden, weight = operands.rows(), operands.rand(layers * 2 * spec.kv_dim, spec.hidden_size)
        keys, values = ([operands.cache() for _ in range(layers)] for _ in range(2))
        norms = [operands.rand(spec.head_dim) for _ in range(layers)] if spec.qk_norm else None
        arguments = (operands.cos, operands.sin, *operands.lengths, spec.rms_norm_eps, keys, values)
        return lambda: torch.ops.pop.kv_project(hidden, weight, *arguments, k_norm=norms), 0

    return make
