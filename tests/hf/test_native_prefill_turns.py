"""Test native.prefill of padded batches, over filled caches and beyond sliding windows, and decode afterwards."""

from __future__ import annotations

import copy

import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, NATIVE, assert_equals_oracle, plan_of, run_native, run_oracle, run_stock
from cache_kinds import decode
from models import WINDOW, mistral, pad, shared, tokens
from tolerance import assert_close_fp32, compare_caches
from transformers import DynamicCache

LOW = (torch.bfloat16, torch.float16)
T = 40


# Batches


def mixed_padding(model):
    """Return ids and mask [3, 30] of 23, 11 and 1 tokens, padded on the left, on the right and on both sides."""
    ids, mask = torch.zeros(3, 30, dtype=torch.long), torch.zeros(3, 30, dtype=torch.long)
    for i, (start, length) in enumerate([(7, 23), (0, 11), (14, 1)]):
        ids[i, start : start + length], mask[i, start : start + length] = tokens(model, length, seed=i), 1
    return ids, mask


def padded_batch(model, side):
    if side == "mixed":
        return mixed_padding(model)
    return pad([tokens(model, n, seed=n) for n in (T, 19, 1)], side)


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_padded_batch_equals_the_oracle_with_zero_masked_slots(dtype, family, side):
    model = shared(family, dtype=dtype)
    ids, mask = padded_batch(model, side)
    assert_equals_oracle(model, plan_of(model, GAPS, 3), ids, mask=mask)


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
def test_a_padded_batch_of_a_windowed_model_equals_the_oracle(side):
    model = shared("mistral")
    ids, mask = padded_batch(model, side)
    assert_equals_oracle(model, plan_of(model, GAPS, 3), ids, mask=mask, past=DynamicCache())


def test_padding_may_hold_any_id():
    model = shared("llama")
    ids, mask = pad([tokens(model, n, seed=n) for n in (9, 4)], "left", fill=-100)
    assert_equals_oracle(model, plan_of(model), ids, mask=mask)


# Later turns


@pytest.mark.parametrize("past", [1, 2, 19, 65])
@pytest.mark.parametrize("family", NATIVE)
def test_a_second_turn_equals_the_oracle(family, past):
    model = shared(family)
    cache = run_oracle(model, plan_of(model), tokens(model, 2, past, seed=1)).cache
    assert_equals_oracle(model, plan_of(model, GAPS, 2), tokens(model, 2, 19), past=cache)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("family", NATIVE)
def test_a_second_turn_equals_the_oracle_in_low_precision(family, dtype):
    model = shared(family, dtype=dtype)
    cache = run_oracle(model, plan_of(model), tokens(model, 2, 23, seed=1)).cache
    assert_equals_oracle(model, plan_of(model, GAPS, 2), tokens(model, 2, 19), past=cache)


