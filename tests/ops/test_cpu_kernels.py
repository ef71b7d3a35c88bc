"""The row kernels and the KV projection equal float64 results, on every instruction set of this processor."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pop_ext  # noqa: F401  (registers torch.ops.pop)
import pytest
import torch
from instruction_sets import assert_lesser_sets_pass
from op_operands import DTYPES, rms_norm
from tolerance import assert_close_fp32, assert_low_precision, worst_element
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = [1, 7, 15, 16, 17, 33, 63, 64, 65, 96, 129, 500, 4099, 16384]
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu}
SENTINEL = 777.0


def assert_rounded_once(actual: Tensor, exact: Tensor, name: str, scale: float = 1.0) -> None:
    """Check that `actual` is `exact` (float64) rounded to its dtype, up to fp32 errors of terms of size `scale`."""
    eps = torch.finfo(actual.dtype).eps
    fp32 = 4e-6 if actual.dtype == torch.float32 else 1e-5
    subnormal = torch.finfo(actual.dtype).smallest_normal * eps
    bound = exact.abs() * eps * 0.51 + fp32 * (exact.abs() + scale * eps) + subnormal
    if actual.dtype == torch.float32:
        bound = bound + 1e-6 * scale
    assert ((actual.double() - exact).abs() <= bound).all(), f"{name}: {worst_element(actual, exact)}"


def guarded(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return random values [rows, width] inside a larger buffer of sentinels, and the buffer."""
    buffer = torch.full((rows + 2, width + 5), SENTINEL, dtype=dtype)
    inside = buffer[1:-1, 2:-3]
    inside.copy_(torch.randn(rows, width))
    return inside, buffer


def assert_untouched_outside(buffer: Tensor) -> None:
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside[1:-1, 2:-3] = False
    assert (buffer[outside] == SENTINEL).all(), "written outside of [rows, width]"


# RMSNorm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_rounds_the_exact_result_once(width, dtype):
    x, buffer = guarded(3, width, dtype)
    weight = torch.randn(width).to(dtype)
    before = buffer.clone()
    assert_rounded_once(torch.ops.pop.rms_norm(x, weight, 0.1), rms_norm(x, weight, 0.1), "out", 4.0)
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_residual_is_rounded_and_stored_before_its_norm(width, with_bias, dtype):
    x, buffer = guarded(3, width, dtype)
    delta, _ = guarded(3, width, dtype)
    weight, bias = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    addend = delta.float() + bias.float() if with_bias else delta.float()
    expected = (x.float() + addend).to(dtype)
    out = torch.ops.pop.add_rms_norm(x, delta, weight, 1e-6, bias if with_bias else None)
    assert torch.equal(x, expected)
    assert_rounded_once(out, rms_norm(expected, weight, 1e-6), "out", 4.0)
    assert_untouched_outside(buffer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_zeros_is_zero_and_a_nan_stays_in_its_row(dtype):
    x = torch.randn(3, 65).to(dtype)
    x[0], x[1, 64] = 0, math.nan
    out = torch.ops.pop.rms_norm(x, torch.ones(65, dtype=dtype), 1e-6)
    assert (out[0] == 0).all()
    assert out[1].isnan().all()
    assert out[2].isfinite().all()


def test_a_massive_activation_gives_a_finite_half_precision_norm():
    x = torch.randn(2, 4096).half()
    x[:, 7] = 65504
    weight = torch.ones(4096).half()
    assert_rounded_once(torch.ops.pop.rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6), "out")


