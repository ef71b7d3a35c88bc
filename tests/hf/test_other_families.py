"""Test the families of `other_families` against the oracle and the stock model."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, OMITS, assert_equals_oracle, plan_of, run_native, run_stock
from models import pad, tokens
from other_families import OTHER, VARIANTS, other, shared_other
from pop_ext import Plan
from tolerance import assert_close_fp32

T = 40


@pytest.mark.parametrize("omit", OMITS.values(), ids=OMITS.keys())
@pytest.mark.parametrize("family", OTHER)
def test_every_omitted_set_equals_the_oracle(family, omit):
    model = shared_other(family)
    assert_equals_oracle(model, plan_of(model, omit, 2), tokens(model, 2, T))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_equals_the_oracle(variant):
    family, over = VARIANTS[variant]
    model = other(family, **over)
    assert_equals_oracle(model, plan_of(model, GAPS, 2), tokens(model, 2, T))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", OTHER)
def test_low_precision_is_as_close_to_float32_as_the_oracle(family, dtype):
    model = shared_other(family, dtype)
    assert_equals_oracle(model, plan_of(model, GAPS, 2), tokens(model, 2, T), logits_to_keep=2)


@pytest.mark.parametrize("boundary", [1, 17, T])
@pytest.mark.parametrize("family", OTHER)
def test_any_boundary_equals_the_oracle(family, boundary):
    model = shared_other(family)
    assert_equals_oracle(model, plan_of(model, GAPS, boundary), tokens(model, 1, T))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", OTHER)
def test_a_padded_batch_and_a_second_turn_equal_the_oracle(family, side):
    model = shared_other(family)
    ids, mask = pad([tokens(model, n, seed=n) for n in (T, 19, 7)], side)
    past = assert_equals_oracle(model, plan_of(model), ids, mask=mask).cache
    if side == "left":  # after padding on the right, sliding caches keep masked slots
        more = torch.cat([mask, torch.ones(3, 9, dtype=torch.long)], 1)
        assert_equals_oracle(model, plan_of(model, GAPS, 2), tokens(model, 3, 9), past=past, mask=more)


@pytest.mark.parametrize("family", OTHER)
def test_full_depth_equals_stock(family):
    model = shared_other(family)
    ids = tokens(model, 2, T)
    expected, _ = run_stock(model, ids)
    assert_close_fp32(run_native(model, plan_of(model, ()), ids, logits_to_keep=5).logits, expected[:, -5:], "logits")


@pytest.mark.parametrize("family", OTHER)
def test_greedy_text_equals_stock_where_only_the_last_layer_is_omitted(family):
    model = shared_other(family)
    ids = tokens(model, 2, 23)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **how)
    with pop_ext.enabled(model, Plan(6, (5,)), strict=True):
        found = model.generate(ids, **how)
        assert pop_ext.last_call(model).backend == "native"
    assert torch.equal(found, expected)


def test_plans_change_the_logits():
    for family in OTHER:
        model = shared_other(family)
        ids = tokens(model, 1, T)
        full, pruned = (run_native(model, plan_of(model, omit), ids).logits for omit in ((), LAST))
        assert (full - pruned).abs().max() > 1e-2, family
