"""Mixtures of experts with biases of routers and shared experts: what is refused, and weights that change."""

from __future__ import annotations

import copy
import math
from typing import Any

import pop_ext
import pytest
import torch
from against_oracle import GAPS, assert_equals_oracle, plan_of
from models import ROUTER_BIAS, tokens
from other_families import other, shared_other
from pop_ext.hf.architectures import UnsupportedModelError
from pop_ext.hf.weight_map import describe
from torch import Tensor, nn

GLM = ("glm4_moe", "sarvam_moe", "dots1", "solar_open", "exaone_moe")


def bias_of(model: Any, layer: int = 3) -> Tensor:
    return next(buffer for name, buffer in model.model.layers[layer].named_buffers() if name.endswith(ROUTER_BIAS))


def set_bias(model: Any, bias: Tensor, layer: int = 3) -> None:
    for module in model.model.layers[layer].modules():
        if hasattr(module, ROUTER_BIAS):
            setattr(module, ROUTER_BIAS, nn.Buffer(bias))


# Weights are those of the stock modules


@pytest.mark.parametrize("family", ["glm4_moe", "hy_v3", "minimax_m2", "qwen2_moe"])
def test_weights_are_used_in_place(family):
    model = shared_other(family)
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    native = pop_ext.load(model, plan_of(model, ()))
    assert {ref.tensor.data_ptr() for ref in native.description.weights} <= own
    last = 2 * native.spec.kv_dim * native.spec.hidden_size  # the last layer is projected in every plan
    assert native.extra_bytes == last * model.dtype.itemsize


def shift_in_place(model: Any) -> None:
    bias_of(model).add_(torch.linspace(-1, 1, 8))


def assign_a_bias(model: Any) -> None:
    set_bias(model, bias_of(model).flip(0).clone())


def load_other_biases(model: Any) -> None:
    state = {name: value for name, value in model.state_dict().items() if name.endswith(ROUTER_BIAS)}
    model.load_state_dict({name: value.flip(0) for name, value in state.items()}, strict=False)


@pytest.mark.parametrize("change", [shift_in_place, assign_a_bias, load_other_biases])
@pytest.mark.parametrize("family", ["glm4_moe", "minimax_m2"])
def test_a_changed_bias_of_a_router_is_noticed(family, change):
    model, ids = other(family), tokens(shared_other(family), 2, 30)
    pop_ext.enable(model, plan_of(model, GAPS, 2), strict=True)
    native = pop_ext.load(model, plan_of(model, GAPS, 2))
    with torch.no_grad():
        model(ids, use_cache=True, logits_to_keep=1)
        change(model)
        assert native.stale_weight().endswith(".router_bias")
        found = model(ids, use_cache=True, logits_to_keep=1).logits
    fresh = other(family)
    change(fresh)
    expected = pop_ext.load(fresh, plan_of(fresh, GAPS, 2)).prefill(ids).logits
    assert torch.equal(found, expected)


def test_a_copied_model_has_its_own_biases():
    model = other("glm4_moe")
    pop_ext.enable(model, plan_of(model))
    copied = copy.deepcopy(model)
    shift_in_place(copied)
    for one in (model, copied):
        with torch.no_grad():
            one(tokens(one, 1, 20), use_cache=True, logits_to_keep=1)
        assert pop_ext.last_call(one).backend == "native"
    pop_ext.disable(copied)
    assert_equals_oracle(copied, plan_of(copied), tokens(copied, 1, 20))


@pytest.mark.parametrize("family", ["glm4_moe", "minimax_m2"])
def test_a_fitted_plan_equals_the_oracle(family):
    model = shared_other(family)
    plan = pop_ext.fit(model, plan_of(model, GAPS, 2), [tokens(model, 16, 30, seed=1)], lambdas=[0.1, math.inf])
    assert_equals_oracle(model, plan, tokens(model, 2, 40))


# A router in float32


@pytest.mark.parametrize("family", [*GLM, "hy_v3"])
def test_a_router_stays_in_float32(family):
    model = shared_other(family, torch.bfloat16)
    spec = describe(model).spec
    assert (spec.dtype, spec.router_float32, spec.router_scores) == ("bfloat16", True, "sigmoid")
    assert {ref.tensor.dtype for ref in describe(model).weights if ".router" in ref.slot} == {torch.float32}


def test_a_router_that_was_rounded_runs_portably():
    model = other("glm4_moe").to(torch.bfloat16)
    with pytest.raises(
        UnsupportedModelError, match="router: expected torch.float32 .* as from_pretrained keeps it, got"
    ):
        describe(model)
    with pop_ext.enabled(model, plan_of(model)), torch.no_grad():
        model(tokens(model, 1, 20), use_cache=True, logits_to_keep=1)
        assert pop_ext.last_call(model).backend == "portable"


def test_a_checkpoint_in_low_precision_runs_natively(tmp_path):
    other("glm4_moe").save_pretrained(tmp_path)
    model = type(shared_other("glm4_moe")).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (model.dtype, bias_of(model).dtype) == (torch.bfloat16, torch.float32)
    assert_equals_oracle(model, plan_of(model, GAPS, 2), tokens(model, 2, 40))


# Refused models


@pytest.mark.parametrize("family", [name for name in GLM if name != "exaone_moe"])
def test_experts_in_groups_run_portably(family):
    model = other(family, n_group=2, topk_group=1)
    with pytest.raises(UnsupportedModelError, match=r"config.n_group: expected 1 \(no groups of experts\), got 2"):
        describe(model)
    with pop_ext.enabled(model, plan_of(model)), torch.no_grad():
        model(tokens(model, 1, 20), use_cache=True, logits_to_keep=1)
        assert pop_ext.last_call(model).backend == "portable"


def test_groups_of_a_model_without_experts_do_not_matter():
    describe(other("glm4_moe", n_group=2, first_k_dense_replace=6))


def test_clipped_projections_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"config.clip_qkv: expected None, got 2.0"):
        describe(other("olmoe", clip_qkv=2.0))


def test_biases_of_shared_experts_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"mlp.shared_experts.gate_proj.bias: expected none of this name"):
        describe(other("hy_v3", mlp_bias=True))


@pytest.mark.parametrize("family", ["glm4_moe", "qwen2_moe"])
def test_a_shared_expert_of_another_class_is_refused_by_name(family):
    model = other(family)
    name = "shared_expert" if family == "qwen2_moe" else "shared_experts"
    shared = model.model.layers[2].mlp.get_submodule(name)
    shared.__class__ = type("Custom", (type(shared),), {})
    with pytest.raises(UnsupportedModelError, match=f"layers.2.mlp.{name}: expected a .*MLP, got Custom"):
        describe(model)


def test_a_buffer_that_the_runtime_does_not_read_is_refused():
    model = other("qwen2_moe")
    model.model.layers[2].mlp.register_buffer(ROUTER_BIAS, torch.zeros(8))
    with pytest.raises(UnsupportedModelError, match="mlp.e_score_correction_bias: expected none of this name"):
        describe(model)


@pytest.mark.parametrize("option", ["fp8", "int8", "prepack"])
@pytest.mark.parametrize("family", ["glm4_moe", "qwen2_moe"])
def test_copies_of_matrices_are_refused_by_name(family, option):
    model = shared_other(family, torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match=f"{option}: expected a model without experts, got one of 8"):
        pop_ext.load(model, plan_of(model), **{option: True})
