"""The CPU backend's matrix product (`torch.ops.pop.linear`), as a whole and in blocks of columns."""

from __future__ import annotations

import math

import pop_ext  # noqa: F401  (registers torch.ops.pop)
import pytest
import torch
from op_operands import DTYPES, random, strided
from threads import run_threads
from tolerance import assert_close_fp32, assert_low_precision
from torch import Tensor
from torch.nn import functional as F
from tuning import tuned

from scripts import run_support

linear = torch.ops.pop.linear

# Numbers of rows on both sides of each limit (24, 32, 64: the kernel for few rows; 2048: a second block of rows).
# Numbers of columns: less than a block, one block, several blocks and a remainder.
ROWS = [1, 24, 25, 32, 33, 64, 65, 111, 500, 2049]
COLUMNS = [1, 63, 64, 65, 193, 257, 700]
WIDTHS = [1, 33, 96, 2048, 2049]


@pytest.fixture(params=[0, 1], ids=["whole", "blocks"])
def blocks(request):
    with tuned(gemm_blocks=request.param):
        yield request.param


def operands(rows: int, columns: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return random(rows, width, dtype=dtype), random(columns, width, dtype=dtype, seed=1) / width**0.5


def whole_and_in_blocks(x: Tensor, weight: Tensor) -> list[Tensor]:
    """Return the products under `gemm_blocks` 0 and 1."""
    results = []
    for value in (0, 1):
        with tuned(gemm_blocks=value):
            results.append(linear(x, weight))
    return results


def check(x: Tensor, weight: Tensor) -> None:
    actual, exact = linear(x, weight), F.linear(x.double(), weight.double())
    if x.dtype == torch.float32:
        assert_close_fp32(actual, exact, "product", 2e-5)
    else:
        assert_low_precision(actual, F.linear(x, weight), exact, "product")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_products_of_any_row_count_are_as_exact_as_torchs(rows, dtype, blocks):
    check(*operands(rows, 500, 96, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_products_of_any_column_count_are_as_exact_as_torchs(columns, width, dtype, blocks):
    check(*operands(70, columns, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 33, 111, 500])
@pytest.mark.parametrize(("columns", "width"), [(1, 96), (65, 33), (500, 96), (257, 2049), (64, 1)])
def test_products_with_a_transposed_weight_are_as_exact_as_torchs(columns, width, rows, dtype, blocks):
    x, weight = operands(rows, columns, width, dtype)
    check(x, weight.t().contiguous().t())
    check(x, strided(weight.t().contiguous()).t())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_with_a_large_operand_is_computed_in_parts(dtype, threads, blocks):
    torch.set_num_threads(threads)
    check(*operands(70, 65, 200_000, dtype))  # 41 rows of 200,000 fill the 32 MiB that the operand may use


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [5, 300])
def test_products_of_strided_rows_are_as_exact_as_torchs(rows, dtype, blocks):
    x, weight = operands(rows, 257, 96, dtype)
    check(strided(x), strided(weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_change_a_product_only_by_rounding(dtype):
    results = whole_and_in_blocks(*operands(300, 700, 500, dtype))
    tolerance = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.cpu
@pytest.mark.parametrize(("rows", "alike"), [(1, True), (24, True), (25, False)])
def test_up_to_24_rows_of_float32_use_the_streaming_kernel(rows, alike):
    assert torch.equal(*whole_and_in_blocks(*operands(rows, 700, 500, torch.float32))) == alike


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_has_the_same_bits_again_with_any_number_of_threads(dtype, blocks):
    x, weight = operands(300, 700, 500, dtype)
    exact = F.linear(x.double(), weight.double())
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        first = linear(x, weight)
        assert all(torch.equal(linear(x, weight), first) for _ in range(5)), f"{threads} threads"
        assert_close_fp32(first.float(), exact, f"{threads} threads", 2e-5 + 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("columns", [257, 384, 510, 512])
def test_a_product_in_slices_of_columns_is_as_exact_as_torchs(columns, threads):
    """With AMX such products of bfloat16 are cut (`in_slices` in gemm.cpp)."""
    torch.set_num_threads(threads)
    x, weight = operands(300, columns, 2048, torch.bfloat16)
    check(x, weight)
    check(strided(x), strided(weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_concurrent_threads_get_the_bits_of_one(dtype, blocks):
    pairs = [operands(rows, 300, 128, dtype) for rows in (70, 300)]
    alone = [linear(*pair) for pair in pairs]
    jobs = [lambda pair=pair: [linear(*pair) for _ in range(20)] for pair in pairs]
    for results, expected in zip(run_threads(*jobs), alone, strict=True):
        assert all(torch.equal(result, expected) for result in results)


def test_a_nan_in_a_weight_reaches_only_its_column(blocks):
    x, weight = operands(70, 300, 64, torch.float32)
    weight[131, 7] = math.nan
    out = linear(x, weight)
    assert out[:, 131].isnan().all()
    assert out.isfinite().sum() == 70 * 299


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_threads_older_than_the_number_of_threads_give_the_same_bits(dtype):
    # In a process of its own, since a thread keeps the number that torch told MKL when the thread first worked.
    assert run_support("changing_threads.py", dtype, "2", "4", "8").split() == ["2", "0", "4", "0", "8", "0"]


def test_shapes_are_those_of_torchs_linear(blocks):
    weight = random(7, 5)
    for shape in ((5,), (3, 5), (2, 40, 5), (0, 5)):
        assert_close_fp32(linear(random(*shape), weight), F.linear(random(*shape), weight), str(shape), 1e-6)
    assert linear(random(100, 5), random(0, 5)).shape == (100, 0)


def test_bad_operands_are_refused_by_name():
    x = random(3, 5)
    for weight, message in (
        (random(7, 6), r"pop::linear: weight: expected shape \[\*, 5\], got \[7, 6\]"),
        (random(7, 5).half(), "pop::linear: weight: expected .*float32.*, got .*float16"),
        (random(5, 14).t()[::2], "pop::linear: weight: expected a contiguous last dimension"),
    ):
        with pytest.raises(RuntimeError, match=message):
            linear(x, weight)
    with pytest.raises(RuntimeError, match="pop::linear: x: expected a last dimension of at least 1"):
        linear(random(3, 0), random(7, 0))


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"pop::tune: option: expected gemm_blocks.*\(?blocks"):
        torch.ops.pop.tune("blocks", 1)


def test_an_option_belongs_to_the_thread_that_sets_it():
    (default,) = run_threads(lambda: torch.ops.pop.tune("gemm_blocks", 0))
    for value in (0, 1):
        with tuned(gemm_blocks=value):
            assert run_threads(lambda: torch.ops.pop.tune("gemm_blocks", 1)) == [default]
            assert torch.ops.pop.tune("gemm_blocks", value) == value
