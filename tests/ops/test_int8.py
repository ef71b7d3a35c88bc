"""Products of 8-bit integers (`int8_linear`): exact sums, scaled and rounded once, by every kernel."""

from __future__ import annotations

import os

import pop_ext  # noqa: F401  (registers torch.ops.pop)
import pytest
import torch
from instruction_sets import assert_lesser_int8_sets_pass
from op_operands import DTYPES, random, strided
from quantized_oracle import quantized
from threads import run_threads
from torch import Tensor

pop = torch.ops.pop
pytestmark = pytest.mark.cpu

# Rows on both sides of the lanes of a vector (4, 8, 16), of a panel (8, 16, 32) and of what is packed at once (512).
# Columns on both sides of a tile (2, 6, 12, 32), of a vector and of a task (128, 256). Widths on both sides of a group
# of 2 or 4, of a tile of AMX (64) and of a block of k (512 or 2048).
ROWS = [1, 2, 4, 5, 8, 9, 15, 17, 31, 33, 97, 193, 511, 513, 1031]
COLUMNS = [1, 5, 6, 7, 8, 12, 13, 16, 31, 33, 127, 129, 257, 515]
WIDTHS = [1, 2, 3, 4, 5, 63, 65, 511, 513, 1025, 2051]
MOST = 132104  # elements along k


