"""Test what `fp8`, `int8` and `prepack` share: copies of weights that can become stale, and rows that do not mix."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from against_oracle import plan_of
from models import llama, shared, tokens
from tolerance import rms

OPTIONS = [
    "fp8",
    pytest.param("int8", marks=pytest.mark.cpu),
    pytest.param("prepack", marks=[pytest.mark.avx512_bf16, pytest.mark.cpu]),
]


def load(model, option):
    return pop_ext.load(model, plan_of(model), **{option: True})


@pytest.mark.parametrize("option", OPTIONS)
def test_a_sequence_does_not_depend_on_its_batch_mates(option):
    model = shared(dtype=torch.bfloat16)
    native, ids = load(model, option), tokens(model, 3, 70)
    together = native.prefill(ids).logits
    alone = torch.cat([native.prefill(row[None]).logits for row in ids])
    assert rms(together - alone) < 0.02 * rms(together)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_changed_weight_is_detected_and_copied_again(option, name):
    model = llama(dtype=torch.bfloat16)
    native, ids = load(model, option), tokens(model, 1, 19)
    with torch.no_grad():
        model.model.layers[1].get_submodule(name).weight.mul_(-1)
    with pytest.raises(RuntimeError, match=f"{name.split('.')[1]}.*refresh"):
        native.prefill(ids)
    native.refresh()
    assert torch.equal(native.prefill(ids).logits, load(model, option).prefill(ids).logits)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.cpu  # only values in host memory are sampled
def test_a_change_through_data_is_detected(option):
    model = llama(dtype=torch.bfloat16)
    native = load(model, option)
    model.model.layers[0].mlp.gate_proj.weight.data.mul_(2)
    assert native.stale_weight() == "layers.0.gate_proj"
