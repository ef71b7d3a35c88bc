"""Test that `enable` keeps the meaning of a call: with nothing pruned the result equals the stock model."""

from __future__ import annotations

import copy
from typing import Any

import pop_ext
import pytest
import torch
from enabled_models import LAYERS, PLAN, T, enabled_twin, filled_cache
from models import llama, mistral, pad, qwen2, tokens
from pop_ext import Plan, reference
from tolerance import assert_close_fp32, compare_caches, stored_layers
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask


def assert_equals_stock(model: nn.Module, *args: Any, real: torch.Tensor | None = None, **call: Any) -> None:
    """Assert that a native call with nothing pruned gives the stock logits and K/V.

    Args:
        real: [batch, slots], the slots whose K/V are compared; None compares all.
    """
    expected = model(*copy.deepcopy(args), **copy.deepcopy(call))
    for omit in ((), (LAYERS - 1,)):
        twin = enabled_twin(model, Plan(LAYERS, omit), strict=True)
        actual = twin(*copy.deepcopy(args), **copy.deepcopy(call))
        assert pop_ext.last_call(twin).native
        assert_close_fp32(actual.logits, expected.logits, "logits")
        ours = stored_layers(actual.past_key_values)
        for index, (a, e) in enumerate(zip(ours, stored_layers(expected.past_key_values), strict=True)):
            assert (a.length, a.first) == (e.length, e.first)
            mask = torch.ones(a.keys.shape[0], a.length) if real is None else real
            rows = mask[:, a.first : a.length].bool()
            for kind in ("keys", "values"):
                kept = [getattr(x, kind).transpose(1, 2)[rows] for x in (a, e)]
                assert_close_fp32(kept[0], kept[1], f"layer {index} {kind}")


BUILDS = {"llama": llama, "mistral": mistral, "qwen2": lambda: qwen2(use_sliding_window=True)}


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("family", BUILDS)
@torch.no_grad()
def test_an_unpruned_prefill_equals_the_stock_model(family, keep):
    model = BUILDS[family]()
    assert_equals_stock(model, tokens(model, 2, T), logits_to_keep=keep)


@pytest.mark.parametrize("family", BUILDS)
@torch.no_grad()
def test_left_padded_positions_count_columns_like_the_stock_model(family):
    model = BUILDS[family]()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T, 12)], "left")
    assert_equals_stock(model, ids, attention_mask=mask, logits_to_keep=1, real=mask)


@torch.no_grad()
def test_given_positions_are_used():
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T)], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert_equals_stock(model, ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, real=mask)
    shifted = torch.arange(T)[None] + 40
    assert_equals_stock(model, ids, attention_mask=mask, position_ids=shifted, logits_to_keep=1, real=mask)


@torch.no_grad()
def test_embeddings_as_input_equal_the_stock_model():
    model = llama()
    embeds = torch.randn(2, T, model.config.hidden_size)
    assert_equals_stock(model, inputs_embeds=embeds, logits_to_keep=1)


@pytest.mark.parametrize("family", BUILDS)
@torch.no_grad()
def test_a_second_turn_equals_the_stock_model(family):
    model = BUILDS[family]()
    cache = filled_cache(model, 23, batch=2)
    assert_equals_stock(model, tokens(model, 2, T), past_key_values=cache, logits_to_keep=1)


@torch.no_grad()
def test_a_second_turn_after_left_padding_equals_the_stock_model():
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T)], "left")
    cache = model(ids, attention_mask=mask, logits_to_keep=1).past_key_values
    longer = torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], dim=1)
    assert_equals_stock(
        model, tokens(model, 2, 8), past_key_values=cache, attention_mask=longer, logits_to_keep=1, real=longer
    )


@pytest.mark.parametrize("kind", ["bool", "float"])
@torch.no_grad()
def test_a_causal_4d_mask_is_read_as_padding(kind):
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T)], "left")
    model.config._attn_implementation = "sdpa" if kind == "bool" else "eager"
    embeds = model.get_input_embeddings()(ids)
    causal = create_causal_mask(model.config, embeds, mask, None)
    assert causal.ndim == 4
    assert_equals_stock(model, ids, attention_mask=causal, logits_to_keep=1, real=mask)


@torch.no_grad()
def test_a_4d_mask_over_a_static_cache_is_read_as_padding():
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T)], "left")
    cache = StaticCache(config=model.config, max_cache_len=50)
    model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    longer = torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], dim=1)
    embeds = torch.empty(2, 8, 0)
    causal = create_causal_mask(model.config, embeds, longer, cache)
    assert causal.shape == (2, 1, 8, 50)
    assert_equals_stock(
        model, tokens(model, 2, 8), past_key_values=cache, attention_mask=causal, logits_to_keep=1, real=longer
    )


@torch.no_grad()
def test_a_dict_of_one_causal_mask_is_read_as_padding():
    model = qwen2()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T)], "left")
    causal = create_causal_mask(model.config, model.get_input_embeddings()(ids), mask, None)
    for masks in ({"full_attention": causal}, {"full_attention": None}):
        real = None if masks["full_attention"] is None else mask
        assert_equals_stock(model, ids, attention_mask=masks, logits_to_keep=1, real=real)


@torch.no_grad()
def test_return_dict_false_returns_the_stock_tuple():
    model = llama()
    ids = tokens(model, 1, T)
    expected = model(ids, logits_to_keep=1, return_dict=False)
    actual = enabled_twin(model, Plan(LAYERS, ()), strict=True)(ids, logits_to_keep=1, return_dict=False)
    assert type(actual) is type(expected) is tuple
    assert len(actual) == len(expected) == 2
    assert_close_fp32(actual[0], expected[0], "logits")
    compare_caches(actual[1], expected[1])


@torch.no_grad()
def test_positional_arguments_are_accepted():
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T)], "left")
    assert_equals_stock(model, ids, mask, None, DynamicCache(), logits_to_keep=1, real=mask)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_the_given_cache_is_filled_like_the_stock_one(family, kind, backend):
    model = BUILDS[family]()
    ids = tokens(model, 2, T)

    def cache() -> Any:
        makers = {
            "none": lambda: None,
            "dynamic": lambda: DynamicCache(config=model.config),
            "static": lambda: StaticCache(config=model.config, max_cache_len=40),
        }
        return makers[kind]()

    stock = model(ids, past_key_values=cache(), logits_to_keep=1).past_key_values
    given = cache()
    twin = enabled_twin(model, strict=True, backend=backend)
    filled = twin(ids, past_key_values=given, logits_to_keep=1).past_key_values
    if given is not None:
        assert filled is given
    assert type(filled) is type(stock)
    assert [type(layer) for layer in filled.layers] == [type(layer) for layer in stock.layers]
    for ours, theirs in zip(stored_layers(filled), stored_layers(stock), strict=True):
        assert (ours.length, ours.first, ours.keys.shape) == (theirs.length, theirs.first, theirs.keys.shape)
    compare_caches(filled, reference.prefill(model, ids, PLAN)[1])


@torch.no_grad()
def test_a_prefill_of_a_pruned_model_equals_the_oracle():
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T, 1)], "left")
    positions = torch.arange(T)[None]
    twin = enabled_twin(model, PLAN.replace(boundary=2), strict=True)
    actual = twin(ids, attention_mask=mask, logits_to_keep=1)
    expected, cache = reference.prefill(
        model, ids, PLAN.replace(boundary=2), attention_mask=mask, position_ids=positions
    )
    assert_close_fp32(actual.logits, expected, "logits")
    compare_caches(actual.past_key_values, cache, mask=mask)
