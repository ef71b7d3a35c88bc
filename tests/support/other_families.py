"""Tiny random models of families that differ little from those of `models`, and run natively by an entry alone."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from models import WINDOW, build, rope_parameters
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FULL, SLIDING = "full_attention", "sliding_attention"
_MIXED: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": [SLIDING, SLIDING, FULL] * 2}
_ROPES = {
    FULL: {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 1000.0},
}

OTHER: dict[str, dict[str, Any]] = {
    "cwm": {**_MIXED, "bos_token_id": 0, "eos_token_id": 0},
    "exaone": {},
    "exaone4": {**_MIXED, "sliding_window_pattern": 3},
    "gemma": {"tied": True},
    "gpt_oss": {
        "attn_implementation": "eager",  # no other one of torch's own has sinks
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "rope_parameters": {**rope_parameters("yarn", 64), "truncate": False},
        "swiglu_limit": 0.8,  # most gates are below it and some are above
    },
    "internlm3": {"attention_bias": True, "mlp_bias": True},
    "iquestcoder": {},
    "ministral": _MIXED,
    "olmo3": {**_MIXED, "rope_parameters": _ROPES},
    "seed_oss": {"attention_bias": True, "attention_out_bias": False},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 0, 1]},
}
"""Name of a family -> options of `models.build`."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "exaone4, no windows": ("exaone4", {"sliding_window": None, "layer_types": [FULL] * 6}),
    "gpt_oss, no biases of attention": ("gpt_oss", {"attention_bias": False}),
    "gpt_oss, one expert a token": ("gpt_oss", {"num_experts_per_tok": 1, "num_local_experts": 7}),
    "gpt_oss, other experts": (
        "gpt_oss",
        {"swiglu_alpha": 0.9, "swiglu_limit": 7.0, "intermediate": 88, "hidden": 120},
    ),
    "gpt_oss, windows everywhere": ("gpt_oss", {"layer_types": [SLIDING] * 6, "heads": 6, "head_dim": 48}),
    "ministral, windows everywhere": ("ministral", {"layer_types": [SLIDING] * 6}),
    "olmo3, full layers only": ("olmo3", {"layer_types": [FULL] * 6, "rope_parameters": {FULL: _ROPES[FULL]}}),
    "seed_oss, all biases": ("seed_oss", {"attention_out_bias": True, "mlp_bias": True}),
    "smollm3, windows": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": [FULL, FULL, SLIDING] * 2},
    ),
    "smollm3, no RoPE": ("smollm3", {"no_rope_layers": [0] * 6}),
    "smollm3, RoPE everywhere": ("smollm3", {"no_rope_layers": [1] * 6}),
}
"""Name -> family and options that differ from `OTHER`."""


def other(name: str, **over: Any) -> Any:
    """Return a model of six layers; options as for `models.build`."""
    options = {**OTHER[name], **over}
    if options.get("dtype", torch.float32) != torch.float32 and "num_local_experts" in options:
        options["num_experts_per_tok"] = options["num_local_experts"]  # near a tie, a choice may differ, correctly
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    return build(model_class, CONFIG_MAPPING[name], options)


@functools.cache
def shared_other(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model that tests do not change."""
    return other(name, dtype=dtype)
