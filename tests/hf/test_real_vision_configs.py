"""Test configs of released vision-language checkpoints, built on the meta device.

The weights of the language model are mapped by name; transformers runs all other modules.
"""

from __future__ import annotations

import pytest
import torch
from pop_ext import Plan
from pop_ext.hf.families import WRAPPERS
from pop_ext.hf.weight_map import map_weights
from pop_ext.plans.presets import preset_or_third
from real_configs import LAYER, QK_NORM, SANDWICH, assert_shapes
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from vision_models import VISION
from wrapped_models import NAMES

# From the config.json of each checkpoint.
REAL = {
    "Qwen/Qwen3-VL-8B-Instruct": (
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig,
        {
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
            "tie_word_embeddings": False,
            "text_config": {
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 151936,
                "max_position_embeddings": 262144,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 5000000.0,
                    "mrope_section": [24, 20, 20],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": 4096,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [8, 16, 24],
            },
        },
    ),
    "google/gemma-3-12b-it": (
        Gemma3ForConditionalGeneration,
        Gemma3Config,
        {
            "image_token_index": 262144,
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "mm_tokens_per_image": 256,
            "text_config": {
                "hidden_size": 3840,
                "intermediate_size": 15360,
                "num_hidden_layers": 48,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 256,
                "vocab_size": 262208,
                "query_pre_attn_scalar": 256,
                "sliding_window": 1024,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                },
            },
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 896,
                "patch_size": 14,
            },
        },
    ),
}
EXTRA = {"qwen3_vl": QK_NORM, "gemma3": {**SANDWICH, **QK_NORM}}


def real(name: str) -> nn.Module:
    model_class, config_class, members = REAL[name]
    with torch.device("meta"):
        return model_class._from_config(config_class(**members), dtype=torch.bfloat16, attn_implementation="eager")


@pytest.mark.parametrize("name", REAL)
def test_a_real_config_maps_every_weight_by_name(name):
    model = real(name)
    description = map_weights(model)
    parameters = dict(model.named_parameters())
    root = "model.language_model"
    expected = {"embed_tokens": f"{root}.embed_tokens.weight", "norm": f"{root}.norm.weight"}
    for index in range(description.spec.num_layers):
        for slot, path in {**LAYER, **EXTRA[model.config.model_type]}.items():
            expected[f"layers.{index}.{slot}"] = f"{root}.layers.{index}.{path}"
    assert {ref.slot: ".".join(ref.path) for ref in description.weights} == expected
    for ref in description.weights:
        assert ref.find() is parameters[".".join(ref.path)]
    # The head and the modules around the language model are not mapped: they are called as modules.
    unmapped = set(parameters) - set(expected.values()) - {"lm_head.weight"}
    assert {name.split(".")[1] for name in unmapped} <= {"visual", "vision_tower", "multi_modal_projector"}


@pytest.mark.parametrize("name", REAL)
def test_a_real_config_gives_the_expected_spec(name):
    numbers = REAL[name][2]["text_config"]
    spec = map_weights(real(name)).spec
    assert_shapes(spec, numbers)
    assert spec.head_dim == spec.rotary_dim == numbers["head_dim"]
    assert spec.qk_norm
    gemma = name.startswith("google")
    assert (spec.norm_weight_offset, spec.output_norms) == (float(gemma), gemma)
    assert list(spec.window) == ([1024, 1024, 1024, 1024, 1024, 0] * 8 if gemma else [0] * 36)
    assert list(spec.rope_table) == ([1, 1, 1, 1, 1, 0] * 8 if gemma else [0] * 36)


@pytest.mark.parametrize("name", REAL)
def test_the_published_plan_is_the_default(name):
    assert preset_or_third(real(name).config) == Plan.preset(name)


def test_every_vision_language_family_has_a_real_configuration():
    assert set(EXTRA) == VISION.keys()
    assert VISION.keys() | set(NAMES) == WRAPPERS.keys()  # test_wrappers has the others
