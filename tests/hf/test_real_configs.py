"""Test configs of released checkpoints: built on the meta device, with every weight mapped by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from other_families import OTHER
from pop_ext.hf.architectures import UnsupportedModelError
from pop_ext.hf.families import _BUILT_IN, WRAPPERS
from pop_ext.hf.weight_map import describe, map_weights
from real_configs import EXTRA, LAYER, REAL, WINDOWS, assert_shapes, real
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@pytest.mark.parametrize("name", REAL)
def test_a_real_config_maps_every_weight_by_name(name):
    model = real(name)
    config = model.config
    description = map_weights(model)
    parameters = dict(model.named_parameters())
    expected = {"embed_tokens": "model.embed_tokens.weight", "norm": "model.norm.weight"}
    for index in range(config.num_hidden_layers):
        for slot, path in {**LAYER, **EXTRA[config.model_type]}.items():
            if path is not None:
                expected[f"layers.{index}.{slot}"] = f"model.layers.{index}.{path}"
    assert {ref.slot: ".".join(ref.path) for ref in description.weights} == expected
    for ref in description.weights:
        assert ref.find() is parameters[".".join(ref.path)]
    for path in {ref.path for ref in description.weights if ref.rows is not None}:
        rows = sorted(ref.rows for ref in description.weights if ref.path == path)
        assert [begin for begin, _ in rows] == [0, *(end for _, end in rows[:-1])]
        assert rows[-1][1] == len(parameters[".".join(path)])
    # Only lm_head is not mapped: it is called as a module.
    assert set(parameters) - set(expected.values()) <= {"lm_head.weight"}


@pytest.mark.parametrize("name", REAL)
def test_a_real_config_gives_the_expected_spec(name):
    numbers = REAL[name][2]
    spec = map_weights(real(name)).spec
    head_dim = numbers.get("head_dim", numbers["hidden_size"] // numbers["num_attention_heads"])
    assert_shapes(spec, numbers)
    assert spec.head_dim == spec.rotary_dim == head_dim
    assert spec.rms_norm_eps == pytest.approx(numbers["rms_norm_eps"])
    assert spec.attention_scale == pytest.approx(head_dim**-0.5)
    gemma = name.startswith("Gemma")
    assert spec.activation == ("gelu_tanh" if gemma else "silu")
    olmo = name.startswith("OLMo")
    assert (spec.norm_weight_offset, spec.output_norms) == (float(gemma), gemma or olmo)
    assert (spec.input_norms, spec.qk_norm_over_heads) == (not olmo, olmo)
    scale = torch.tensor(numbers["hidden_size"] ** 0.5).to(torch.bfloat16).item() if gemma else 1.0
    assert spec.embed_scale == scale
    assert spec.attention_softcap == (50.0 if name == "Gemma-2-9B" else 0.0)
    assert list(spec.rope_table) == ([1, 1, 1, 1, 1, 0] * 8 if name == "Gemma-3-12B" else [0] * spec.num_layers)
    assert spec.dtype == "bfloat16"
    assert list(spec.window) == WINDOWS.get(name, [0] * spec.num_layers)
    assert (spec.qkv_bias, spec.qk_norm) == (name.startswith("Qwen2"), name.startswith(("Qwen3", "Gemma-3", "OLMo")))
    assert not spec.o_bias
    assert not spec.mlp_bias
    sizes = {"Qwen3-30B-A3B": (128, 8, 768, True), "Mixtral-8x7B": (8, 2, 14336, True)}
    experts = (spec.num_experts, spec.experts_per_token, spec.moe_intermediate_size, spec.norm_topk)
    assert experts == sizes.get(name, (0, 0, 0, False))
    assert set(spec.sparse) == {int(name in sizes)}


def test_weights_on_the_meta_device_are_mapped_but_not_run():
    model = real("Llama-3.2-1B")
    assert map_weights(model).weights
    with pytest.raises(UnsupportedModelError, match="meta device"):
        describe(model)


# What a released checkpoint states and the defaults of its config leave out.
STATED = {
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "glm4_moe": {"head_dim": 128},
    "hunyuan_v1_dense": {"head_dim": 128},
    "ministral": {"head_dim": 128},
}


@pytest.mark.parametrize("name", OTHER)
def test_the_default_config_of_another_family_maps_every_weight(name):
    """The defaults of these configs are those of a released checkpoint."""
    config = CONFIG_MAPPING[name](**STATED.get(name, {}))
    with torch.device("meta"):
        model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])._from_config(config)
    mapped = {".".join(ref.path) for ref in map_weights(model).weights}
    assert set(dict(model.named_parameters())) - mapped <= {"lm_head.weight"}


def test_every_family_has_a_real_configuration():
    text = {
        name for name in _BUILT_IN - WRAPPERS.keys() if "_vl_" not in name
    }  # those are in test_real_vision_configs and test_wrappers
    assert text == set(EXTRA) | set(OTHER)
    assert set(EXTRA) == {real(name).config.model_type for name in REAL}
