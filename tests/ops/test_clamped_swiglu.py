"""`clamped_swiglu` of `torch.ops.pop.gated_act`, the activation of gpt-oss."""

from __future__ import annotations

import math

import pop_ext  # noqa: F401  (registers torch.ops.pop)
import pytest
import torch
from instruction_sets import assert_lesser_sets_pass
from op_operands import DTYPES, assert_one_rounding, random, strided
from tolerance import assert_close_fp32
from torch import Tensor

gated_act = torch.ops.pop.gated_act


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    gate, up = gate.double().clamp(max=limit), up.double().clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numbers", [(), (0.5, 1.5)], ids=["of gpt-oss", "others"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("width", [1, 15, 16, 33, 500])
def test_it_equals_its_formula_rounded_once(width, with_bias, numbers, dtype):
    gate, up = 8 * random(3, width, dtype=dtype), 8 * random(3, width, dtype=dtype, seed=1)
    biases = [random(width, dtype=dtype, seed=seed) for seed in (2, 3)] if with_bias else [None, None]
    g, u = (x.float() + (0 if b is None else b.float()) for x, b in zip((gate, up), biases, strict=True))
    out = gated_act(gate, up, "clamped_swiglu", *biases, *numbers)
    assert_one_rounding(out, clamped_swiglu(g, u, *numbers), ulps=4)
    assert torch.equal(gated_act(strided(gate), strided(up), "clamped_swiglu", *biases, *numbers), out)


def test_a_nan_is_kept_and_infinity_is_clamped():
    gate, up = torch.tensor([math.nan, 1.0, math.inf, 1.0]), torch.tensor([1.0, math.nan, 1.0, -math.inf])
    out = gated_act(gate[None], up[None], "clamped_swiglu")[0]
    assert out[:2].isnan().all()
    assert_close_fp32(out[2:], clamped_swiglu(gate, up)[2:], "clamped", 1e-5)


@pytest.mark.parametrize("name", ["swiglu_alpha", "swiglu_limit"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_bad_number_is_refused_by_name(name, value):
    with pytest.raises(RuntimeError, match=f"pop::gated_act: {name}: expected a finite number > 0"):
        gated_act(torch.ones(1, 8), torch.ones(1, 8), "clamped_swiglu", **{name: value})


@pytest.mark.cpu
def test_lesser_instruction_sets_pass_these_tests():
    assert_lesser_sets_pass("not lesser", __file__)
