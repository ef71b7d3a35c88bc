"""Test quantised caches: a call reads its own K and V exactly, and earlier ones dequantised."""

from __future__ import annotations

import functools

import pop_ext
import pytest
import torch
from against_oracle import plan_of, run_native, run_oracle
from enabled_models import PLAN, enabled_twin, generate
from models import llama, pad, tokens
from pop_ext.hf.kv_cache import CacheTransaction
from pop_ext.reference.caches import dequantized
from tolerance import assert_close_fp32
from transformers import DynamicCache, QuantizedCache, cache_utils

pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")

BACKENDS = {"quanto": {"nbits": 4, "q_group_size": 32, "residual_length": 16}}
if hasattr(cache_utils, "Fp8QuantizedLayer"):  # transformers 5.24
    BACKENDS["fp8"] = {}
T = 19

shared = functools.cache(llama)


def new_cache(backend: str, model) -> QuantizedCache:
    return QuantizedCache(backend, model.config, **BACKENDS[backend])


def exact(cache: QuantizedCache) -> DynamicCache:
    """Return the dequantised content of a cache."""
    result = DynamicCache()
    for index, layer in enumerate(cache.layers):
        result.update(*dequantized(layer), index)
    return result


def assert_holds(cache: QuantizedCache, expected: DynamicCache, first: int, backend: str, model) -> None:
    """Assert that from column `first` on, `cache` holds the quantised values of `expected`.

    Up to 2 % of the values may differ: those on the edge of a rounding.
    """
    theirs = new_cache(backend, model)
    for index, layer in enumerate(expected.layers):
        theirs.update(layer.keys[:, :, first:], layer.values[:, :, first:], index)
    for ours, theirs_layer in zip(exact(cache).layers, exact(theirs).layers, strict=True):
        for kind in ("keys", "values"):
            a, e = getattr(ours, kind)[:, :, first:], getattr(theirs_layer, kind)
            assert a.shape == e.shape
            assert ((a - e).abs() > 1e-3).float().mean() < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_prefill_into_a_quantised_cache_equals_the_oracle(backend, batch):
    model = shared()
    cache = new_cache(backend, model)
    expected = run_oracle(model, plan_of(model), tokens(model, batch, T))
    actual = run_native(model, plan_of(model), tokens(model, batch, T), past_key_values=cache)
    assert actual.cache is cache
    assert cache.get_seq_length() == T
    assert_close_fp32(actual.logits, expected.logits, "logits")
    assert_holds(cache, expected.cache, 0, backend, model)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("turns", [(T, 5, 9), (3, 1, 30), (40, 17)])
def test_later_turns_read_dequantised_keys_and_values(backend, turns):
    model = shared()
    cache = new_cache(backend, model)
    for turn, length in enumerate(turns):
        ids = tokens(model, 2, length, seed=turn)
        expected = run_oracle(model, plan_of(model), ids, past_key_values=cache)
        actual = run_native(model, plan_of(model), ids, past_key_values=cache)
        assert_close_fp32(actual.logits, expected.logits, f"turn {turn}")
    assert cache.get_seq_length() == sum(turns)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_in_a_quantised_cache_is_masked(backend):
    model = shared()
    ids, mask = pad([tokens(model, n, seed=n) for n in (4, T, 11)], "left")
    expected = run_oracle(model, plan_of(model), ids, attention_mask=mask)
    actual = run_native(model, plan_of(model), ids, attention_mask=mask, past_key_values=new_cache(backend, model))
    assert_close_fp32(actual.logits, expected.logits, "logits")


@pytest.mark.skipif("fp8" not in BACKENDS, reason="before 5.24 transformers does not reorder what is quantised")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_turn_over_a_reordered_quantised_cache_equals_the_oracle(backend):
    model = shared()
    cache = new_cache(backend, model)
    run_native(model, plan_of(model), tokens(model, 2, T), past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    expected = run_oracle(model, plan_of(model), tokens(model, 2, 7, seed=1), past_key_values=cache)
    actual = run_native(model, plan_of(model), tokens(model, 2, 7, seed=1), past_key_values=cache)
    assert_close_fp32(actual.logits, expected.logits, "logits")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("past", [0, T])
def test_an_aborted_call_leaves_a_quantised_cache_unchanged(backend, past):
    model = shared()
    cache = new_cache(backend, model)
    if past:
        run_native(model, plan_of(model), tokens(model, 1, past), past_key_values=cache)
    before = [dict(layer.__dict__) for layer in cache.layers]
    like = torch.empty(0, 2, 0, 64)
    transaction = CacheTransaction(cache, like, len(cache.layers), 1, past, 5, None)
    transaction.key_cache[0].normal_()
    transaction.abort()
    for layer, attributes in zip(cache.layers, before, strict=True):
        assert layer.__dict__.keys() == attributes.keys()
        assert all(layer.__dict__[name] is value for name, value in attributes.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_generate_with_a_quantised_cache_runs_natively_and_as_the_oracle(backend):
    model = llama()
    how = {"cache_implementation": "quantized", "cache_config": {"backend": backend, **BACKENDS[backend]}}
    native, oracle = enabled_twin(model, PLAN, strict=True), enabled_twin(model, PLAN, strict=True, backend="reference")
    actual = generate(native, tokens(model, 1, T), **how)
    assert pop_ext.last_call(native).native
    assert actual.tolist() == generate(oracle, tokens(model, 1, T), **how).tolist()
