"""Quantise a checkpoint to int8 weights for products of 8-bit integers (W8A8), in the format compressed-tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_HEAD = "lm_head"
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": [_HEAD],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
"""``quantization_config`` of the checkpoint: a scale for each row of a weight, and for each token of an input."""


def write_w8a8(weights: str, out: str) -> None:
    """Write a checkpoint whose matrices within the decoder layers are int8.

    Embedding, head, norms and biases stay as they are.

    Args:
        weights: folder of a checkpoint, as written by ``save_pretrained``.
        out: the folder to write.
    """
    from safetensors.torch import load_file, save_file

    source, folder = Path(weights), Path(out)
    folder.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            tensors |= quantised(name, tensor) if is_quantised(name, tensor) else {name: tensor}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}, indent=1))


def is_quantised(name: str, tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a matrix of a decoder layer."""
    return ".layers." in name and name.endswith(".weight") and tensor.ndim == 2


def quantised(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Round a weight ``[n, k]`` to integers from -127 to 127, with a scale ``[n, 1]`` for each row; return both."""
    wide = weight.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return {name: (wide / scale).round().to(torch.int8), f"{name}_scale": scale}