@pytest.mark.parametrize("sides", [("left", "left"), ("left", "right"), ("right", "left"), ("right", "right")], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_second_turn_over_padding_equals_the_oracle(family, sides):
    model = shared(family)
    first, first_mask = pad([tokens(model, n, seed=n) for n in (30, 11, 3)], sides[0])
    second, second_mask = pad([tokens(model, n, seed=n) for n in (7, 20, 1)], sides[1])
    plan = plan_of(model, GAPS, 2)
    cache = run_native(model, plan, first, attention_mask=first_mask, past_key_values=DynamicCache()).cache
    mask = torch.cat([first_mask, second_mask], dim=1)
    assert_equals_oracle(model, plan, second, past=cache, mask=mask)


def test_a_third_turn_over_two_holes_equals_the_oracle():
    model = shared("llama")
    plan, cache, mask = plan_of(model, LAST, 2), DynamicCache(), torch.zeros(2, 0, dtype=torch.long)
    for turn, lengths in enumerate([(13, 5), (2, 9), (6, 6)]):
        ids, new_mask = pad([tokens(model, n, seed=10 * turn + n) for n in lengths], "right")
        mask = torch.cat([mask, new_mask], dim=1)
        cache = assert_equals_oracle(model, plan, ids, past=cache, mask=mask).cache


def test_masked_slots_of_the_past_are_not_attended():
    model = shared("llama")
    _, cache = run_stock(model, tokens(model, 1, 12, seed=1))
    mask = torch.ones(1, 12 + 9, dtype=torch.long)
    mask[0, 3:6] = 0
    ours = run_native(model, plan_of(model), tokens(model, 1, 9), past_key_values=cache, attention_mask=mask)
    _, cache = run_stock(model, tokens(model, 1, 12, seed=1))
    theirs = run_oracle(model, plan_of(model), tokens(model, 1, 9), past_key_values=cache, attention_mask=mask)
    assert_close_fp32(ours.logits, theirs.logits, "logits")
    new = [layer.keys[:, :, 12:] for layer in ours.cache.layers]
    for a, e in zip(new, [layer.keys[:, :, 12:] for layer in theirs.cache.layers], strict=True):
        assert_close_fp32(a, e, "keys of the new tokens")


@pytest.mark.parametrize("family", NATIVE)
def test_a_chunked_prefill_equals_the_oracle_chunk_by_chunk(family):
    model = shared(family)
    ids, plan, cache = tokens(model, 2, 51), plan_of(model, GAPS, 3), None
    for begin, end in [(0, 20), (20, 21), (21, 45), (45, 51)]:
        cache = assert_equals_oracle(model, plan, ids[:, begin:end], past=cache, oracle_past=cache).cache


def test_a_chunked_prefill_that_omits_nothing_equals_one_call():
    model = shared("llama")
    ids, plan, cache = tokens(model, 1, 50), plan_of(model, ()), None
    for begin, end in [(0, 17), (17, 18), (18, 50)]:
        result = run_native(model, plan, ids[:, begin:end], past_key_values=cache)
        cache = result.cache
    whole = run_native(model, plan, ids)
    assert_close_fp32(result.logits, whole.logits, "logits")
    compare_caches(cache, whole.cache)


# Sliding windows


@pytest.mark.parametrize("given", ["DynamicCache(config)", "DynamicCache()"])
@pytest.mark.parametrize("boundary", [1, 5, WINDOW + 1])
@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_prompts_around_the_sliding_window_equal_the_oracle(family, length, boundary, given):
    model = shared(family, use_sliding_window=True) if family == "qwen2" else shared(family)
    cache = DynamicCache(config=model.config) if "config" in given else DynamicCache()
    plan = plan_of(model, GAPS, min(boundary, length))
    result = assert_equals_oracle(model, plan, tokens(model, 2, length), past=cache, oracle_past=DynamicCache())
    windowed = {1, 3, 5} if family == "qwen2" else set(range(6))
    for index, layer in enumerate(result.cache.layers):
        kept = min(length, WINDOW - 1) if "config" in given and index in windowed else length
        assert layer.keys.shape[2] == kept


@pytest.mark.parametrize("window", [1, 2])
def test_the_smallest_windows_equal_the_oracle(window):
    model = mistral(sliding_window=window)
    assert_equals_oracle(model, plan_of(model, GAPS, 3), tokens(model, 1, 19), past=DynamicCache())


# Decode


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("family", NATIVE)
def test_decode_over_the_native_cache_equals_decode_over_the_oracles(family, side):
    model, plan = shared(family), plan_of(shared(family), GAPS, 2)
    ids, mask = tokens(model, 2, T), None
    if side is not None:
        ids, mask = pad([tokens(model, n, seed=n) for n in (T, 9)], side)
    ours = run_native(model, plan, ids, attention_mask=mask)
    theirs = run_oracle(model, plan, ids, attention_mask=mask)
    following = tokens(model, 2, 6, seed=5)
    assert_close_fp32(
        decode(model, ours.cache, following, mask), decode(model, theirs.cache, following, mask), "decode logits"
    )


@pytest.mark.parametrize("family", NATIVE)
def test_greedy_generation_equals_the_oracle(family):
    # With tied and scaled embeddings, random weights would repeat one token.
    original = shared(family, tied=False) if family.startswith("gemma") else shared(family)
    ids = tokens(original, 2, 33, seed=1)
    generated = {}
    for backend in ("native", "reference"):
        model = copy.deepcopy(original)
        pop_ext.enable(model, plan_of(model, LAST), strict=True, backend=backend)
        mask = torch.ones_like(ids)
        generated[backend] = model.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False)[:, 33:]
        assert pop_ext.last_call(model).backend == backend
    for row in generated["native"]:
        assert len(row) == 64
        assert len(set(row.tolist())) >= 16
    assert torch.equal(generated["native"], generated["reference"])
