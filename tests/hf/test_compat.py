"""Test both names of the cache argument: `past_key_values`, and `cache` from transformers 5.24 on."""

from __future__ import annotations

import logging
import warnings

import pop_ext
import pytest
import torch
from enabled_models import PLAN, T, filled_cache, generate
from models import llama, tokens
from pop_ext import reference
from pop_ext.hf.compat import NEW_CACHE_NAME, OLD_CACHE_NAME, cache_argument, cache_of, rename_cache, with_cache
from tolerance import assert_close_fp32, compare_caches
from transformers import DynamicCache, LlamaForCausalLM

RENAMED = cache_argument(LlamaForCausalLM.forward) == NEW_CACHE_NAME
NAMES = [OLD_CACHE_NAME, NEW_CACHE_NAME] if RENAMED else [OLD_CACHE_NAME]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_prefill_takes_its_cache_under_every_stock_name(name):
    model = pop_ext.enable(llama(), PLAN, strict=True)
    cache = filled_cache(model)
    expected, filled = reference.prefill(model, tokens(model, 1, T), PLAN, past_key_values=cache)
    output = model(tokens(model, 1, T), **{name: cache}, logits_to_keep=1)
    assert pop_ext.last_call(model).native
    assert cache_of(output) is cache
    assert_close_fp32(output.logits, expected, "logits")
    compare_caches(cache, filled)


@torch.no_grad()
def test_a_prefill_takes_its_cache_by_position():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    cache = filled_cache(model)
    output = model(tokens(model, 1, T), None, None, cache, logits_to_keep=1)
    assert pop_ext.last_call(model).native
    assert cache_of(output) is cache
    assert cache.get_seq_length() == 7 + T


@torch.no_grad()
def test_the_new_cache_name_takes_precedence_over_the_old_one():
    signature = pop_ext.enable(llama(), PLAN).forward.__signature__
    arguments = {OLD_CACHE_NAME: "old", NEW_CACHE_NAME: "new"}
    rename_cache(arguments, signature)
    assert arguments == ({OLD_CACHE_NAME: "new"} if RENAMED else {OLD_CACHE_NAME: "old", NEW_CACHE_NAME: "new"})


@pytest.mark.parametrize("backend", ["native", "reference"])
@torch.no_grad()
def test_enabled_calls_cause_no_warnings(backend, caplog):
    model = pop_ext.enable(llama(), PLAN, strict=True, backend=backend)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        output = model(tokens(model, 1, T), **with_cache(model, DynamicCache()), logits_to_keep=1)
        model(tokens(model, 1, 1), **with_cache(model, cache_of(output)), logits_to_keep=1)
        generate(model, tokens(model, 1, T), 3)
    assert not [record for record in caplog.records if "deprecated" in record.getMessage()]
