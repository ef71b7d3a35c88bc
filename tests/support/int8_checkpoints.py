"""Models whose linear layers hold int8, in the forms that the native runtime reads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tokens
from pop_ext.hf.free_weights import int8_linear_of
from pop_ext.hf.int8_linear import Int8Linear
from pop_ext.hf.int8_weights import int8_weight
from quantized_oracle import quantized, replace_rounded, rounded
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

WEIGHT_ONLY = ("Int8Linear", "torchao", "compressed-tensors, weights")
ROUNDING = ("torchao, dynamic", "compressed-tensors")


def int8_checkpoint(form: str, model: Any, folder: Path) -> Any:
    """Return a copy of a plain model with its linear layers in int8; "fresh": before its first call."""
    model = copy.deepcopy(model)
    if form.startswith("torchao"):
        torchao = pytest.importorskip("torchao.quantization")
        config = torchao.Int8DynamicActivationInt8WeightConfig if "dynamic" in form else torchao.Int8WeightOnlyConfig
        torchao.quantize_(model.model, config())
        return model
    if form == "Int8Linear":
        for layer in model.model.layers:
            replace_linear(layer, int8_linear_of)
        return model
    pytest.importorskip("compressed_tensors")
    loaded = _compressed(model, folder, rounds_rows="weights" not in form)
    if "fresh" not in form:
        with torch.no_grad():
            loaded(tokens(loaded, 1, 5))
    return loaded


def replace_linear(root: nn.Module, make: Any) -> None:
    """Replace every linear layer inside a module by ``make(layer)``."""
    for name, module in list(root.named_modules()):
        if isinstance(module, (nn.Linear, Int8Linear)):
            parent, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(parent), leaf, make(module))


def _compressed(model: Any, folder: Path, rounds_rows: bool) -> Any:
    """Save a model as compressed-tensors saves int8 by channel, and load it."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    stored: dict[str, Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            values, scale = quantized(value, "int8")
            scale = scale.to(value.dtype)
            stored[f"{name}_scale"] = scale
            if rounds_rows:
                stored[name] = values
            else:  # the library packs weights that meet inputs as they are
                stored[f"{name}_packed"] = pack_to_int32(values, 8)
                stored[f"{name}_shape"] = torch.tensor(values.shape)
        else:
            stored[name] = value
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    integers = {"num_bits": 8, "type": "int", "symmetric": True}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {**integers, "strategy": "channel", "dynamic": False}}
    if rounds_rows:
        group["input_activations"] = {**integers, "strategy": "token", "dynamic": True}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if rounds_rows else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def dense_twin(model: Any) -> Any:
    """Return a copy of an int8 model with the same matrices in floats, which rounds no inputs."""
    twin = copy.deepcopy(model)
    dtype = model.model.embed_tokens.weight.dtype

    def dense(module: Any) -> nn.Linear:
        found = int8_weight(module)
        assert found is not None
        linear = nn.Linear(found.values.shape[1], found.values.shape[0], bias=module.bias is not None)
        linear.weight = nn.Parameter(found.dense(dtype), requires_grad=False)
        linear.bias = module.bias
        return linear

    replace_linear(twin.model.layers, dense)
    return twin


class RoundsInput(nn.Module):
    """A linear layer that rounds its input to int8 row by row, and its matrix not."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.linear.bias is None else self.linear.bias.float()
        return F.linear(rounded(x, "int8"), self.linear.weight.float(), bias).to(x.dtype)


def rounding_twin(model: Any, plan: Any) -> Any:
    """Return what ``int8=True`` computes on an int8 model: all but k and v of the retained layers round rows."""
    twin = dense_twin(model)
    projected = {layer for run in plan.projected_runs for layer in run}
    for index, layer in enumerate(twin.model.layers):
        if index not in projected:
            replace_rounded(layer, RoundsInput, twin.config, "int8")
    return twin
