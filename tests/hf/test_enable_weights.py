"""Test weights of an enabled model that are changed, moved, replaced or adapted: the next call detects it."""

from __future__ import annotations

import copy

import pop_ext
import pytest
import torch
from enabled_models import (
    PLAN,
    LowRank,
    T,
    assert_enabled_equals_oracle,
    handle_of,
    is_alive,
    multiply_in_place,
    prefill,
)
from models import llama, tokens
from pop_ext.hf.loaded import LoadedWeights
from tolerance import assert_close_fp32
from torch import Tensor, nn


def change_data(model: nn.Module) -> None:
    model.model.layers[4].self_attn.k_proj.weight.data.mul_(1.5)
    model.model.layers[2].input_layernorm.weight.data.mul_(0.5)


def change_a_retained_layer(model: nn.Module) -> None:
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.5)


def reassign_a_parameter(model: nn.Module) -> None:
    projection = model.model.layers[5].self_attn.v_proj
    projection.weight = nn.Parameter(projection.weight.detach() * 1.5)


def replace_a_module(model: nn.Module) -> None:
    old = model.model.layers[3].mlp.up_proj
    new = nn.Linear(old.in_features, old.out_features, bias=False)
    model.model.layers[3].mlp.up_proj = new


def replace_a_layer(model: nn.Module) -> None:
    model.model.layers[3] = copy.deepcopy(model.model.layers[1])
    model.model.layers[3].self_attn.layer_idx = 3


def load_another_state(model: nn.Module) -> None:
    model.load_state_dict(llama(seed=1).state_dict())


def assign_another_state(model: nn.Module) -> None:
    model.load_state_dict(llama(seed=1).state_dict(), assign=True)


def shrink_the_embeddings(model: nn.Module) -> None:
    model.resize_token_embeddings(200)


def grow_the_embeddings(model: nn.Module) -> None:
    model.resize_token_embeddings(300, mean_resizing=False)


CHANGES = [
    multiply_in_place,
    pytest.param(change_data, marks=pytest.mark.cpu),  # values in CUDA memory are not sampled
    change_a_retained_layer,
    reassign_a_parameter,
    replace_a_module,
    replace_a_layer,
    load_another_state,
    assign_another_state,
    shrink_the_embeddings,
    grow_the_embeddings,
]


@pytest.mark.parametrize("speculative", [False, True], ids=["validated first", "launched first"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_are_reloaded(change, speculative, monkeypatch):
    monkeypatch.setattr("pop_ext.hf.speculative_launch.ENABLED", speculative)
    monkeypatch.setattr("pop_ext.hf.speculative_launch.is_async", lambda device: speculative)
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 1, T) % 200
    before = prefill(model, ids).logits
    change(model)
    assert_enabled_equals_oracle(model, ids)
    after = prefill(model, ids).logits
    assert after.shape != before.shape or not torch.allclose(after, before, atol=1e-3)


def test_weights_are_checked_once_a_call(monkeypatch):
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids, checks = tokens(model, 1, T), []
    check = LoadedWeights.overwritten_weight
    monkeypatch.setattr(LoadedWeights, "overwritten_weight", lambda loaded: checks.append(1) or check(loaded))
    prefill(model, ids)
    assert len(checks) == 1
    pop_ext.score(model, ids, [[1]])
    assert len(checks) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_moved_to_another_dtype_runs_in_it(dtype):
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 1, T)
    prefill(model, ids)
    model.to(dtype)
    output = prefill(model, ids)
    assert output.logits.dtype == output.past_key_values.layers[0].keys.dtype == dtype
    fresh = pop_ext.load(copy.deepcopy(pop_ext.disable(model)), PLAN).prefill(ids)
    assert torch.equal(output.logits, fresh.logits)


class Wrapped(nn.Module):
    """Module that wraps the Linear it replaces."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * 1.1


@pytest.mark.parametrize("adapter", [LowRank, Wrapped])
@torch.no_grad()
def test_adapters_added_after_enable_have_no_native_form(adapter):
    model = llama()
    ids = tokens(model, 1, T)
    pop_ext.enable(model, PLAN, backend="native")
    prefill(model, ids)
    attention = model.model.layers[1].self_attn
    base, adapted = attention.q_proj, adapter(attention.q_proj)
    attention.q_proj = adapted
    with pytest.warns(match=f"expected a plain torch.nn.Linear, got .*{adapter.__name__}"):
        actual = model(ids, logits_to_keep=1).logits
    assert pop_ext.last_call(model).rule == "model"
    attention.q_proj = base
    assert_enabled_equals_oracle(model, ids)
    attention.q_proj = adapted
    assert torch.equal(actual, pop_ext.disable(model)(ids, logits_to_keep=1).logits)
    pop_ext.enable(model, PLAN, strict=True)
    portable = model(ids, logits_to_keep=1).logits
    assert pop_ext.last_call(model).backend == "portable"
    assert_close_fp32(portable, pop_ext.reference.prefill(model, ids, PLAN)[0], "logits")


def test_reloading_changed_weights_frees_the_native_handle():
    model = pop_ext.enable(llama(), PLAN)
    handle = handle_of(model)
    multiply_in_place(model)
    prefill(model, tokens(model, 1, T))
    assert not is_alive(handle)
