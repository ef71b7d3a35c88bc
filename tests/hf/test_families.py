"""Test every family and its variants against the oracle, and what its weight map refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, assert_equals_oracle, plan_of
from models import (
    WINDOW,
    gemma2,
    gemma3,
    llama,
    mistral,
    mixtral,
    olmo2,
    pad,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    tokens,
)
from other_families import OTHER
from pop_ext.hf.architectures import UnsupportedModelError
from pop_ext.hf.families import _BUILT_IN, WRAPPERS
from pop_ext.hf.weight_map import describe
from torch import nn
from vision_models import VISION
from wrapped_models import NAMES as WRAPPED
from wrapped_models import wrapped


def test_every_family_has_a_test_model_and_a_row_in_the_docs():
    text = {models.shared(name).config.model_type for name in models.FAMILIES}
    inside = {wrapped(name).config.get_text_config().model_type for name in WRAPPED}
    inside |= {build().config.get_text_config().model_type for build in VISION.values()}
    known = _BUILT_IN - WRAPPERS.keys()  # others may have been registered in this process
    assert known <= text | OTHER.keys() | inside
    assert set(VISION) | set(WRAPPED) == WRAPPERS.keys()
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    assert [name for name in _BUILT_IN if f"`{name}`" not in page] == []


FULL, SLIDING = "full_attention", "sliding_attention"

VARIANTS: dict[str, Any] = {
    "llama": llama,
    "llama, tied": lambda **over: llama(tied=True, **over),
    "llama, all biases": lambda **over: llama(attention_bias=True, mlp_bias=True, **over),
    "mistral": mistral,
    "mistral, no window": lambda **over: mistral(sliding_window=None, **over),
    "qwen2": qwen2,
    "qwen2, windows": lambda **over: qwen2(use_sliding_window=True, **over),
    "qwen3": qwen3,
    "qwen3, tied, one head": lambda **over: qwen3(tied=True, kv_heads=1, head_dim=128, **over),
    "qwen3, biases": lambda **over: qwen3(attention_bias=True, **over),
    "phi3": phi3,
    "phi3, no window, odd rotary width": lambda **over: phi3(
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.375},
        **over,
    ),
    "gemma2": gemma2,
    "gemma2, no caps": lambda **over: gemma2(attn_logit_softcapping=None, final_logit_softcapping=None, **over),
    "gemma2, biases": lambda **over: gemma2(attention_bias=True, **over),
    "gemma3": gemma3,
    "gemma3, untied, one head, head_dim 128": lambda **over: gemma3(tied=False, kv_heads=1, head_dim=128, **over),
    "gemma3, scaled RoPE in full layers": lambda **over: gemma3(rope="linear", **over),
    "gemma3, local layers only": lambda **over: gemma3(layer_types=[SLIDING] * 6, **over),
    "gemma3, full layers only": lambda **over: gemma3(layer_types=[FULL] * 6, **over),
    "gemma3, capped logits": lambda **over: gemma3(final_logit_softcapping=2.0, **over),
    "olmo2": olmo2,
    "olmo2, one head": lambda **over: olmo2(kv_heads=1, head_dim=128, **over),
    "olmo2, without GQA, tied": lambda **over: olmo2(heads=3, kv_heads=3, tied=True, **over),
    "mixtral": mixtral,
    "mixtral, window, all experts": lambda **over: mixtral(sliding_window=WINDOW, num_experts_per_tok=4, **over),
    "mixtral, one expert": lambda **over: mixtral(num_experts_per_tok=1, tied=True, **over),
    "qwen3_moe": qwen3_moe,
    "qwen3_moe, normalised, every second layer": lambda **over: qwen3_moe(
        norm_topk_prob=True, mlp_only_layers=[], decoder_sparse_step=2, **over
    ),
    "qwen3_moe, biases, windows, gelu": lambda **over: qwen3_moe(
        attention_bias=True, use_sliding_window=True, sliding_window=WINDOW, hidden_act="gelu_pytorch_tanh", **over
    ),
    "qwen3_moe, no experts": lambda **over: qwen3_moe(mlp_only_layers=list(range(6)), **over),
    "qwen3, windows": lambda **over: qwen3(
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention"] * 3,
        **over,
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_family_equals_the_oracle(name):
    model = VARIANTS[name]()
    for omit, boundary in ((GAPS, 1), (LAST, 3)):
        assert_equals_oracle(model, plan_of(model, omit, boundary), tokens(model, 2, 40))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_low_precision_family_is_as_close_as_the_oracle(name, dtype):
    model = VARIANTS[name](dtype=dtype)
    assert_equals_oracle(model, plan_of(model, GAPS), tokens(model, 2, 40))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_family_with_padding_and_a_past_equals_the_oracle(name):
    model = VARIANTS[name]()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, 31)], "left")
    first = assert_equals_oracle(model, plan_of(model), ids, mask=mask)
    longer = torch.cat([mask, mask.new_ones(2, 19)], dim=1)
    oracle_past = pop_ext.reference.prefill(model, ids, plan_of(model), attention_mask=mask)[1]
    assert_equals_oracle(
        model, plan_of(model, GAPS), tokens(model, 2, 19), mask=longer, past=first.cache, oracle_past=oracle_past
    )


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
def test_a_router_with_narrow_margins_equals_the_oracle_in_float32(build):
    model = build(router="random")
    assert_equals_oracle(model, plan_of(model, GAPS), tokens(model, 2, 40))


def test_a_prefill_longer_than_an_expert_chunk_equals_the_oracle():
    model = mixtral(layers=3)
    assert_equals_oracle(model, plan_of(model, (1,)), tokens(model, 1, 2100))


@torch.no_grad()
def test_an_output_has_the_stock_class_and_fields():
    for name in models.FAMILIES:
        model = models.FAMILIES[name]()
        stock = model(tokens(model, 1, 9), logits_to_keep=1)
        with pop_ext.enabled(model, plan_of(model), strict=True):
            output = model(tokens(model, 1, 9), logits_to_keep=1)
        assert type(output) is type(stock)
        assert list(output) == list(stock)


# Refused models


def test_experts_of_another_class_are_refused_by_name():
    for place, expected in (("experts", "MixtralExperts"), ("gate", "MixtralTopKRouter")):
        model = mixtral()
        module = model.model.layers[2].mlp.get_submodule(place)
        module.__class__ = type("Custom", (type(module),), {})
        with pytest.raises(UnsupportedModelError, match=f"layers.2.mlp.{place}: expected a {expected}, got Custom"):
            describe(model)


def test_an_mlp_in_the_place_of_experts_is_refused():
    model = qwen3_moe()
    model.model.layers[2].mlp = model.model.layers[1].mlp
    with pytest.raises(UnsupportedModelError, match="layers.2.mlp: expected a Qwen3MoeSparseMoeBlock, got Qwen3MoeMLP"):
        describe(model)


def test_a_norm_of_another_class_is_refused():
    model = qwen3()
    model.model.layers[2].self_attn.k_norm = nn.LayerNorm(64)
    with pytest.raises(UnsupportedModelError, match="k_norm: expected a Qwen3RMSNorm, got LayerNorm"):
        describe(model)


def test_an_attention_without_the_soft_cap_is_refused_and_declined():
    model = gemma2()
    pop_ext.enable(model, plan_of(model))
    model.config._attn_implementation = "sdpa"  # as set_attn_implementation of another release may allow
    with torch.no_grad():
        decision = pop_ext.explain(model, tokens(model, 1, 9), logits_to_keep=1)
    assert (decision.backend, decision.rule) == ("stock", "attention")
    with pytest.raises(UnsupportedModelError, match=r"sdpa: it leaves out the soft cap of scores \(1.5\)"):
        describe(model)
    for other in (gemma3(attn_logit_softcapping=1.5), gemma2(attn_logit_softcapping=None)):  # neither applies a cap
        other.config._attn_implementation = "sdpa"
        describe(other)


def test_biases_before_norms_over_all_heads_are_refused():
    with pytest.raises(UnsupportedModelError, match="config.attention_bias: expected none .*, got True"):
        describe(olmo2(attention_bias=True))


def test_a_layer_of_another_class_is_refused():
    model = llama()
    model.model.layers[2] = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="model.layers.2: expected a LlamaDecoderLayer, got Identity"):
        describe(model)


def test_an_unsupported_activation_is_refused():
    with pytest.raises(UnsupportedModelError, match="config.hidden_act: expected one of .*, got relu"):
        describe(llama(hidden_act="relu"))


def test_a_bias_that_only_some_layers_have_is_refused():
    model = llama()
    model.model.layers[3].self_attn.o_proj.bias = nn.Parameter(torch.zeros(96))
    with pytest.raises(UnsupportedModelError, match="expected no further weights, got layers.3.o_bias"):
        describe(model)


def test_a_missing_weight_is_refused():
    model = llama()
    model.model.layers[3].self_attn.q_proj.weight = None
    with pytest.raises(UnsupportedModelError, match="q_proj: expected a parameter"):
        describe(model)


def test_a_weight_of_another_shape_is_refused():
    model = llama()
    model.model.layers[3].mlp.up_proj = nn.Linear(96, 161, bias=False)
    with pytest.raises(UnsupportedModelError, match=r"layers.3.up_proj: expected shape \[160, 96\], got \[161, 96\]"):
        describe(model)


@pytest.mark.parametrize("place", ["layers.1.self_attn", "layers.1.mlp", "rotary_emb"])
def test_another_class_inside_the_model_is_refused_by_name(place):
    model = llama()
    module = model.model.get_submodule(place)
    module.__class__ = type("Custom", (type(module),), {"forward": type(module).forward})
    with pytest.raises(UnsupportedModelError, match=f"model.{place}: expected a Llama.*, got Custom"):
        pop_ext.load(model)
