"""Test that models of one config whose modules hold other numbers are tried, and refused, apart."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from models import tokens
from other_families import other
from pop_ext import Plan, UnsupportedModelError
from pop_ext.hf import native_trial
from torch import nn

PLAN = Plan(6, (1, 3, 4), 2)


pytestmark = pytest.mark.usefixtures("no_trials_yet")


def _set(path: str, value: float):
    def change(model: nn.Module) -> None:
        *parents, name = path.split(".")
        module = model.model
        for parent in parents:
            module = getattr(module, parent)
        assert getattr(module, name) != value
        setattr(module, name, value)

    return change


CHANGES = {
    "glm4_moe": _set("layers.3.mlp.gate.routed_scaling_factor", 0.5),
    "minimax_m2": _set("layers.2.mlp.gate.top_k", 1),
    "gpt_oss": _set("layers.5.mlp.experts.limit", 0.1),
    "granite": _set("embedding_multiplier", 1.0),
    "hunyuan_v1_dense": _set("layers.0.self_attn.query_layernorm.variance_epsilon", 0.5),
    "helium": _set("layers.2.self_attn.scaling", 0.05),
}


@pytest.mark.parametrize("family", CHANGES)
def test_numbers_of_modules_make_a_kind_of_their_own(family):
    """What passed does not let a changed model pass, and what was refused does not refuse an unchanged one."""
    for order in ((False, True), (True, False)):
        native_trial._passed.clear()
        native_trial._refused.clear()
        for changed in order:
            model = other(family)
            if not changed:
                assert pop_ext.load(model, PLAN)
                continue
            CHANGES[family](model)
            with pytest.raises(UnsupportedModelError, match="in a trial of 7 tokens"):
                pop_ext.load(model, PLAN)


def test_models_in_training_and_in_evaluation_are_of_one_kind(monkeypatch):
    pop_ext.load(other("granite"), PLAN)
    monkeypatch.setattr(native_trial, "_run_both_forms", lambda *_: pytest.fail("tried again"))
    pop_ext.load(other("granite").train(), PLAN)


def test_a_spec_that_the_runtime_refuses_runs_portably():
    model = other("granite", residual_multiplier=0.0)
    with pytest.raises(
        UnsupportedModelError, match=r"^config of granite: residual_scale: expected a finite number > 0"
    ):
        pop_ext.load(model, PLAN)
    with pop_ext.enabled(model, PLAN), torch.no_grad():
        model(tokens(model, 1, 20), use_cache=True, logits_to_keep=1)
        decision = pop_ext.last_call(model)
    assert decision.backend == "portable"
    assert decision.reason == (
        "a prefill (not native: config of granite: residual_scale: expected a finite number > 0, got 0)"
    )
