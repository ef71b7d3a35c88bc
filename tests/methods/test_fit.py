"""pop_ext.fit: its solution against least squares, fitted plans against the oracle, planted mistakes."""

from __future__ import annotations

import functools
import math
from contextlib import ExitStack

import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, NATIVE, assert_equals_oracle, plan_of, run_native
from hook_reference import assert_equals_hook_reference, context_rows, held_back_forward
from models import FAMILIES, batches, llama, shared, tokens
from pop_ext.methods.fit_moments import original_projection
from pop_ext.plans.norms import normalize_unweighted
from pop_ext.plans.projections import Projections
from tolerance import assert_close_fp32, compare_caches

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def fitted(family, dtype=torch.float32, omit=GAPS, boundary=3, ridge=0.1, weighting="attention"):
    model = FAMILIES[family](dtype=dtype)
    plan = plan_of(model, omit, boundary)
    return model, pop_ext.fit(model, plan, batches(model), lambdas=[ridge], weighting=weighting)


# The solution


def inputs_and_targets(model, ids, layer, omit):
    """Return a layer's normalised input in the pruned model, and its K and V in the full model without biases."""
    decoder, seen = model.model, {}
    with ExitStack() as stack:

        def keep(name):
            return lambda _module, args, kwargs, output=None: seen.__setitem__(
                name, output if output is not None else (args[0] if args else kwargs["hidden_states"])
            )

        attention = decoder.layers[layer].self_attn
        for name in ("k_proj", "v_proj"):
            hook = getattr(attention, name).register_forward_hook(
                lambda _module, _args, output, name=name: seen.__setitem__(name, output)
            )
            stack.callback(hook.remove)
        decoder(ids)
        wanted = [
            seen[f"{n}_proj"] - (getattr(attention, f"{n}_proj").bias if attention.k_proj.bias is not None else 0)
            for n in "kv"
        ]
        for index in omit:
            hook = decoder.layers[index].register_forward_hook(lambda _module, args, _output: args[0])
            stack.callback(hook.remove)
        stack.callback(decoder.layers[layer].register_forward_pre_hook(keep("h"), with_kwargs=True).remove)
        decoder(ids)
    h = seen["h"]
    norm = getattr(decoder.layers[layer], "input_layernorm", None)
    x = h if norm is None else h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)
    return x.flatten(0, 1).double(), torch.cat(wanted, -1).flatten(0, 1).double()