# The gated activation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 15, 16, 33, 500])
def test_the_gated_activation_rounds_the_exact_result_once(width, activation, biases, dtype):
    gate, _ = guarded(3, width, dtype)
    up, buffer = guarded(3, width, dtype)
    gate.mul_(4)
    gate_bias, up_bias = (torch.randn(width).to(dtype) if wanted else None for wanted in biases)
    before = gate.clone()
    out = torch.ops.pop.gated_act(gate, up, activation, gate_bias, up_bias)
    x = gate.float() if gate_bias is None else gate.float() + gate_bias.float()
    y = up.float() if up_bias is None else up.float() + up_bias.float()
    assert_rounded_once(out, ACTIVATIONS[activation](x.double()) * y.double(), activation, 0.1)
    assert torch.equal(gate, before)
    assert_untouched_outside(buffer)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_exact_over_the_whole_range(activation):
    x = torch.cat([torch.linspace(-30, 30, 100_001), torch.tensor([0.0, -0.0, 1e-40, 1e4, -1e4, 3e38, -3e38])])
    out = torch.ops.pop.gated_act(x[None], torch.ones_like(x)[None], activation)[0]
    assert_close_fp32(
        out / (1 + x.abs()), ACTIVATIONS[activation](x.double()) / (1 + x.double().abs()), activation, 2e-7
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_propagate_infinity_and_nan(activation):
    x = torch.tensor([[math.inf, math.nan]])
    out = torch.ops.pop.gated_act(x, torch.ones_like(x), activation)
    assert out[0, 0] == math.inf
    assert out[0, 1].isnan()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_16_bit_value_rounds_as_in_torch(dtype):
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    ones = torch.ones(1, values.numel(), dtype=dtype)
    # silu(x) is x to float32 precision for large x: silu(x + 100) * y, with y the value under test.
    factor = F.silu(torch.tensor(100.0))
    for scale in (1.0, 1.00390625, 1 / 3, 1e-3):
        up = (values.float() * scale).to(dtype)[None]
        out = torch.ops.pop.gated_act(ones * 100, up, "silu")[0]
        expected = (up[0].float() * factor).to(dtype)
        assert torch.equal(out.nan_to_num(nan=0.5), expected.nan_to_num(nan=0.5))


# RoPE and the cache write


@dataclass
class RopeCall:
    """A call on packed sequences of `lengths` rows after `pasts` positions; the caches are filled with sentinels."""

    dtype: torch.dtype
    head_dim: int = 64
    rotary_dim: int = 64
    heads: int = 3
    kv_heads: int = 2
    lengths: tuple[int, ...] = (3, 1, 5)
    pasts: tuple[int, ...] = (0, 4, 2)
    starts: tuple[int, ...] = (1, 0, 2)
    slots_first: bool = False
    table: Tensor | None = None  # int32 [batch, capacity]
    cos: Tensor = field(init=False)
    sin: Tensor = field(init=False)

    def __post_init__(self) -> None:
        angles = torch.rand(self.rows, self.rotary_dim // 2) * 2 * math.pi
        self.cos, self.sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    def cache(self) -> Tensor:
        capacity = 3 + max(n + p for n, p in zip(self.lengths, self.pasts, strict=True))
        shape = (len(self.lengths), self.kv_heads, capacity, self.head_dim)
        if self.slots_first:
            shape = (shape[0], capacity, self.kv_heads, self.head_dim)
            return torch.full(shape, SENTINEL, dtype=self.dtype).transpose(1, 2)
        return torch.full(shape, SENTINEL, dtype=self.dtype)

    def geometry(self) -> tuple[Tensor, Tensor, Tensor]:
        cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).int()
        return cu_seqlens, torch.tensor(self.pasts).int(), torch.tensor(self.starts).int()

    def written(self, cache: Tensor) -> Tensor:
        """Return the call's rows in a cache, [rows, kv_heads, head_dim]; check that all other slots are sentinels."""
        rows, rest = [], torch.ones(cache.shape[0], cache.shape[2], dtype=torch.bool)
        for i, (length, past) in enumerate(zip(self.lengths, self.pasts, strict=True)):
            positions = torch.arange(past, past + length)
            slots = positions + self.starts[i] if self.table is None else self.table[i, positions].long()
            rows.append(cache[i, :, slots].transpose(0, 1))
            rest[i, slots] = False
        assert (cache.transpose(1, 2)[rest] == SENTINEL).all(), "written outside of the call's slots"
        return torch.cat(rows)

    def exact(self, x: Tensor, norm: Tensor | None = None) -> Tensor:
        """Return x [rows, heads, head_dim] after the norm of each head and RoPE, in float64."""
        x = x.double() if norm is None else rms_norm(x, norm, 1e-6)
        half = self.rotary_dim // 2
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = (t[:, None, :half].double() for t in (self.cos, self.sin))
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def rope_cache_write(call: RopeCall, q_norm: Tensor | None = None, k_norm: Tensor | None = None) -> None:
    """Run the operator on random q, k, v, and compare q and both caches with float64."""
    fused = torch.full((call.rows, call.heads + 1, call.head_dim), SENTINEL, dtype=call.dtype)
    query = fused[:, : call.heads]
    query.copy_(torch.randn(query.shape))
    key, value = (torch.randn(call.rows, call.kv_heads, call.head_dim).to(call.dtype) for _ in range(2))
    keys, values = call.cache(), call.cache()
    expected = call.exact(query.clone(), q_norm)
    tables = (call.cos, call.sin, *call.geometry())
    torch.ops.pop.rope_cache_write(query, key, value, *tables, keys, values, q_norm, k_norm, 1e-6, call.table)
    assert_rounded_once(query, expected, "query", 8.0)
    assert_rounded_once(call.written(keys), call.exact(key, k_norm), "key", 8.0)
    assert torch.equal(call.written(values), value)
    assert (fused[:, call.heads :] == SENTINEL).all(), "written past the heads of query"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_norm", [False, True], ids=["no norm", "norm"])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [(64, 64), (80, 80), (128, 128), (256, 256), (96, 24), (80, 32), (10, 6), (7, 2), (33, 30)],
)
def test_rope_and_cache_write_equal_the_reference(head_dim, rotary_dim, with_norm, dtype):
    norms = [torch.randn(head_dim).to(dtype) if with_norm else None for _ in range(2)]
    rope_cache_write(RopeCall(dtype, head_dim, rotary_dim), *norms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots_first", [False, True], ids=["heads first", "slots first"])
@pytest.mark.parametrize("permuted", [False, True], ids=["consecutive slots", "permuted slots"])
def test_rows_reach_their_slots_in_any_cache_layout(permuted, slots_first, dtype):
    table = torch.stack([torch.randperm(10) for _ in range(3)]).int() if permuted else None
    rope_cache_write(RopeCall(dtype, slots_first=slots_first, table=table))


# The KV projection


@dataclass
class Projection:
    """The weights of a run of layers."""

    dtype: torch.dtype
    call: RopeCall
    layers: int = 3
    hidden_size: int = 96
    biases: bool = True
    norms: bool = True

    def __post_init__(self) -> None:
        kv_dim = self.call.kv_heads * self.call.head_dim

        def random(*shape: int) -> list[Tensor]:
            return [torch.randn(shape).to(self.dtype) for _ in range(self.layers)]

        # Folded in float32 and rounded once, as in the runtime.
        self.weight = (torch.randn(self.layers * 2 * kv_dim, self.hidden_size) / self.hidden_size**0.5).to(self.dtype)
        self.k_bias, self.v_bias = (random(kv_dim) if self.biases else None for _ in range(2))
        self.k_norm = random(self.call.head_dim) if self.norms else None

    def run(self, hidden: Tensor, eps: float = 1e-5) -> tuple[list[Tensor], list[Tensor]]:
        """Return K and V [rows, kv_heads, head_dim] of each layer, read from the caches."""
        call = self.call
        caches = [[call.cache() for _ in range(self.layers)] for _ in range(2)]
        tables = (call.cos, call.sin, *call.geometry())
        vectors = (self.k_bias, self.v_bias, self.k_norm)
        torch.ops.pop.kv_project(hidden, self.weight, *tables, eps, *caches, *vectors, call.table)
        return tuple([call.written(cache) for cache in side] for side in caches)

    def reference(self, hidden: Tensor, dtype: torch.dtype, eps: float = 1e-5) -> tuple[list[Tensor], list[Tensor]]:
        """Compute the same layer by layer in `dtype`, as a stock model does."""
        call, shape = self.call, (self.call.rows, self.call.kv_heads, self.call.head_dim)
        norm = rms_norm(hidden, torch.ones(self.hidden_size), eps).to(dtype)
        stacked = self.weight.to(dtype).view(self.layers, 2, -1, self.hidden_size)
        keys, values = [], []
        for layer in range(self.layers):
            k, v = (F.linear(norm, stacked[layer, side]) for side in range(2))
            if self.biases:
                k, v = k + self.k_bias[layer].to(dtype), v + self.v_bias[layer].to(dtype)
            k_norm = self.k_norm[layer] if self.norms else None
            keys.append(call.exact(k.view(shape), k_norm).to(dtype))
            values.append(v.view(shape))
        return keys, values

    def check(self, hidden: Tensor) -> None:
        actual, exact = self.run(hidden), self.reference(hidden, torch.float64)
        same_dtype = self.reference(hidden, self.dtype)
        for side, name in enumerate(["key", "value"]):
            for layer in range(self.layers):
                where = f"{name} of layer {layer}"
                if self.dtype == torch.float32:
                    assert_close_fp32(actual[side][layer], exact[side][layer], where, 5e-5)
                else:
                    assert_low_precision(actual[side][layer], same_dtype[side][layer], exact[side][layer], where)


def call_of(rows: int, dtype: torch.dtype, head_dim: int = 24) -> RopeCall:
    """Return a call of `rows` rows, in two sequences if there are at least two."""
    lengths = (rows,) if rows < 3 else (rows // 3, rows - rows // 3)
    return RopeCall(
        dtype, head_dim, head_dim, lengths=lengths, pasts=(2, 0)[: len(lengths)], starts=(1, 3)[: len(lengths)]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 19, 48, 49, 64, 65, 111, 129, 500, 1023, 1024, 1025, 2100])
def test_kv_projection_of_any_row_count_equals_the_reference(rows, dtype):
    projection = Projection(dtype, call_of(rows, dtype))
    projection.check(torch.randn(rows, projection.hidden_size).to(dtype) * 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [33, 96, 500])
@pytest.mark.parametrize("rows", [7, 77])
def test_kv_projection_of_odd_widths_and_strides_equals_the_reference(rows, hidden_size, dtype):
    projection = Projection(dtype, call_of(rows, dtype, 10), hidden_size=hidden_size, biases=False, norms=False)
    projection.check(guarded(rows, hidden_size, dtype)[0])


@pytest.mark.parametrize("rows", [3, 100])
def test_a_massive_activation_does_not_overflow_half_precision(rows):
    projection = Projection(torch.float16, call_of(rows, torch.float16))
    hidden = torch.randn(rows, projection.hidden_size).half()
    hidden[:, 5] = 60000
    projection.weight[:, 5] = 3
    projection.check(hidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_mates_do_not_change_a_boundary_rows_bits(dtype):
    rows = 24  # the most rows whose weights are streamed in every dtype
    call = RopeCall(dtype, lengths=(1,) * rows, pasts=(0,) * rows, starts=(0,) * rows)
    projection = Projection(dtype, call)
    hidden = torch.randn(rows, projection.hidden_size).to(dtype)
    together = projection.run(hidden)
    for row in (0, 11, 23):
        projection.call = RopeCall(dtype, lengths=(1,), pasts=(0,), starts=(0,))
        projection.call.cos, projection.call.sin = call.cos[row : row + 1], call.sin[row : row + 1]
        alone = projection.run(hidden[row : row + 1])
        for side in range(2):
            assert all(torch.equal(t[row], a[0]) for t, a in zip(together[side], alone[side], strict=True))


# Independence of threads, the operators, the instruction sets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_does_not_change_row_kernels_bits(dtype):
    x, up = torch.randn(200, 500).to(dtype), torch.randn(200, 500).to(dtype)
    projection = Projection(dtype, call_of(40, dtype), hidden_size=500)

    def results() -> list[Tensor]:
        keys, values = projection.run(x[:40])
        return [torch.ops.pop.rms_norm(x, up[0], 1e-6), torch.ops.pop.gated_act(x, up), *keys, *values]

    one = results()
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(results(), one, strict=True))


def test_the_operators_pass_opcheck():
    ops, x, weight = torch.ops.pop, torch.randn(3, 17), torch.randn(17)
    torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-6))
    torch.library.opcheck(ops.add_rms_norm.default, (x, x.clone(), weight, 1e-6, weight.clone()))
    torch.library.opcheck(ops.gated_act.default, (x, x.clone(), "gelu", None, weight))
    call = RopeCall(torch.float32)
    tables = (call.cos, call.sin, *call.geometry())
    query = torch.randn(call.rows, call.heads, call.head_dim)
    key, value = (torch.randn(call.rows, call.kv_heads, call.head_dim) for _ in range(2))
    torch.library.opcheck(ops.rope_cache_write.default, (query, key, value, *tables, call.cache(), call.cache()))
    projection = Projection(torch.float32, call, layers=1)
    hidden = torch.randn(call.rows, projection.hidden_size)
    caches = ([call.cache()], [call.cache()])
    torch.library.opcheck(ops.kv_project.default, (hidden, projection.weight, *tables, 1e-6, *caches))


