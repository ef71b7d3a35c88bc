"""Tiny random models of families that differ little from those of `models`, and run natively by an entry alone."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from models import WINDOW, build
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
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    return build(model_class, CONFIG_MAPPING[name], {**OTHER[name], **over})


@functools.cache
def shared_other(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model that tests do not change."""
    return other(name, dtype=dtype)
