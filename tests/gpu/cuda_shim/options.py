"""The options of the CUDA backend change which kernel runs, never the result. Run by `make shim`."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from models import gemma2, gemma3, mistral, olmo2, qwen2, tokens
from op_calls import op_call, run_op
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
