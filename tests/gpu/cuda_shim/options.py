"""The options of the CUDA backend change which kernel runs, never the result. Run by `make shim`."""

from __future__ import annotations

from typing import Any

import pop_ext
import pytest
import torch
from models import FAMILIES, gemma2, gemma3, mistral, olmo2, phi3, qwen2, shared, tokens
from op_calls import op_call, run_op
from other_families import shared_other
from threads import run_threads
from torch.profiler import ProfilerActivity, profile
from tuning import tuned

LENGTHS = (70, 3, 33)


def results(native, boundary: int) -> list[torch.Tensor]:
    call = op_call(
        native,
        [tokens(native.model, n, seed=n) for n in LENGTHS],
        boundary=[min(boundary, n) for n in LENGTHS],
        logits_to_keep=[1, 2, 1],
    )
    return [run_op(call), *call["key_cache"], *call["value_cache"]]


def model_of(family: str, dtype: torch.dtype):
    return shared(family, dtype=dtype) if family in FAMILIES else shared_other(family, dtype)


def counted(call, name: str) -> tuple[Any, int]:
    """Return the result of a call, and how often it called an operator of torch."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        result = call()
    return result, sum(event.count for event in seen.key_averages() if event.key == name)


@pytest.fixture(params=[mistral, qwen2, gemma2, gemma3, olmo2], ids=lambda build: build.__name__)
def native(request):
    model = request.param()
    return pop_ext.load(model, pop_ext.Plan(model.config.num_hidden_layers, (1, 2, 4)))


@pytest.mark.parametrize("rows", [0, 64])
def test_any_share_of_the_kernel_for_few_rows_gives_the_same_result(native, rows):
    expected = results(native, 17)
    with tuned(skinny_rows=rows):
        actual = results(native, 17)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("build", [mistral, gemma3, olmo2], ids=lambda build: build.__name__)
def test_a_run_of_three_projected_a_few_layers_at_a_time_gives_the_same_result(build, layers):
    model = build()
    native = pop_ext.load(model, pop_ext.Plan(model.config.num_hidden_layers, (1, 2, 3)))
    expected = results(native, 1)
    bytes_a_layer = (sum(LENGTHS) - 4) * 2 * native.spec.kv_dim * 4  # of the context rows
    with tuned(kv_project_kib=-(-layers * bytes_a_layer // 1024)):
        actual = results(native, 1)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("build", [mistral, qwen2, gemma2], ids=lambda build: build.__name__)
def test_few_rows_on_tensor_cores_give_the_same_result(build, dtype):
    model = build(dtype=dtype)
    native = pop_ext.load(model, pop_ext.Plan(model.config.num_hidden_layers, (1, 2, 4)))
    with tuned(skinny_rows=0):
        expected = results(native, 17)
    with tuned(skinny_rows=0, skinny_mma_rows=64):
        actual = results(native, 17)
    if dtype == torch.float16:  # whose bits show another order of sums in each of these models
        assert any(not torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("boundary", [1, 17])
def test_residuals_added_by_products_give_the_same_result(native, boundary):
    with tuned(residual_in_product=0):
        expected = results(native, boundary)
    for ours, theirs in zip(results(native, boundary), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_residual_added_by_a_product_is_rounded_once():
    """The result is closer to float32 arithmetic on the same weights than that of a product rounded before the add."""
    errors = []
    for seed in range(4):
        model = mistral(dtype=torch.bfloat16)
        plan = pop_ext.Plan(model.config.num_hidden_layers, (1, 2))
        ids = tokens(model, 1, 90, seed=seed)
        truth = (
            pop_ext.load(mistral(dtype=torch.bfloat16).float(), plan)
            .prefill(ids, boundary=80, logits_to_keep=80)
            .hidden_states
        )
        native = pop_ext.load(model, plan)
        for option in (0, 1):
            with tuned(residual_in_product=option):
                hidden = native.prefill(ids, boundary=80, logits_to_keep=80).hidden_states.float()
            errors.append((hidden - truth).square().mean())
    assert sum(errors[1::2]) < sum(errors[0::2])


def test_a_changed_addmm_leaves_residuals_to_the_norms(native):
    with tuned(residual_in_product=0):
        expected = results(native, 17)
    torch.ops.pop.set_foreign("aten::addmm.out", -1, "under torch 9.9: other")
    try:
        actual = results(native, 17)
    finally:
        torch.ops.pop.set_foreign("aten::addmm.out", 0, "")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


@pytest.mark.parametrize("boundary", [1, 17])
@pytest.mark.parametrize("rows", [0, 64], ids=["library", "skinny"])
def test_q_k_and_v_of_one_product_are_those_of_three(rows, boundary):
    model = phi3()
    native = pop_ext.load(model, pop_ext.Plan(model.config.num_hidden_layers, (1, 2)))
    with tuned(qkv_in_one_product=0, skinny_rows=rows):
        expected = results(native, boundary)
    with tuned(skinny_rows=rows):
        actual = results(native, boundary)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("build", "saved"), [(phi3, 2), (mistral, 0)], ids=["phi3", "mistral"])
def test_q_k_and_v_take_one_product_where_a_matrix_holds_all_three(build, saved):
    model = build()
    native = pop_ext.load(model, pop_ext.Plan(model.config.num_hidden_layers, ()))
    ids = tokens(model, 1, 40)

    def products() -> int:
        return counted(lambda: native.prefill(ids, logits_to_keep=40), "aten::mm")[1]

    with tuned(qkv_in_one_product=0):
        apart = products()
    assert apart > 0
    assert apart - products() == saved * model.config.num_hidden_layers


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("boundary", [1, 17])
def test_grouped_experts_give_the_same_result(family, boundary):
    model = model_of(family, torch.bfloat16)
    native = pop_ext.load(model, pop_ext.Plan(model.config.num_hidden_layers, (2,)))
    with tuned(skinny_rows=0):  # the same library for both
        expected = results(native, boundary)
        with tuned(grouped_experts=1):
            actual, products = counted(lambda: results(native, boundary), "aten::_grouped_mm")
    assert products > 0
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("family", "dtype"), [("qwen3_moe", torch.float32), ("gpt_oss", torch.bfloat16)], ids=["float32", "biases"]
)
def test_experts_that_torch_cannot_group_run_one_by_one(family, dtype):
    native = pop_ext.load(model_of(family, dtype), "third")
    expected = results(native, 1)
    with tuned(grouped_experts=1):
        actual, products = counted(lambda: results(native, 1), "aten::_grouped_mm")
    assert products == 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


def test_a_changed_grouped_product_leaves_experts_to_the_host():
    native = pop_ext.load(shared("qwen3_moe", dtype=torch.bfloat16), "third")
    expected = results(native, 1)
    torch.ops.pop.set_foreign("aten::_grouped_mm", -1, "under torch 9.9: other")
    try:
        with tuned(grouped_experts=1):
            actual, products = counted(lambda: results(native, 1), "aten::_grouped_mm")
    finally:
        torch.ops.pop.set_foreign("aten::_grouped_mm", 0, "")
    assert products == 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


def test_options_belong_to_the_thread_that_sets_them():
    with tuned(skinny_rows=3):
        assert run_threads(lambda: torch.ops.pop.tune("skinny_rows", 5)) == [8]
        assert torch.ops.pop.tune("skinny_rows", 3) == 3


@pytest.mark.parametrize(("option", "given", "kept"), [("skinny_rows", 1000, 64), ("sdpa_rows", -1, 0)])
def test_values_beyond_their_range_are_clamped(option, given, kept):
    with tuned(**{option: given}):
        assert torch.ops.pop.tune(option, given) == kept


def test_an_unknown_option_is_refused():
    text = "expected gemm_blocks, skinny_rows, skinny_mma_rows, library_attention, .*got speed"
    with pytest.raises(RuntimeError, match=text):
        torch.ops.pop.tune("speed", 1)


def test_a_changed_product_of_8_bit_floats_is_refused_by_name_and_asked_for_by_no_other_model():
    model = mistral(dtype=torch.bfloat16)
    torch.ops.pop.set_foreign("aten::_scaled_mm.out", -1, "under torch 9.9: other")
    try:
        with pytest.raises(pop_ext.UnsupportedModelError, match="fp8: expected an aten::_scaled_mm.out .* torch 9.9"):
            pop_ext.load(model, "third", fp8=True)
        pop_ext.load(model, "third").prefill(tokens(model, 1, 9))
    finally:
        torch.ops.pop.set_foreign("aten::_scaled_mm.out", 0, "")
    pop_ext.load(model, "third", fp8=True)
