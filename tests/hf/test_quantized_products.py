"""Test prefill with fp8 and int8: a product, and a whole prefill against an oracle that rounds its operands alike.

Rounding itself is tested in test_quantize_rows.py, sums of int8 in test_int8.py.
"""

from __future__ import annotations

import copy
import pickle

import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, plan_of, run_oracle
from models import float32_twin, llama, shared, tokens
from op_operands import random, strided
from pop_ext import UnsupportedModelError
from quantized_oracle import rounded, rounded_twin
from tolerance import assert_low_precision, compare_caches, rms, stored_layers
from tuning import tuned

pop = torch.ops.pop

PRODUCTS = ("fp8", pytest.param("int8", marks=pytest.mark.cpu))
OTHER_DTYPES = (torch.float32, torch.float16)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "olmo2")


# fp8_linear


def test_infinity_makes_only_its_own_row_nan():
    x, weight = random(3, 32), random(16, 32, seed=1)
    x[1, 7] = torch.inf
    out = pop.fp8_linear(x.bfloat16(), *pop.quantize_rows(weight))
    assert out.isnan().all(1).tolist() == [False, True, False]
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 16), (3, 96), (65, 160), (2, 19, 2080)], ids=str)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.cpu), torch.bfloat16], ids=str)
def test_a_product_equals_that_of_the_rounded_operands(dtype, shape):
    x, weight = random(*shape, dtype=dtype), random(48, shape[-1], dtype=dtype, seed=1)
    values, scale = pop.quantize_rows(weight)
    expected = rounded(x).double() @ rounded(weight).double().T
    out = pop.fp8_linear(strided(x), values, scale)
    assert out.dtype == dtype
    tolerance = expected.abs().max().item() * 4 * torch.finfo(dtype).eps + 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


# A whole prefill


def load(model, plan, products):
    return pop_ext.load(model, plan, **{products: True})


