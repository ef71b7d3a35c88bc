"""How Hugging Face models map to the runtime's weights: real configs name by name, families against the oracle."""

from __future__ import annotations

from typing import Any

import models
import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, assert_equals_oracle, plan_of
from models import WINDOW, llama, mistral, pad, qwen2, qwen3, tokens
from pop_ext.families import FAMILIES, UnsupportedModelError, describe, map_weights
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# What the checkpoints' config.json say.
REAL = {
    "Llama-3.1-8B": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    "Llama-3.2-1B": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0},
        },
    ),
    "Mistral-7B-v0.1": (
        MistralForCausalLM,
        MistralConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
        },
    ),
    "Mistral-7B-v0.3": (
        MistralForCausalLM,
        MistralConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32768,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
    ),
    "Qwen2-7B": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rms_norm_eps": 1e-6,
            "sliding_window": 131072,
            "max_window_layers": 28,
            "use_sliding_window": False,
        },
    ),
    "Qwen3-8B": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
        },
    ),
}

# The runtime's name -> the checkpoint's, in a layer.
LAYER = {
    "input_norm": "input_layernorm.weight",
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
    "post_norm": "post_attention_layernorm.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
}
QKV_BIAS = {f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkv"}
QK_NORM = {f"{name}_norm": f"self_attn.{name}_norm.weight" for name in "qk"}
EXTRA = {"llama": {}, "mistral": {}, "qwen2": QKV_BIAS, "qwen3": QK_NORM}


def real(name: str) -> nn.Module:
    model_class, config_class, numbers = REAL[name]
    with torch.device("meta"):
        return model_class._from_config(config_class(**numbers), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", REAL)
def test_a_real_config_maps_name_by_name(name):
    model = real(name)
    config = model.config
    description = map_weights(model)
    parameters = dict(model.named_parameters())
    expected = {"embed_tokens": "model.embed_tokens.weight", "norm": "model.norm.weight"}
    for index in range(config.num_hidden_layers):
        for slot, path in {**LAYER, **EXTRA[config.model_type]}.items():
            expected[f"layers.{index}.{slot}"] = f"model.layers.{index}.{path}"
    assert {ref.slot: ".".join(ref.path) for ref in description.weights} == expected
    for ref in description.weights:
        assert ref.tensor is parameters[".".join(ref.path)]
    # lm_head is called as a module; nothing else is left out.
    assert set(parameters) - set(expected.values()) <= {"lm_head.weight"}


@pytest.mark.parametrize("name", REAL)
def test_a_real_config_gives_its_numbers(name):
    numbers = REAL[name][2]
    spec = map_weights(real(name)).spec
    head_dim = numbers.get("head_dim", numbers["hidden_size"] // numbers["num_attention_heads"])
    assert spec.num_layers == numbers["num_hidden_layers"]
    assert spec.hidden_size == numbers["hidden_size"]
    assert spec.num_heads == numbers["num_attention_heads"]
    assert spec.num_kv_heads == numbers["num_key_value_heads"]
    assert spec.intermediate_size == numbers["intermediate_size"]
    assert spec.vocab_size == numbers["vocab_size"]
    assert spec.head_dim == spec.rotary_dim == head_dim
    assert spec.rms_norm_eps == pytest.approx(numbers["rms_norm_eps"])
    assert spec.attention_scale == pytest.approx(head_dim**-0.5)
    assert spec.activation == "silu"
    assert spec.dtype == "bfloat16"
    window = 4096 if name == "Mistral-7B-v0.1" else 0
    assert list(spec.window) == [window] * spec.num_layers
    assert (spec.qkv_bias, spec.qk_norm) == (name.startswith("Qwen2"), name.startswith("Qwen3"))
    assert not spec.o_bias
    assert not spec.mlp_bias


def test_weights_on_the_meta_device_are_mapped_but_not_run():
    model = real("Llama-3.2-1B")
    assert map_weights(model).weights
    with pytest.raises(UnsupportedModelError, match="meta device"):
        describe(model)


def test_every_family_has_a_test_model():
    assert set(FAMILIES) == set(EXTRA)
    assert set(FAMILIES) <= set(models.FAMILIES)


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
@pytest.mark.parametrize("name", ["qwen3", "qwen3, windows"])
def test_qwen3_in_low_precision_is_as_close_as_the_oracle(name, dtype):
    model = VARIANTS[name](dtype=dtype)
    assert_equals_oracle(model, plan_of(model, GAPS), tokens(model, 2, 40))


@pytest.mark.parametrize("name", ["qwen3", "qwen3, windows"])
def test_qwen3_with_padding_and_a_past_equals_the_oracle(name):
    model = VARIANTS[name]()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, 31)], "left")
    first = assert_equals_oracle(model, plan_of(model), ids, mask=mask)
    longer = torch.cat([mask, mask.new_ones(2, 19)], dim=1)
    oracle_past = pop_ext.reference.prefill(model, ids, plan_of(model), attention_mask=mask)[1]
    assert_equals_oracle(
        model, plan_of(model, GAPS), tokens(model, 2, 19), mask=longer, past=first.cache, oracle_past=oracle_past
    )


def test_qwen3_generates_as_the_oracle():
    model = qwen3()
    ids = tokens(model, 1, 30)
    outputs = []
    for backend in ("native", "reference"):
        with pop_ext.enabled(model, plan_of(model, GAPS), strict=True, backend=backend):
            outputs.append(
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0
                )
            )
            assert pop_ext.last_call(model).backend == backend
    assert torch.equal(*outputs)
    assert len(set(outputs[0][0, 30:].tolist())) >= 16


# What a family's map refuses


def test_a_norm_of_another_class_is_refused():
    model = qwen3()
    model.model.layers[2].self_attn.k_norm = nn.LayerNorm(64)
    with pytest.raises(UnsupportedModelError, match="k_norm: expected a Qwen3RMSNorm, got LayerNorm"):
        describe(model)


def test_a_layer_of_another_class_is_refused():
    model = llama()
    model.model.layers[2] = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="model.layers.2: expected a LlamaDecoderLayer, got Identity"):
        describe(model)


def test_an_activation_of_another_kind_is_refused():
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
