"""quantize_rows rounds to 8-bit floats exactly as torch does."""

from __future__ import annotations

import pytest
import torch
from op_operands import DTYPES, random, strided
from quantized_oracle import quantized

pop = torch.ops.pop


def bits(x):
    return x.view(torch.uint8)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 96), (19, 111), (2, 5, 129), (7, 4104)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_rounded_as_in_torch(dtype, shape):
    x = 3 * random(*shape, dtype=dtype)
    expected, expected_scale = quantized(x)
    for given in (x, strided(x)):
        values, scale = pop.quantize_rows(given)
        assert values.shape == x.shape
        assert torch.equal(bits(values), bits(expected))
        torch.testing.assert_close(scale, expected_scale.squeeze(-1), rtol=1e-6, atol=0)


def test_every_16_bit_value_rounds_to_nearest_even():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.float().abs() <= 448]  # 448 is among them, so the factor is 1
    assert torch.equal(bits(pop.quantize_rows(x)[0]), bits(x.to(torch.float8_e4m3fn)))


def test_rows_of_zeros_stay_zero_and_tiny_rows_finite():
    values, scale = pop.quantize_rows(torch.tensor([[0.0, -0.0], [1e-38, -1e-39]]))
    assert torch.equal(values.float(), torch.zeros(2, 2))
    assert torch.isfinite(scale).all()


def test_a_nan_stays_nan_and_affects_no_other_row():
    x = random(3, 40)
    x[1, 7] = torch.nan
    values, _ = pop.quantize_rows(x)
    assert values.float()[1, 7].isnan()
    for row in (0, 2):
        assert torch.equal(bits(values[row]), bits(pop.quantize_rows(x[row])[0]))
