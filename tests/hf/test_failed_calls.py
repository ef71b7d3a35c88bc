"""Test the rollback of failed calls: the cache under the oracle, and the frequencies of rotary modules."""

from __future__ import annotations

import copy

import pop_ext
import pytest
import torch
from against_oracle import GAPS, plan_of, run_stock
from cache_kinds import KINDS, new_cache
from models import llama, qwen2, tokens
from pop_ext import reference
from pop_ext.reference import projection
from transformers import StaticCache, cache_utils


def state_of(thing) -> dict:
    """Return a copy of the attributes of a module or a cache layer."""
    return {name: copy.deepcopy(value) for name, value in thing.__dict__.items() if name != "_modules"}


def assert_same_state(actual: dict, expected: dict) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        found = actual[name]
        if isinstance(value, torch.Tensor):
            assert torch.equal(found, value), name
        elif name == "_buffers":
            assert_same_state(found, value)
        else:
            assert found == value, name


@pytest.mark.parametrize("filled", [0, 12, 30])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_failing_cache_update_is_rolled_back_by_the_reference_backend(kind, filled):
    model = qwen2(use_sliding_window=True)
    cache = new_cache(kind, model, capacity=48)
    if filled:
        run_stock(model, tokens(model, 1, filled), past_key_values=cache)
    layers, before = list(cache.layers), [state_of(layer) for layer in cache.layers]
    pop_ext.enable(model, plan_of(model, GAPS), backend="reference")
    update = cache.update

    def fail_at_layer_3(keys, values, index, *rest):
        if index == 3:
            raise MemoryError("planted")
        return update(keys, values, index, *rest)

    cache.update = fail_at_layer_3
    with pytest.raises(MemoryError, match="planted"):
        model(tokens(model, 1, 9, seed=1), past_key_values=cache, logits_to_keep=1)
    assert len(cache.layers) == len(layers)
    assert all(layer is kept for layer, kept in zip(cache.layers, layers, strict=True))
    for layer, kept in zip(layers, before, strict=True):
        assert_same_state(layer.__dict__, kept)


class FailingZeros:
    """Stand in for `torch` in a module of transformers: the n-th call of `zeros` fails as if memory ran out."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __getattr__(self, name):
        return getattr(torch, name)

    def zeros(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise MemoryError("planted")
        return torch.zeros(*args, **kwargs)


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
@torch.no_grad()
def test_memory_that_runs_out_while_a_static_cache_is_made_leaves_every_layer_as_it_was(monkeypatch, enabled, sliding):
    model = qwen2(use_sliding_window=sliding)
    native, ids = pop_ext.load(model, plan_of(model, GAPS)), tokens(model, 1, 9)
    pop_ext.enable(model, plan_of(model, GAPS))
    cache = StaticCache(config=model.config, max_cache_len=48)
    layers, before = list(cache.layers), [state_of(layer) for layer in cache.layers]
    run = (
        (lambda: model(ids, past_key_values=cache, logits_to_keep=1))
        if enabled
        else (lambda: native.prefill(ids, past_key_values=cache))
    )
    for at in range(1, 2 * len(layers) + 1):
        with monkeypatch.context() as patch:
            patch.setattr(cache_utils, "torch", FailingZeros(at))
            with pytest.raises(MemoryError, match="planted"):
                run()
        assert cache.get_seq_length() == 0
        for layer, kept in zip(layers, before, strict=True):
            assert_same_state(layer.__dict__, kept)
    expected = native.prefill(ids).logits
    assert torch.equal(run().logits, expected)


# Rotary modules of a scaled RoPE keep frequencies for the length of the last call.


def too_small(model):
    return StaticCache(config=model.config, max_cache_len=40)


def two_layers_in_the_same_memory(model):
    cache = StaticCache(config=model.config, max_cache_len=200)
    pop_ext.load(model, "third").prefill(tokens(model, 1, 9), past_key_values=cache)
    cache.layers[2].keys = cache.layers[1].keys
    return cache


@pytest.mark.parametrize("make", [too_small, two_layers_in_the_same_memory])
@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_refused_cache_leaves_scaled_rope_frequencies_unchanged(rope, make):
    model = llama(rope=rope)
    native, cache = pop_ext.load(model, "third"), make(model)
    before = state_of(model.model.rotary_emb)
    with pytest.raises((ValueError, RuntimeError), match=r"past_key_values|key_cache"):
        native.prefill(tokens(model, 1, 150), past_key_values=cache)
    assert_same_state(state_of(model.model.rotary_emb), before)
    native.prefill(tokens(model, 1, 150))
    assert not torch.equal(model.model.rotary_emb.inv_freq, before["_buffers"]["inv_freq"])


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_failing_oracle_leaves_scaled_rope_frequencies_unchanged(rope, monkeypatch):
    model = llama(rope=rope)
    before = state_of(model.model.rotary_emb)
    monkeypatch.setattr(projection, "project_kv", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reference.prefill(model, tokens(model, 1, 150), plan_of(model, GAPS))
    assert_same_state(state_of(model.model.rotary_emb), before)