def integers(*shape: int, seed: int = 0, largest: int = 127) -> Tensor:
    """Return random integers from -largest to largest, float32, with 127 at the end of each row: rounding keeps all."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-largest, largest + 1, shape, generator=generator).float()
    values[..., -1] = 127
    return values


def exact(x: Tensor, weight: Tensor) -> Tensor:
    """Return the products of integers in float64, which holds every sum exactly."""
    return x.double() @ weight.double().T


def product(x: Tensor, weight: Tensor) -> Tensor:
    return pop.int8_linear(x, *pop.quantize_rows(weight, "int8"))


def assert_exact(x: Tensor, weight: Tensor) -> None:
    expected = exact(x, weight)
    assert expected.abs().max() < 2**24, "expected sums that float32 holds exactly"
    assert torch.equal(product(x, weight).double(), expected)


# Rounding


@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 96), (19, 111), (2, 5, 129), (7, 4104)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_rounded_as_in_torch(dtype, shape):
    x = 3 * random(*shape, dtype=dtype)
    expected, expected_scale = quantized(x, "int8")
    for given in (x, strided(x)):
        values, scale = pop.quantize_rows(given, "int8")
        assert values.dtype == torch.int8
        assert torch.equal(values, expected)
        assert torch.equal(scale, expected_scale.squeeze(-1))


def test_ties_are_rounded_to_even():
    x = torch.cat([torch.arange(-127, 127) + 0.5, torch.tensor([127.0])])
    assert torch.equal(pop.quantize_rows(x, "int8")[0].float(), x.round())


def test_rows_of_zeros_stay_zero_and_tiny_rows_finite():
    values, scale = pop.quantize_rows(torch.tensor([[0.0, -0.0], [1e-38, -1e-39]]), "int8")
    assert torch.equal(values, torch.zeros(2, 2, dtype=torch.int8))
    assert scale.isfinite().all()


@pytest.mark.parametrize("place", [0, 7, 39])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_makes_its_row_of_the_product_nan(value, place):
    x, weight = random(3, 40), random(20, 40, seed=1)
    expected = product(x, weight)
    x[1, place] = value
    assert pop.quantize_rows(x, "int8")[1].isnan().tolist() == [False, True, False]
    out = product(x, weight)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


def test_a_nan_in_a_weight_reaches_only_its_column():
    x, weight = random(30, 40), random(20, 40, seed=1)
    expected = product(x, weight)
    weight[13, 5] = torch.nan
    out = product(x, weight)
    assert out[:, 13].isnan().all()
    others = torch.arange(20) != 13
    assert torch.equal(out[:, others], expected[:, others])


# Exact sums


@pytest.mark.parametrize("width", [5, 513, 1025])
@pytest.mark.parametrize("rows", ROWS)
def test_sums_of_any_row_count_are_exact(rows, width):
    assert_exact(integers(rows, width), integers(70, width, seed=1))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", [3, 61])
def test_sums_of_any_column_count_and_width_are_exact(rows, columns, width):
    assert_exact(integers(rows, width), integers(columns, width, seed=1))


# Several panels and steps of rows whose sums wait for the last block of k.
@pytest.mark.parametrize("shape", [(193, 70, 2051), (513, 257, 4100)], ids=str)
def test_sums_of_many_rows_and_blocks_are_exact(shape):
    rows, columns, width = shape
    assert_exact(integers(rows, width), integers(columns, width, seed=1))


@pytest.mark.parametrize("rows", [4, 30])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)], ids=str)
def test_sums_of_the_largest_values_do_not_saturate(rows, signs):
    """The second half of each row has the other sign, so that large partial sums cancel to a small exact one."""
    width = 40_002
    x, weight = torch.full((rows, width), 127.0 * signs[0]), torch.full((37, width), 127.0 * signs[1])
    x[:, width // 2 + 1 :] *= -1
    assert exact(x, weight).abs().max() == 2 * 127 * 127
    assert_exact(x, weight)


@pytest.mark.parametrize("rows", [2, 26])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_fits(rows, sign):
    x, weight = torch.full((rows, MOST), 127.0), torch.full((9, MOST), 127.0 * sign)
    assert torch.equal(product(x, weight), torch.full((rows, 9), 127.0 * 127 * MOST * sign))


@pytest.mark.parametrize("rows", [5, 300])
def test_sums_of_strided_operands_are_exact(rows):
    x, weight = integers(rows, 517), integers(257, 517, seed=1)
    assert torch.equal(product(strided(x), strided(weight)).double(), exact(x, weight))


# Scales


@pytest.mark.parametrize("shape", [(1, 7, 33), (19, 70, 96), (111, 300, 1027)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_scaled_in_float32_and_rounded_once(dtype, shape):
    rows, columns, width = shape
    x, weight = random(rows, width, dtype=dtype), random(columns, width, dtype=dtype, seed=1)
    (values, scale), (weights, weight_scale) = quantized(x, "int8"), quantized(weight, "int8")
    sums = exact(values, weights).float()
    assert torch.equal(product(x, weight), (sums * weight_scale.T * scale).to(dtype))


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize(
    "shape", [(1, 7, 256), (3, 70, 512), (17, 5, 768), (40, 33, 1024), (40, 33, 2304), (600, 140, 1280)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_scaled_by_groups(dtype, shape, group):
    assert_scaled_by_groups(dtype, shape, group)


# Groups that end within a vector, within a tile of AMX, and one after a block of k.
@pytest.mark.parametrize("shape", [(3, 8, 96), (17, 35, 96), (17, 35, 2080), (33, 257, 4128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_scaled_by_groups_of_any_number(dtype, shape):
    assert_scaled_by_groups(dtype, shape, 32)


def assert_scaled_by_groups(dtype, shape, group):
    rows, columns, width = shape
    generator = torch.Generator().manual_seed(0)
    x = random(rows, width, dtype=dtype)
    weight = torch.randint(-128, 128, (columns, width), dtype=torch.int8, generator=generator)
    scale = torch.rand(columns, width // group, generator=generator) / 100 + 0.001
    dense = weight.double() * scale.double().repeat_interleave(group, 1)
    values, of_rows = pop.quantize_rows(x, "int8")
    for round_rows, operand in ((True, values.double() * of_rows.double()[:, None]), (False, x.double())):
        expected = operand @ dense.T
        error = pop.int8_linear(x, weight, scale, round_rows).double() - expected
        tolerance = max(4 * torch.finfo(dtype).eps, 2e-6)
        assert error.square().mean().sqrt() <= tolerance * expected.square().mean().sqrt(), f"{round_rows=}"


def test_a_group_is_a_power_of_two_that_kernels_take():
    x, weight = random(3, 96), torch.ones(8, 96, dtype=torch.int8)
    assert pop.int8_linear(x, weight, torch.ones(8, 3)).shape == (3, 8)
    for groups in (2, 6, 96):
        with pytest.raises(RuntimeError, match="expected one scale for each row of 96, or for each 32, 64, 128 or 256"):
            pop.int8_linear(x, weight, torch.ones(8, groups))


def test_the_product_is_close_to_that_of_the_given_operands():
    x, weight = random(64, 512), random(128, 512, seed=1)
    error = product(x, weight).double() - exact(x, weight)
    assert error.square().mean().sqrt() < 0.02 * exact(x, weight).square().mean().sqrt()


# Shapes, threads, arguments


def test_shapes_are_those_of_torchs_linear():
    weight = integers(7, 5)
    for shape in ((5,), (3, 5), (2, 40, 5), (0, 5)):
        assert torch.equal(product(integers(*shape), weight).double(), exact(integers(*shape), weight))
    assert product(integers(100, 5), random(0, 5)).shape == (100, 0)


@pytest.mark.parametrize("rows", [3, 300])
def test_the_number_of_threads_does_not_change_a_products_bits(rows):
    x, weight = random(rows, 700), random(515, 700, seed=1)
    first = product(x, weight)
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        assert torch.equal(product(x, weight), first), f"{threads} threads"


def test_two_concurrent_threads_get_the_bits_of_one():
    pairs = [(random(rows, 128), random(300, 128, seed=1)) for rows in (7, 300)]
    alone = [product(*pair) for pair in pairs]
    jobs = [lambda pair=pair: [product(*pair) for _ in range(20)] for pair in pairs]
    for results, expected in zip(run_threads(*jobs), alone, strict=True):
        assert all(torch.equal(result, expected) for result in results)


def test_a_checkpoints_integers_are_read_in_place():
    """-128 is a value that rounding never gives. A row of the weight is not adjacent to the next one."""
    x = integers(30, 517)
    wide = torch.randint(-128, 128, (70, 530), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    wide[:, :9] = -128
    out = pop.int8_linear(x, wide[:, 3:520], torch.ones(70))
    assert torch.equal(out.double(), exact(x, wide[:, 3:520]))


def test_the_largest_sum_of_a_checkpoints_integers_fits():
    x, weight = torch.full((3, MOST), 127.0), torch.full((9, MOST), -128, dtype=torch.int8)
    assert torch.equal(pop.int8_linear(x, weight, torch.ones(9)), torch.full((3, 9), 127.0 * -128 * MOST))


def test_bad_operands_are_refused_by_name():
    x, (weight, scale) = random(3, 40), pop.quantize_rows(random(20, 40), "int8")
    for args, message in (
        ((x, weight.float(), scale), "pop::int8_linear: weight: expected dtype int8, got float32"),
        ((x, weight[:, 1:], scale), r"pop::int8_linear: weight: expected shape \[\*, 40\], got \[20, 39\]"),
        ((x, weight.T.contiguous().T, scale), "pop::int8_linear: weight: expected a contiguous last dimension"),
        ((x, weight, scale[1:]), r"pop::int8_linear: weight_scale: expected shape \[20\], got \[19\]"),
        ((x, weight, scale.double()), "pop::int8_linear: weight_scale: expected .*float64"),
        ((random(1, MOST + 1), weight, scale), "pop::int8_linear: x: expected a last dimension of at most 132104"),
    ):
        with pytest.raises(RuntimeError, match=message):
            pop.int8_linear(*args)
    with pytest.raises(RuntimeError, match="pop::quantize_rows: products: expected fp8 or int8, got 'int4'"):
        pop.quantize_rows(x, "int4")


def test_the_selected_instruction_set_is_the_highest_that_runs_rounded_or_not():
    order = ["baseline", "avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx"]
    wanted = os.environ.get("POP_CPU_ISA") or order[-1]
    assert order.index(torch.ops.pop.int8_isa()) <= order.index(wanted)
    if wanted in ("baseline", "avx2"):  # every processor that can be asked for it has the same for integers
        assert torch.ops.pop.int8_isa() == wanted


def test_the_kernels_of_lesser_processors_give_the_same_results():
    assert_lesser_int8_sets_pass("rounded or exact or saturate or fits or finite or scaled", __file__)