def test_an_unknown_instruction_set_is_refused_by_name():
    script = "import pop_ext, torch; torch.ops.pop.cpu_isa()"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "POP_CPU_ISA": "avx9"}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "POP_CPU_ISA: expected one of" in done.stderr
    assert "'avx9'" in done.stderr


def test_a_lesser_set_serves_a_process_that_is_refused_tiles():
    """Linux may refuse tiles on a processor that has AMX; elsewhere this changes nothing."""
    script = """
        import pop_ext, torch
        x, w = torch.randn(9, 64).bfloat16(), torch.randn(40, 64).bfloat16()
        assert torch.allclose(torch.ops.pop.linear(x, w).float(), x.float() @ w.float().T, rtol=0.02, atol=0.05)
        print(torch.ops.pop.cpu_isa(), torch.ops.pop.int8_isa())
    """
    command = [sys.executable, ROOT / "scripts" / "without_amx.py", sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    isa, int8 = torch.ops.pop.cpu_isa(), torch.ops.pop.int8_isa()
    if isa == "amx":
        isa, int8 = "avx512_bf16", "avx512_vnni"
    assert done.stdout.split() == [isa, int8]
    done = subprocess.run([*command[:2], "no-such-command"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (127, "no-such-command: No such file or directory\n")


def test_lesser_instruction_sets_pass_these_tests():
    rounding = Path(__file__).with_name("test_quantize_rows.py")
    assert_lesser_sets_pass("not lesser and not opcheck", __file__, str(rounding))