def tokens_without_ties(model, plan, products):
    """Return ids without rounding ties in the first layer: no operand whose rounding the last bits of float32 decide.

    A few such ties move the following layers by more than the tests below allow.
    """
    for seed in range(20):
        ids = tokens(model, 2, 40, seed=seed)
        exact, rounded_values, *moved = (
            stored_layers(run_oracle(m, plan, ids).cache)[1].values
            for m in (
                model,
                rounded_twin(model, plan, products),
                *(rounded_twin(model, plan, products, 1e-7) for _ in range(4)),
            )
        )
        if all(rms(values - rounded_values) < 0.03 * rms(exact - rounded_values) for values in moved):
            return ids
    raise AssertionError("expected ids without rounding ties within 20 seeds")


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_int8_mlp_of_several_blocks_of_k_with_biases_equals_the_oracle(dtype):
    """Sums of gate and up wait for the last block, whose columns and biases are those of a part of the MLP."""
    model = llama(hidden_size=2112, intermediate_size=2080, layers=2, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    plan = plan_of(model, (), 1)
    ids = tokens(model, 1, 70)
    exact, expected = (
        stored_layers(run_oracle(m, plan, ids).cache)[1] for m in (model, rounded_twin(model, plan, "int8"))
    )
    actual = stored_layers(load(model.to(dtype), plan, "int8").prefill(ids).past_key_values)[1]
    allowed = 0.3 * rms(exact.values - expected.values) + 0.02 * (dtype != torch.float32) * rms(exact.values)
    assert rms(actual.values.float() - expected.values) < allowed


@pytest.mark.parametrize("omit", [(), LAST, GAPS], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.cpu  # CUDA devices take bfloat16 alone
def test_a_prefill_equals_the_oracle_of_rounded_operands(family, omit, products):
    """Allow a part of the rounding error, since some roundings tip over: little at first, more in later layers."""
    model = shared(family)
    plan = plan_of(model, omit, 2)
    ids = tokens_without_ties(model, plan, products)
    exact, expected = (run_oracle(m, plan, ids, logits_to_keep=2) for m in (model, rounded_twin(model, plan, products)))
    actual = load(model, plan, products).prefill(ids, logits_to_keep=2)
    # int8 rounds less than fp8, so a rounding that tips over is a larger part of its error.
    late = {"fp8": 0.5, "int8": 0.7}[products]
    assert rms(actual.logits - expected.logits) < late * rms(exact.logits - expected.logits)
    caches = (actual.past_key_values, expected.cache, exact.cache)
    for index, stored in enumerate(zip(*map(stored_layers, caches), strict=True)):
        first = max(layer.first for layer in stored)
        part = 1e-4 if index == 0 else 0.1 if index == 1 else late
        for kind in ("keys", "values"):
            ours, theirs, without = (getattr(layer, kind)[:, :, first - layer.first :] for layer in stored)
            assert rms(ours - theirs) <= part * rms(without - theirs) + 1e-6, f"layer {index}: {kind}"


@pytest.mark.parametrize("kept", range(5))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.cpu
def test_each_single_rounded_layer_equals_the_oracle(family, kept, products):
    """Retain one layer, so that only its products round and few roundings tip over before the next layer reads them."""
    model = shared(family)
    plan, ids = plan_of(model, tuple(layer for layer in range(5) if layer != kept), 2), tokens(model, 2, 40)
    exact, expected = (run_oracle(m, plan, ids) for m in (model, rounded_twin(model, plan, products)))
    actual = load(model, plan, products).prefill(ids)
    part = {"fp8": 0.1, "int8": 0.15}[products]  # as above
    caches = (actual.past_key_values, expected.cache, exact.cache)
    stored = [stored_layers(cache)[kept + 1] for cache in caches]
    first = max(layer.first for layer in stored)
    for kind in ("keys", "values"):
        ours, theirs, without = (getattr(layer, kind)[:, :, first - layer.first :] for layer in stored)
        assert rms(ours - theirs) <= part * rms(without - theirs), kind


@pytest.mark.cuda
def test_early_launches_give_the_same_bits():
    model = shared(dtype=torch.bfloat16)
    native, ids = pop_ext.load(model, plan_of(model), fp8=True), tokens(model, 2, 200)
    expected = native.prefill(ids).logits
    with tuned(early_launch=1):
        assert torch.equal(native.prefill(ids).logits, expected)


@pytest.mark.parametrize("omit", [(), GAPS], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("products", PRODUCTS)
def test_8_bits_in_bfloat16_are_as_close_as_the_rounded_oracle(family, omit, products):
    model = shared(family, dtype=torch.bfloat16)
    plan, ids = plan_of(model, omit, 3), tokens(model, 2, 40)
    truth = run_oracle(rounded_twin(float32_twin(model), plan, products), plan, ids, logits_to_keep=2)
    same_dtype = run_oracle(rounded_twin(model, plan, products), plan, ids, logits_to_keep=2)
    actual = load(model, plan, products).prefill(ids, logits_to_keep=2)
    assert_low_precision(actual.logits, same_dtype.logits, truth.logits, "logits")
    compare_caches(actual.past_key_values, same_dtype.cache, oracle_fp32=truth.cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *(pytest.param(t, marks=pytest.mark.cpu) for t in OTHER_DTYPES)])
@pytest.mark.parametrize("products", PRODUCTS)
def test_8_bits_change_the_result_slightly(products, dtype):
    model = shared(dtype=dtype)
    plan, ids = plan_of(model), tokens(model, 1, 40)
    exact = pop_ext.load(model, plan).prefill(ids).logits
    rough = load(model, plan, products).prefill(ids).logits
    assert 0.001 < rms(rough - exact) / rms(exact) < 0.3


def test_omitted_layers_get_no_fp8_weights():
    """Omit every layer but the first, so that only the first layer gets 8-bit weights: matrices and scales."""
    model = shared(dtype=torch.bfloat16)
    plan = plan_of(model, (1, 2, 3, 4, 5))
    native = pop_ext.load(model, plan, fp8=True)
    config = model.config
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    rows = heads * config.head_dim + config.hidden_size + 2 * config.intermediate_size
    attention = (heads + config.num_attention_heads) * config.head_dim * config.hidden_size
    matrices = attention + 3 * config.hidden_size * config.intermediate_size
    scales = 4 * (rows + config.hidden_size)
    assert native.extra_bytes == pop_ext.load(model, plan).extra_bytes + matrices + scales


@pytest.mark.cpu
def test_omitted_layers_get_no_int8_weights():
    """As above, without k and v."""
    model = shared(dtype=torch.bfloat16)
    plan = plan_of(model, (1, 2, 3, 4, 5))
    native = load(model, plan, "int8")
    layer = model.model.layers[0]
    linears = [
        layer.self_attn.q_proj,
        layer.self_attn.o_proj,
        layer.mlp.gate_proj,
        layer.mlp.up_proj,
        layer.mlp.down_proj,
    ]
    expected = sum(tensor.nbytes for linear in linears for tensor in pop.quantize_rows(linear.weight, "int8"))
    assert native.extra_bytes == pop_ext.load(model, plan).extra_bytes + expected


@pytest.mark.parametrize("products", PRODUCTS)
def test_the_same_call_gives_the_same_bits(products):
    model = shared(dtype=torch.bfloat16)
    native = load(model, plan_of(model), products)
    ids = tokens(model, 2, 70)
    assert torch.equal(native.prefill(ids).logits, native.prefill(ids).logits)


# Enabled models, generation, fitted plans


@pytest.mark.parametrize("products", PRODUCTS)
def test_an_enabled_model_and_its_copies_prefill_in_8_bits(products):
    model = llama(dtype=torch.bfloat16)
    plan, ids = plan_of(model), tokens(model, 1, 40)
    expected = load(model, plan, products).prefill(ids).logits
    pop_ext.enable(model, plan, strict=True, **{products: True})
    with torch.no_grad():
        assert torch.equal(model(ids, logits_to_keep=1).logits, expected)
        assert f"in 8-bit {'floats' if products == 'fp8' else 'integers'}" in str(pop_ext.last_call(model))
        decision = pop_ext.explain(model, input_ids=ids, logits_to_keep=1)
        assert decision.products == products
        assert (decision.fp8, decision.int8) == (products == "fp8", products == "int8")
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(ids, logits_to_keep=1).logits, expected)
        with pop_ext.enabled(model, plan):
            assert not torch.equal(model(ids, logits_to_keep=1).logits, expected)
            assert "8-bit" not in str(pop_ext.last_call(model))
            assert pop_ext.last_call(model).products is None
        assert torch.equal(model(ids, logits_to_keep=1).logits, expected)


@pytest.mark.parametrize("products", PRODUCTS)
def test_generation_decodes_with_the_stock_model(products):
    model = llama(dtype=torch.bfloat16)
    ids = tokens(model, 1, 40)
    native = load(model, plan_of(model), products)
    out = native.prefill(ids)
    first = out.logits[:, -1].argmax(-1, keepdim=True)
    with torch.no_grad():
        second = model(first, past_key_values=out.past_key_values).logits[:, -1].argmax(-1, keepdim=True)
    pop_ext.enable(model, plan_of(model), strict=True, **{products: True})
    generated = model.generate(ids, max_new_tokens=2, do_sample=False)
    assert torch.equal(generated[:, 40:], torch.cat([first, second], 1))


@pytest.mark.parametrize("products", PRODUCTS)
def test_8_bits_work_with_a_fitted_plan(products):
    model = llama(dtype=torch.bfloat16)
    plan = pop_ext.fit(model, plan_of(model), [tokens(model, 2, 40, seed=seed) for seed in range(8)])
    ids = tokens(model, 1, 40)
    fitted, own = (load(model, p, products).prefill(ids) for p in (plan, plan.replace(projections=None)))
    for index, (a, b) in enumerate(zip(fitted.past_key_values.layers, own.past_key_values.layers, strict=True)):
        assert torch.equal(a.values[:, :, :-1], b.values[:, :, :-1]) == (index not in plan.omit)


# Refused models


@pytest.mark.parametrize("products", ["fp8", "int8"])
def test_models_with_experts_are_refused_only_with_8_bits(products):
    model = shared("mixtral", dtype=torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match=f"{products}: expected a model without experts, got one of 4"):
        load(model, "third", products)
    pop_ext.load(model, "third")


def test_odd_sizes_are_refused_by_name_with_fp8():
    model = llama(dtype=torch.bfloat16, intermediate=150)
    with pytest.raises(UnsupportedModelError, match="fp8: expected intermediate_size to be a multiple of 16, got 150"):
        pop_ext.enable(model, "third", fp8=True)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_refused_on_a_gpu(dtype):
    model = llama(dtype=dtype).cuda()
    with pytest.raises(UnsupportedModelError, match="fp8: expected bfloat16 on a CUDA device"):
        pop_ext.load(model, "third", fp8=True)


@pytest.mark.cpu
def test_int8_takes_odd_sizes():
    model = llama(dtype=torch.float32, intermediate=150, hidden=72)
    plan, ids = plan_of(model), tokens(model, 2, 40)
    exact, expected = (run_oracle(m, plan, ids) for m in (model, rounded_twin(model, plan, "int8")))
    actual = load(model, plan, "int8").prefill(ids)
    assert rms(actual.logits - expected.logits) < 0.5 * rms(exact.logits - expected.logits)


@pytest.mark.cuda
def test_int8_is_refused_on_a_gpu():
    model = llama(dtype=torch.bfloat16).cuda()
    with pytest.raises(UnsupportedModelError, match="int8: expected a model on a CPU, got one on a CUDA device"):
        load(model, "third", "int8")