def attention_of_last_rows(model, ids, run, queries):
    """Return the attention [rows] that the last `queries` rows pay to each row before, averaged over a run, mean 1."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    attentions = model(ids, output_attentions=True).attentions
    model.config._attn_implementation = before
    paid = torch.stack([attentions[layer][:, :, -queries:].sum(2).mean(1) for layer in run]).mean(0).double()
    paid[:, -queries:] = 0
    return (paid / paid.mean(1, keepdim=True)).flatten()


@pytest.mark.parametrize("weighting", ["attention", "uniform"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "olmo2"])
@torch.no_grad()
def test_a_fit_solves_ridge_from_pruned_inputs_to_full_kv(family, weighting):
    model, plan = fitted(family, weighting=weighting)
    assert model.config._attn_implementation == "sdpa"
    assert plan.projections.report.weighting == weighting
    for layer in GAPS:
        run = next(run for run in plan.runs if layer in run)
        parts = [inputs_and_targets(model, ids, layer, GAPS) for ids in batches(model)]
        x, y = (torch.cat(rows) for rows in zip(*parts, strict=True))
        if weighting == "attention":  # a quarter of 40 rows stands for the continuation
            root = torch.cat([attention_of_last_rows(model, ids, run, 10) for ids in batches(model)]).sqrt()[:, None]
            x, y = x * root, y * root
        original = original_projection(model.model.layers[layer]).double()
        scale = math.sqrt(0.1 * float((x.T @ x).diagonal().mean()))
        rows = torch.cat([x, scale * torch.eye(x.shape[1])])
        expected = torch.linalg.lstsq(rows, torch.cat([y, scale * original.T])).solution.T
        assert_close_fp32(plan.projections.matrices[layer], expected, f"layer {layer}", 1e-4)
        energy, before, after = (part.square().sum(0) for part in (y, y - x @ original.T, y - x @ expected.T))
        found = plan.projections.report.residuals[layer]
        for half, name in enumerate("KV"):
            total, first, last = (part.chunk(2)[half].sum() for part in (energy, before, after))
            assert found[2 * half] == pytest.approx(float(first / total), rel=1e-3, abs=1e-6), name
            assert found[2 * half + 1] == pytest.approx(float(last / total), rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("family", NATIVE)
@torch.no_grad()
def test_original_projection_equals_the_layers_kv(family):
    model = shared(family)
    layer = model.model.layers[2]
    h = 3 * torch.randn(7, 96)
    attention = layer.self_attn
    normed = layer.input_layernorm(h) if hasattr(layer, "input_layernorm") else h
    if family == "phi3":
        expected = attention.qkv_proj(normed)[:, -256:]
    else:
        biases = 0 if attention.k_proj.bias is None else torch.cat([attention.k_proj.bias, attention.v_proj.bias])
        expected = torch.cat([attention.k_proj(normed), attention.v_proj(normed)], -1) - biases
    assert_close_fp32(normalize_unweighted(layer, h) @ original_projection(layer).T, expected, "K, V", 1e-4)


def test_only_later_layers_of_a_run_change():
    model, plan = fitted("llama", omit=LAST)
    first, second = (original_projection(model.model.layers[layer]) for layer in LAST)
    matrices = plan.projections.matrices
    assert_close_fp32(matrices[LAST[0]], first, "the first layer, which reads what it was trained on", 1e-4)
    assert (matrices[LAST[1]] - second).norm() > 0.1 * second.norm()


def test_layers_with_zero_branches_need_no_fit():
    model = llama()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[4].get_submodule(name).weight.data.zero_()
    plan = pop_ext.fit(model, plan_of(model, LAST), batches(model), lambdas=[1e-4])
    assert_close_fp32(plan.projections.matrices[5], original_projection(model.model.layers[5]), "layer 5", 1e-3)


@pytest.mark.parametrize("family", NATIVE)
def test_an_infinite_lambda_equals_the_unfitted_plan(family):
    model, plan = fitted(family, ridge=INF)
    ids = tokens(model, 2, 23)
    ours, theirs = run_native(model, plan, ids), run_native(model, plan_of(model, GAPS, 3), ids)
    assert_close_fp32(ours.logits, theirs.logits, "logits", 1e-5)
    compare_caches(ours.cache, theirs.cache, atol=1e-5)


def test_larger_lambdas_stay_closer_to_the_original_projection():
    model = shared("llama")
    original = original_projection(model.model.layers[5])
    off = {}
    for ridge in (1e-3, 1.0, 1e6):
        plan = pop_ext.fit(model, plan_of(model, LAST), batches(model), lambdas=[ridge])
        off[ridge] = float((plan.projections.matrices[5] - original).norm() / original.norm())
    assert off[1e6] < 1e-5 < 0.05 < off[1.0] < off[1e-3]


# Execution


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fitted_plan_equals_the_oracle(family, dtype):
    model, plan = fitted(family, dtype)
    assert plan.projections.dtype == dtype
    assert_equals_oracle(model, plan, tokens(model, 2, 37, seed=5))


@pytest.mark.parametrize("boundary", [1, 2, 17, 36, 37])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_fitted_plan_equals_the_oracle_at_any_boundary(boundary, dtype):
    model, plan = fitted("qwen3", dtype, LAST)
    assert_equals_oracle(model, plan, tokens(model, 1, 37, seed=6), boundary=boundary)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 1)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_fitted_plan_with_gqa_equals_the_oracle(heads, dtype):
    model = llama(heads=heads[0], kv_heads=heads[1], dtype=dtype, head_dim=80)
    plan = pop_ext.fit(model, plan_of(model, GAPS), batches(model), lambdas=[0.3])
    assert_equals_oracle(model, plan, tokens(model, 2, 19))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_a_second_turn_after_a_fitted_prefill_equals_the_oracle(family):
    model, plan = fitted(family)
    first = run_native(model, plan, tokens(model, 2, 21, seed=7))
    assert_equals_oracle(model, plan, tokens(model, 2, 18, seed=8), past=first.cache)


def test_a_retained_last_layer_keeps_its_own_projection():
    # The runtime projects it together with the run before it.
    model = llama()
    plan = pop_ext.fit(model, plan_of(model, (3, 4)), batches(model), lambdas=[0.1])
    assert_equals_oracle(model, plan, tokens(model, 2, 30))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "olmo2"])
@pytest.mark.parametrize("boundary", [1, 5])
def test_the_oracle_of_a_fitted_plan_equals_the_hook_reference(family, boundary):
    model, plan = fitted(family)
    ids = tokens(model, 2, 19, seed=3)
    is_context = (torch.arange(19) < 19 - boundary)[None, :, None]
    with ExitStack() as stack:
        for index in GAPS:
            layer = model.model.layers[index]
            norm = getattr(layer, "input_layernorm", None)
            matrices = dict(zip(("k_proj", "v_proj"), plan.projections.matrices[index].chunk(2), strict=True))
            for name, matrix in matrices.items():

                def on_context_rows(module, args, output, matrix=matrix, norm=norm):
                    x = args[0] if norm is None else args[0] / norm.weight
                    ours = torch.nn.functional.linear(x, matrix, module.bias)
                    return torch.where(is_context, ours, output)

                hook = getattr(layer.self_attn, name).register_forward_hook(on_context_rows)
                stack.callback(hook.remove)
        expected = hook_logits_and_cache(model, ids, boundary)
    assert_close_to_hook_reference(model, plan, ids, boundary, expected)


def hook_logits_and_cache(model, ids, boundary):
    return held_back_forward(model, ids, GAPS, context_rows(torch.ones_like(ids), [boundary] * len(ids)))


def assert_close_to_hook_reference(model, plan, ids, boundary, expected):
    logits, cache = pop_ext.reference.prefill(model, ids, plan, boundary, boundary=boundary)
    assert_close_fp32(logits, expected[0][:, -boundary:], "logits")
    compare_caches(cache, expected[1])


def test_the_hook_reference_tells_fitted_from_unfitted_plans():
    model, plan = fitted("llama")
    ids = tokens(model, 2, 19, seed=3)
    assert_equals_hook_reference(model, ids, GAPS)
    with pytest.raises(AssertionError, match="worst at"):
        assert_close_to_hook_reference(model, plan, ids, 1, hook_logits_and_cache(model, ids, 1))


# Planted mistakes


def swap_k_and_v(matrices):
    k, v = matrices[4].chunk(2)
    matrices[4] = torch.cat([v, k])


def swap_two_layers(matrices):
    matrices[3], matrices[4] = matrices[4], matrices[3]


def forget_one(matrices):
    matrices[4] = original_projection(fitted("llama")[0].model.layers[4])


def multiply_by_gamma_again(matrices):
    matrices[4] = matrices[4] * fitted("llama")[0].model.layers[4].input_layernorm.weight.detach()


@pytest.mark.parametrize("mutate", [swap_k_and_v, swap_two_layers, forget_one, multiply_by_gamma_again])
def test_planted_mistakes_in_the_matrices_are_caught(mutate, monkeypatch):
    model, plan = fitted("llama")

    def stack_rows(self, like):
        matrices = dict(self.matrices)
        mutate(matrices)
        return [matrices[layer] for layer in self.layers]

    monkeypatch.setattr(Projections, "stack_rows", stack_rows)
    with pytest.raises(AssertionError, match="worst at"):
        assert_equals_oracle(model, plan, tokens(model, 1, 30))
