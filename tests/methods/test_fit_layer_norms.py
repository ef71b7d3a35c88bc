"""pop_ext.fit behind a LayerNorm, with a bias and without: Starcoder2, Cohere, Nemotron; other norms are refused."""

from __future__ import annotations

import functools

import pop_ext
import pytest
import torch
from against_oracle import GAPS, plan_of
from models import batches, build, llama, tokens
from pop_ext import reference
from pop_ext.methods import autoplan as module
from pop_ext.methods.fit_moments import original_projection
from pop_ext.plans.norms import normalize_unweighted
from pop_ext.plans.projections import fitted_biases
from portable_calls import run_portable
from tolerance import assert_close_fp32
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

KINDS = {
    "starcoder2": (Starcoder2ForCausalLM, Starcoder2Config, {"head_dim": 24}),
    "cohere": (CohereForCausalLM, CohereConfig, {"head_dim": 24}),
    "nemotron": (NemotronForCausalLM, NemotronConfig, {}),
}


@functools.cache
def model_of(kind, dtype=torch.float32):
    model_class, config_class, more = KINDS[kind]
    return build(model_class, config_class, {**more, "dtype": dtype})


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_original_matrix_and_biases_give_the_layers_kv(kind):
    layer = model_of(kind).model.layers[2]
    h = 3 * torch.randn(7, 96, generator=torch.Generator().manual_seed(0)) + 1
    normed, biases = layer.input_layernorm(h), fitted_biases(layer)
    ours = normalize_unweighted(layer, h) @ original_projection(layer).T
    ours += torch.cat([torch.zeros(ours.shape[1] // 2) if bias is None else bias for bias in biases])
    expected = torch.cat([layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)], -1)
    assert_close_fp32(ours, expected, "K, V", 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_lambda_equals_the_unfitted_plan_and_a_finite_one_lowers_the_error(kind):
    model = model_of(kind)
    plan, ids = plan_of(model, GAPS, 2), tokens(model, 1, 20)
    same, fitted = (pop_ext.fit(model, plan, batches(model), lambdas=[ridge]) for ridge in (float("inf"), 0.1))
    assert_close_fp32(reference.prefill(model, ids, same)[0], reference.prefill(model, ids, plan)[0], "logits", 1e-3)
    for layer in GAPS[1:]:
        k_before, k_after, v_before, v_after = fitted.projections.report.residuals[layer]
        assert k_after < 0.9 * k_before
        assert v_after < 0.9 * v_before


@pytest.mark.parametrize("method", ["ridge", "distill"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_portable_backend_runs_the_fit_like_the_oracle(kind, method):
    model = model_of(kind)
    more = {"steps": 4} if method == "distill" else {}
    plan = pop_ext.fit(model, plan_of(model, GAPS, 2), batches(model), lambdas=[0.1], method=method, **more)
    ids = tokens(model, 1, 20)
    theirs, _ = reference.prefill(model, ids, plan)
    assert_close_fp32(run_portable(model, plan, ids).logits, theirs, "logits", 1e-3)
    unfitted, _ = reference.prefill(model, ids, plan.replace(projections=None))
    assert not torch.allclose(theirs, unfitted, atol=1e-2)


def test_low_precision_finds_the_same_kind_of_norm():
    model = model_of("starcoder2", torch.bfloat16)
    plan = pop_ext.fit(model, plan_of(model, GAPS), batches(model), lambdas=[0.1])
    assert plan.projections.dtype == torch.bfloat16


@torch.no_grad()
def test_a_changed_bias_of_the_norm_is_another_weight():
    model = build(Starcoder2ForCausalLM, Starcoder2Config, {"head_dim": 24})
    plan = pop_ext.fit(model, plan_of(model, GAPS), batches(model), lambdas=[0.1])
    model.model.layers[3].input_layernorm.bias += 1
    with pytest.raises(ValueError, match=r"expected a fit on the weights that the model has, .* \(layer 3"):
        reference.prefill(model, tokens(model, 1, 20), plan)


# Refusals


def olmo():
    return build(OlmoForCausalLM, OlmoConfig, {"head_dim": 24})


def rotated():
    """Return a Llama with a norm that is neither of the two."""
    model = llama()

    class Rotated(type(model.model.layers[5].input_layernorm)):
        def forward(self, hidden_states):
            return super().forward(hidden_states).roll(1, -1)

    model.model.layers[5].input_layernorm.__class__ = Rotated
    return model


@pytest.mark.parametrize(("make", "name"), [(olmo, "OlmoLayerNorm"), (rotated, "Rotated")])
def test_a_norm_that_cannot_be_fitted_is_refused_before_the_search(make, name, monkeypatch):
    model = make()
    text = rf'model: expected an RMSNorm or a LayerNorm before K and V, .* got {name}; .*method="unfitted"'
    with pytest.raises(ValueError, match=text):
        pop_ext.fit(model, plan_of(model), batches(model), lambdas=[0.1])
    monkeypatch.setattr(module, "split_texts", lambda *_: pytest.fail("texts were read"))
    with pytest.raises(ValueError, match=text):
        pop_ext.autoplan(model, ["text"], max_kl=1.0, tokenizer=object(), trial=pop_ext.Trial(tokens=48))


def test_a_model_that_the_oracle_does_not_run_is_refused_before_the_search(monkeypatch):
    model = llama()
    attention = model.model.layers[5].self_attn
    forward = attention.forward
    attention.forward = lambda hidden_states, **call: forward(2 * hidden_states, **call)
    monkeypatch.setattr(module, "split_texts", lambda *_: pytest.fail("texts were read"))
    with pytest.raises(ValueError, match="but LlamaAttention of layer 5 computes something else"):
        pop_ext.autoplan(
            model, ["text"], max_kl=1.0, method="unfitted", tokenizer=object(), trial=pop_ext.Trial(tokens=48)
        )
