"""Checks of the tests themselves: every layer of a test model matters, and comparisons catch planted mistakes."""

from __future__ import annotations

import copy

import pytest
import torch
from against_oracle import LAST, plan_of
from hook_reference import context_rows, held_back_forward
from models import FAMILIES, ROPE_KINDS, llama, shared, tokens
from pop_ext import reference
from pop_ext.reference import projection
from tolerance import assert_close_fp32, assert_low_precision, compare_caches, rms

T = 40


# The test models


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_skipping_any_layer_moves_the_logits_by_a_tenth(family, tied):
    model = FAMILIES[family](tied=tied, layers=8)
    ids = tokens(model, 1, T)
    logits = model(ids).logits[:, -1]
    for layer in model.model.layers:
        hook = layer.register_forward_hook(lambda _layer, args, _output: args[0])
        moved = model(ids).logits[:, -1]
        hook.remove()
        assert rms(moved - logits) > 0.1 * rms(logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_test_models_are_deterministic_with_logits_of_scale_one(family):
    first, second = FAMILIES[family](), FAMILIES[family]()
    ids = tokens(first, 2, T)
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert 0.5 < rms(first(ids).logits) < 2.0


@pytest.mark.parametrize("kind", [kind for kind in ROPE_KINDS if kind != "default"])
@torch.no_grad()
def test_each_rope_scaling_differs_from_the_default(kind):
    ids = tokens(shared("llama"), 1, T)
    default, scaled = (shared("llama")(ids).logits[:, -1], llama(rope=kind)(ids).logits[:, -1])
    assert rms(scaled - default) > 0.1 * rms(default)


# Planted mutations, each of which the comparison must catch


def without_rope(layer, hidden_states, cos, sin, fitted=None):
    return original_projection(layer, hidden_states, torch.ones_like(cos), torch.zeros_like(sin))


def rope_one_position_late(layer, hidden_states, cos, sin, fitted=None):
    return original_projection(layer, hidden_states, cos.roll(1, dims=1), sin.roll(1, dims=1))


def without_gamma(layer, hidden_states, cos, sin, fitted=None):
    bare = copy.deepcopy(layer)
    bare.input_layernorm.weight.data.fill_(1.0)
    return original_projection(bare, hidden_states, cos, sin)


def gamma_of_the_wrong_norm(layer, hidden_states, cos, sin, fitted=None):
    other = copy.copy(layer)
    other._modules = {**layer._modules, "input_layernorm": layer.post_attention_layernorm}
    return original_projection(other, hidden_states, cos, sin)


def values_from_the_unnormalised_state(layer, hidden_states, cos, sin, fitted=None):
    keys, values = original_projection(layer, hidden_states, cos, sin)
    raw = layer.self_attn.v_proj(hidden_states).view(1, hidden_states.shape[1], -1, values.shape[-1])
    return keys, raw.transpose(1, 2)


original_projection = reference.project_kv
MUTATIONS = [
    without_rope,
    rope_one_position_late,
    without_gamma,
    gamma_of_the_wrong_norm,
    values_from_the_unnormalised_state,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_planted_mistake_in_the_projection_is_caught(monkeypatch, family, mutation):
    model = shared(family)
    ids = tokens(model, 1, T)
    expected, expected_cache = held_back_forward(model, ids, LAST, context_rows(torch.ones_like(ids), [1]))
    monkeypatch.setattr(projection, "project_kv", mutation)
    monkeypatch.setattr(projection, "check_projection", lambda *_: None)
    logits, cache = reference.prefill(model, ids, plan_of(model, LAST))
    with pytest.raises(AssertionError, match="logits: max error"):
        assert_close_fp32(logits, expected[:, -1:], "logits")
    with pytest.raises(AssertionError, match="layer 4"):
        compare_caches(cache, expected_cache)


@pytest.mark.parametrize(
    "mutation", [without_rope, without_gamma, values_from_the_unnormalised_state], ids=lambda f: f.__name__
)
def test_other_kv_projections_are_refused(monkeypatch, mutation):
    model = shared("llama")
    monkeypatch.setattr(projection, "project_kv", mutation)
    with pytest.raises(ValueError, match=r"model: expected K = .*LlamaAttention of layer 4"):
        reference.prefill(model, tokens(model, 1, T), plan_of(model, LAST))


def test_missing_boundary_kv_is_caught():
    model = shared("llama")
    ids = tokens(model, 1, T)
    _, expected_cache = held_back_forward(model, ids, LAST, context_rows(torch.ones_like(ids), [1]))
    _, all_context = held_back_forward(model, ids, LAST, torch.ones_like(ids, dtype=torch.bool))
    with pytest.raises(AssertionError, match=rf"layer 5 keys.*worst at \[0, \d, {T - 1}, "):
        compare_caches(all_context, expected_cache)


def test_low_precision_bounds_reject_large_rms_and_single_errors():
    truth = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    oracle = truth.bfloat16()
    assert_low_precision(oracle, oracle, truth, "same")
    with pytest.raises(AssertionError, match="RMS error"):
        assert_low_precision((truth + 3 * (oracle - truth)).half(), oracle.half(), truth, "thrice")
    wild = oracle.clone()
    wild[7] += 0.05
    with pytest.raises(AssertionError, match=r"max error .*worst at \[7\]"):
        assert_low_precision(wild, oracle, truth, "wild")


def test_a_nan_fails_the_comparison():
    values = torch.tensor([1.0, float("nan")])
    with pytest.raises(AssertionError):
        assert_close_fp32(values, torch.ones(2), "nan")
    with pytest.raises(AssertionError):
        assert_low_precision(values.bfloat16(), torch.ones(2).bfloat16(), torch.ones(2), "nan")
