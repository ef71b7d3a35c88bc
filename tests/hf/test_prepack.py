"""Test prefill with prepacked weights: accuracy, when they are used, copies, and changes of the model."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, NATIVE, plan_of, run_oracle
from models import float32_twin, llama, shared, tokens
from op_operands import strided
from pop_ext import UnsupportedModelError, ops
from tolerance import assert_low_precision, compare_caches, rms

pytestmark = [pytest.mark.avx512_bf16, pytest.mark.cpu]

DENSE = tuple(family for family in NATIVE if family not in ("mixtral", "qwen3_moe"))
FEW = 6 if torch.cpu._init_amx() else 12  # up to this many rows, weights are streamed unpacked
LINEAR = "mkldnn::_linear_pointwise"


def prepacked(model, omit=LAST, boundary=1):
    return pop_ext.load(model, plan_of(model, omit, boundary), prepack=True)


@pytest.mark.parametrize("omit", [(), LAST, GAPS], ids=str)
@pytest.mark.parametrize("family", DENSE)
def test_prepacked_prefill_is_as_close_as_the_oracle_in_bfloat16(family, omit):
    model = shared(family, dtype=torch.bfloat16)
    plan, ids = plan_of(model, omit, 3), tokens(model, 2, 111)
    truth = run_oracle(float32_twin(model), plan, ids, logits_to_keep=2)
    same_dtype = run_oracle(model, plan, ids, logits_to_keep=2)
    actual = prepacked(model, omit, 3).prefill(ids, logits_to_keep=2)
    assert_low_precision(actual.logits, same_dtype.logits, truth.logits, "logits")
    compare_caches(actual.past_key_values, same_dtype.cache, oracle_fp32=truth.cache)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, FEW, FEW + 1, 19, 129, 500, 513, 1025])
def test_any_number_of_rows_matches_unpacked_weights(count, threads):
    torch.set_num_threads(threads)
    model = shared(dtype=torch.bfloat16)
    ids = tokens(model, 1, count)
    expected = pop_ext.load(model, plan_of(model)).prefill(ids).logits
    assert rms(prepacked(model).prefill(ids).logits - expected) < 0.02 * rms(expected)


def test_odd_sizes_and_strided_weights_match_unpacked_weights():
    model = llama(intermediate=151, dtype=torch.bfloat16)
    ids = tokens(model, 1, 40)
    expected = prepacked(model).prefill(ids).logits
    plain = pop_ext.load(model, plan_of(model)).prefill(ids).logits
    assert rms(expected - plain) < 0.02 * rms(plain)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(strided(module.weight.detach()))
    assert torch.equal(prepacked(model).prefill(ids).logits, expected)


def test_prepacked_weights_are_used_beyond_few_rows(without_linear):
    model = shared(dtype=torch.bfloat16)
    native, plain = prepacked(model), pop_ext.load(model, plan_of(model))
    with without_linear():
        native.prefill(tokens(model, 1, FEW))
        plain.prefill(tokens(model, 1, 200))
        with pytest.raises(RuntimeError, match=f"{LINEAR}: disabled: taken away"):
            native.prefill(tokens(model, 1, FEW + 1))
    native.prefill(tokens(model, 1, FEW + 1))


@pytest.fixture
def without_linear():
    """Return a context manager that disables torch's product with prepacked weights."""

    class Without:
        def __enter__(self):
            torch.ops.pop.set_foreign(LINEAR, -1, "taken away")

        def __exit__(self, *_):
            ops._find_foreign()

    return Without


def test_prepack_is_refused_without_the_product_of_torch(without_linear):
    model = shared(dtype=torch.bfloat16)
    with without_linear():
        with pytest.raises(UnsupportedModelError, match=f"prepack: expected a {LINEAR} of a .* taken away; without"):
            pop_ext.load(model, "third", prepack=True)
        pop_ext.load(model, "third").prefill(tokens(model, 1, 40))


def test_only_layers_that_context_rows_enter_are_copied():
    model = shared(dtype=torch.bfloat16)
    config, omit = model.config, (1, 2, 3, 4, 5)
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
    elements = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    without = pop_ext.load(model, plan_of(model, omit)).extra_bytes
    assert prepacked(model, omit).extra_bytes == without + 2 * elements


def test_two_threads_at_once_get_the_same_bits():
    model = shared(dtype=torch.bfloat16)
    native, ids = prepacked(model), tokens(model, 2, 70)
    expected = native.prefill(ids).logits
    with ThreadPoolExecutor(2) as pool:
        for out in pool.map(lambda _: native.prefill(ids), range(8)):
            assert torch.equal(out.logits, expected)


def test_copies_of_an_enabled_model_stay_prepacked():
    model = llama(dtype=torch.bfloat16)
    plan, ids = plan_of(model), tokens(model, 1, 40)
    expected = prepacked(model).prefill(ids).logits
    pop_ext.enable(model, plan, strict=True, prepack=True)
    with torch.no_grad():
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(ids, logits_to_keep=1).logits, expected)
            assert "prepack=True" in repr(twin.forward.backend.native)
        with pop_ext.enabled(model, plan):
            model(ids, logits_to_keep=1)
            assert "prepack" not in repr(model.forward.backend.native)


def test_a_model_cast_to_float32_runs_portably():
    model = llama(dtype=torch.bfloat16)
    pop_ext.enable(model, plan_of(model), prepack=True)
    model.float()
    with torch.no_grad():
        decision = pop_ext.explain(model, input_ids=tokens(model, 1, 40), logits_to_keep=1)
    assert decision.backend == "portable"
    assert "prepack: expected bfloat16 weights, got float32" in decision.reason


def test_prepack_works_with_a_fitted_plan():
    model = llama(dtype=torch.bfloat16)
    plan = pop_ext.fit(model, plan_of(model), [tokens(model, 2, 40, seed=seed) for seed in range(8)])
    ids = tokens(model, 1, 40)
    packed, plain = (pop_ext.load(model, plan, prepack=prepack).prefill(ids) for prepack in (True, False))
    assert rms(packed.logits - plain.logits) < 0.02 * rms(plain.logits)
