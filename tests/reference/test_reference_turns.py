"""The oracle over a filled cache, and decode by the stock model over the oracle's cache."""

from __future__ import annotations

import pytest
import torch
from against_oracle import GAPS, LAST, plan_of, run_stock
from hook_reference import assert_equals_hook_reference, context_rows, held_back_forward
from models import FAMILIES, WINDOW, pad, shared, tokens
from pop_ext import reference
from tolerance import assert_close_fp32, compare_caches, stored_layers
from transformers import DynamicCache, StaticCache

T = 40


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("past", [1, WINDOW - 1, WINDOW, 30])
def test_a_second_turn_equals_the_hook_reference(family, past):
    model = shared(family)
    _, cache = reference.prefill(model, tokens(model, 2, past, seed=1), plan_of(model, LAST))
    assert_equals_hook_reference(model, tokens(model, 2, 19), GAPS, boundary=2, past=cache)


@pytest.mark.parametrize("past", [1, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, 30])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2 mixed"])
def test_a_second_turn_reads_any_stock_cache(name, static, past):
    family = name.split()[0]
    model = shared(family, use_sliding_window=True) if "mixed" in name else shared(family)
    config, new = model.config, 19
    given = StaticCache(config=config, max_cache_len=past + new + 3) if static else DynamicCache(config=config)
    first = tokens(model, 2, past, seed=1)
    _, full = run_stock(model, first)
    run_stock(model, first, past_key_values=given)
    ids, plan = tokens(model, 2, new), plan_of(model, GAPS, 2)
    expected, expected_cache = reference.prefill(model, ids, plan, 2, past_key_values=full)
    logits, cache = reference.prefill(model, ids, plan, 2, past_key_values=given)
    assert_close_fp32(logits, expected, "logits")
    for a, e in zip(stored_layers(cache), stored_layers(expected_cache), strict=True):
        assert a.length == past + new
        assert_close_fp32(a.keys[:, :, past:], e.keys[:, :, past:], "keys")
        assert_close_fp32(a.values[:, :, past:], e.values[:, :, past:], "values")


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_holes_of_right_padding_in_the_past_are_skipped(family):
    model = shared(family)
    turns = [[tokens(model, n, seed=n) for n in lengths] for lengths in ((30, 11), (7, 20))]
    plan = plan_of(model, LAST, 2)
    first, first_mask = pad(turns[0], "right")
    second, second_mask = pad(turns[1], "left")
    mask = torch.cat([first_mask, second_mask], dim=1)
    _, cache = reference.prefill(model, first, plan, attention_mask=first_mask)
    logits, cache = reference.prefill(model, second, plan, attention_mask=mask, past_key_values=cache)
    for i in range(2):
        _, alone_cache = reference.prefill(model, turns[0][i][None], plan)
        alone, alone_cache = reference.prefill(model, turns[1][i][None], plan, past_key_values=alone_cache)
        assert_close_fp32(logits[i], alone[0], f"logits of sequence {i}")
        for a, e in zip(stored_layers(cache), stored_layers(alone_cache), strict=True):
            assert_close_fp32(a.keys[i][:, mask[i].bool()], e.keys[0], "keys")
            assert_close_fp32(a.values[i][:, mask[i].bool()], e.values[0], "values")


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_decode_continues_the_hook_reference(family):
    model = shared(family)
    ids, steps, boundary = tokens(model, 2, T + 6), 6, 3
    context = context_rows(torch.ones_like(ids), [boundary + steps] * 2)
    expected, expected_cache = held_back_forward(model, ids, GAPS, context)
    _, cache = reference.prefill(model, ids[:, :T], plan_of(model, GAPS, boundary))
    for column in range(T, T + steps):
        logits, cache = run_stock(model, ids[:, column : column + 1], past_key_values=cache)
        assert_close_fp32(logits[:, 0], expected[:, column], f"logits of column {column}")
    compare_caches(cache, expected_cache)


@pytest.mark.parametrize("side", ["left", "right"])
def test_decode_of_a_padded_batch_equals_decode_alone(side):
    model = shared("llama")
    sequences = [tokens(model, n, seed=n) for n in (T, 19)]
    plan, step = plan_of(model, LAST, 2), tokens(model, 2, 1, seed=9)
    ids, mask = pad(sequences, side)
    _, cache = reference.prefill(model, ids, plan, attention_mask=mask)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    call = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
    logits, _ = run_stock(model, step, past_key_values=cache, **call)
    for i, sequence in enumerate(sequences):
        _, alone_cache = reference.prefill(model, sequence[None], plan)
        alone, _ = run_stock(model, step[i : i + 1], past_key_values=alone_cache)
        assert_close_fp32(logits[i], alone[0], f"logits of sequence {i}")


def test_generate_continues_from_the_returned_cache():
    model = shared("mistral")
    ids = tokens(model, 1, T)
    _, cache = reference.prefill(model, ids[:, :-1], plan_of(model, LAST))
    out = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape == (1, T + 5)
