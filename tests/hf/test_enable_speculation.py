"""Test speculative decoding of an enabled model: drafts by an assistant, by early exit and by prompt lookup."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from enabled_models import generate, recorded
from generating_families import FAMILIES, PLAN, T
from models import llama, tokens
from pop_ext import Plan
from tolerance import compare_caches
from transformers import StaticCache, cache_utils


@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_generation_gives_the_tokens_of_plain_greedy_decoding(family):
    model = pop_ext.enable(FAMILIES[family](), PLAN, strict=True)
    assistant = FAMILIES[family]()
    for parameter in assistant.model.layers[5].parameters():
        parameter.data.mul_(0.9)  # so that drafts are accepted often, not always
    ids = tokens(model, 1, T)
    expected = generate(model, ids, 24)
    decisions = recorded(model)
    assert torch.equal(generate(model, ids, 24, assistant_model=assistant), expected)
    # The first call prunes the prompt but not its candidates. Later verifications are no prefill.
    (decision,) = decisions
    candidates = decision.tokens[0] - T
    assert candidates > 0
    assert decision.boundary == (candidates + 1,)


def test_an_enabled_assistant_is_prefilled_natively():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    assistant = pop_ext.enable(llama(layers=2), Plan(2, (1,)), strict=True)
    ids = tokens(model, 1, T)
    expected = generate(model, ids, 24)
    decisions = recorded(assistant)
    assert torch.equal(generate(model, ids, 24, assistant_model=assistant), expected)
    assert decisions[0].tokens == (T,)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prompt_lookup_gives_the_tokens_of_plain_greedy_decoding(family):
    model = pop_ext.enable(FAMILIES[family](), PLAN, strict=True)
    ids = tokens(model, 1, 12).repeat(1, 3)
    expected = generate(model, ids, 24)
    decisions = recorded(model)
    assert torch.equal(generate(model, ids, 24, prompt_lookup_num_tokens=4), expected)
    assert decisions[0].native
    assert decisions[0].boundary == (decisions[0].tokens[0] - 36 + 1,)


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="transformers 5.17 has no static cache for it"
)
@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_candidates_in_a_static_cache_with_room_for_them_give_the_tokens_of_plain_greedy_decoding(how):
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 1, 12).repeat(1, 3)
    options = {"assistant_model": llama()} if how == "assistant" else {"prompt_lookup_num_tokens": 4}
    expected = generate(model, ids, 24)
    cache = StaticCache(config=model.config, max_cache_len=96)  # the one of generate is too short for the last drafts
    decisions = recorded(model)
    assert torch.equal(generate(model, ids, 24, past_key_values=cache, **options), expected)
    assert decisions[-1].native
    assert decisions[-1].boundary == (decisions[-1].tokens[0] - 36 + 1,)


def test_drafts_by_early_exit_give_the_tokens_of_plain_greedy_decoding():
    model, twin = (pop_ext.enable(llama(), PLAN, strict=True) for _ in range(2))
    ids = tokens(model, 1, T)
    decisions = recorded(model)
    assert torch.equal(generate(model, ids, 24, assistant_early_exit=4), generate(twin, ids, 24))
    (decision,) = decisions  # of the whole model; its first layers draft with the stock forward
    candidates = decision.tokens[0] - T
    assert candidates > 0
    assert decision.boundary == (candidates + 1,)


@pytest.mark.parametrize("how", ["assistant", "early exit", "prompt lookup"])
def test_accepted_candidates_leave_the_cache_of_plain_greedy_decoding(how):
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 1, 12).repeat(1, 3)
    options = {
        "assistant": {"assistant_model": llama()},
        "early exit": {"assistant_early_exit": 5},
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
    }[how]
    plain, speculated = (
        generate(model, ids, 24, return_dict_in_generate=True, **more).past_key_values for more in ({}, options)
    )
    length = min(plain.get_seq_length(), speculated.get_seq_length())
    assert length >= 36 + 22
    for cache in (plain, speculated):
        cache.crop(length - cache.get_seq_length())
    compare_caches(speculated, plain)
