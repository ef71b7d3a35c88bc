"""Load the models to time: named shapes with random weights, the demo model, checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pop_ext.plans.presets import PRESETS

from bench.memory import available_bytes

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo_model" / "model"

# The sizes of the demo model, for a checkout without its weights.
_DEMO_SIZES = {
    "model_type": "llama",
    "num_hidden_layers": 12,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
_TIED = ("Llama-3.2-", "Qwen2-0.5B", "Qwen2-1.5B", "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B")
_POOL = 2**24 + 43  # odd, so that rows of a larger matrix start at different places of the pool
_STD = 0.02


def _short(name: str) -> str:
    return name.rpartition("/")[2].lower()


SHAPES = {_short(name): name for name in PRESETS if "-Instruct" not in name}
"""Short name -> Hugging Face name of the preset with these sizes. The name ``demo`` is handled apart."""


@dataclass
class BenchModel:
    """A model in memory.

    Attributes:
        name: the name that the user gave.
        model: a PreTrainedModel; None after it was released.
        weights: "random", or the source of the weights.
        note: a remark for the user; "" for none.
    """

    name: str
    model: Any
    weights: str
    note: str = ""


def load_model(name: str, dtype: torch.dtype, device: torch.device, random_weights: bool = False) -> BenchModel:
    """Load a model by the name of a shape, "demo", a directory or a Hugging Face name.

    Args:
        name: a key of ``SHAPES``: random weights. "demo": the demo model, or its shape with random weights if its
            own are missing. A directory: its checkpoint, or random weights if it holds only a config.json.
            Anything else: ``from_pretrained``.
        dtype: dtype of all weights.
        device: device of the weights.
        random_weights: never read or download a checkpoint.

    Raises:
        ValueError: the weights do not fit into free memory.
        OSError: there is no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name.lower() in SHAPES:
        return _random_model(name, shape_config(name), dtype, device)
    path = DEMO if name == "demo" else Path(name)
    if name == "demo" and not (path / "config.json").is_file():
        note = "the demo model is missing; its shape, with random weights"
        return _random_model(name, _config(_DEMO_SIZES), dtype, device, note)
    if path.is_dir() and (random_weights or not has_weights(path)):
        note = "" if random_weights else f"{name} holds no weights; its shape, with random weights"
        return _random_model(name, AutoConfig.from_pretrained(path), dtype, device, note)
    if random_weights:
        return _random_model(name, AutoConfig.from_pretrained(name), dtype, device)
    source = str(path) if path.is_dir() else name
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa")
    return BenchModel(name, model.to(device).eval(), "checkpoint")


def _config(sizes: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    sizes = dict(sizes)
    return AutoConfig.for_model(sizes.pop("model_type"), **sizes)


def shape_config(name: str) -> Any:
    """Return the config of a key of ``SHAPES``."""
    return _preset_config(SHAPES[name.lower()])


def _preset_config(name: str) -> Any:
    tied = any(part in name for part in _TIED)
    return _config({"max_position_embeddings": 131072, **PRESETS[name].config, "tie_word_embeddings": tied})


def has_weights(path: Path) -> bool:
    """Return whether a folder holds weights of transformers, in whole or in shards."""
    return any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin"))


def _random_model(name: str, config: Any, dtype: torch.dtype, device: torch.device, note: str = "") -> BenchModel:
    """Build a model with random weights, without transformers' slow initialisation and without a second copy."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config, dtype=dtype).num_parameters()
    needed, free = parameters * dtype.itemsize, available_bytes(device)
    if free is not None and needed * 1.1 > free:
        raise ValueError(f"{name}: {dtype} weights take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    fill_random(model)
    return BenchModel(name, model.eval(), "random", note)


def fill_random(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw matrices from N(0, 0.02^2) and set biases to zero; norms keep their initial weights.

    Values are copied from a pool of 16 million numbers: drawing 8 billion would take a minute.
    """
    parameters = [(name, parameter.data) for name, parameter in model.named_parameters()]
    first = parameters[0][1]
    generator = torch.Generator(first.device).manual_seed(seed)
    size = min(_POOL, max(tensor.numel() for _, tensor in parameters) + 43)
    pool = torch.empty(size, dtype=first.dtype, device=first.device).normal_(0, _STD, generator=generator)
    offset = 0
    for name, tensor in parameters:
        if tensor.ndim < 2:
            if name.endswith("bias"):
                tensor.zero_()
            continue
        flat = tensor.view(-1)
        begin = 0
        while begin < flat.numel():
            count = min(flat.numel() - begin, size - offset)
            flat[begin : begin + count] = pool[offset : offset + count]
            begin += count
            offset = (offset + count) % size


def spec_facts(spec: Any) -> dict[str, Any]:
    """Return a ModelSpec as JSON values."""
    return json.loads(spec.to_json())
