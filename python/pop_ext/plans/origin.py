"""The origin of a plan or an importance: the model it was made with and the method that made it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pop_ext.utils.texts import refuse_unknown, short

# Config members that decide whether a choice of layers carries over to another model. Paths, dtype, RoPE and special
# tokens do not.
_HASHED = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


@dataclass(frozen=True)
class Origin:
    """The model that a plan or an importance was made with, and the method.

    Attributes:
        model: Name of the model, for people to read: its hub id, or the name of its folder. It is never compared.
        config_hash: ``config_hash`` of the model. None if unknown; then the plan fits any model of its depth.
        method: How the layers were chosen, in words.
        samples: Number of calibration sequences that chose them.
        fit: How the K/V projections of the omitted layers were fitted, in words. None if they were not.
        fit_samples: Number of sequences that the fit read.
    """

    model: str | None = None
    config_hash: str | None = None
    method: str | None = None
    samples: int | None = None
    fit: str | None = None
    fit_samples: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the members that are not None, ready for JSON. A model that is a folder goes by its name alone."""
        members = {name: value for name, value in vars(self).items() if value is not None}
        return members if self.model is None else {**members, "model": public_name(self.model)}

    @classmethod
    def from_dict(cls, members: Any) -> Origin:
        """Build an origin from the result of ``to_dict``.

        Args:
            members: The JSON object.

        Raises:
            ValueError: ``members`` is not a dict, or a member is unknown or has the wrong type.
        """
        if not isinstance(members, dict):
            raise ValueError(f"origin: expected an object, got {type(members).__name__}")
        known: dict[str, Any] = {}
        types = {"model": str, "config_hash": str, "method": str, "samples": int, "fit": str, "fit_samples": int}
        refuse_unknown("origin", members, types.keys())
        for name, expected in types.items():
            value = members.get(name)
            if value is not None and (not isinstance(value, expected) or isinstance(value, bool)):
                raise ValueError(
                    f"origin.{name}: expected {expected.__name__}, got {type(value).__name__} {short(value)}"
                )
            known[name] = value
        return cls(**known)


def snapshot_id(path: str) -> str | None:
    """Return the hub id of a folder in the hub's cache, ``.../models--NAME--MODEL/snapshots/COMMIT``; None for others.

    A hub id has no double hyphen, so the folder's name can be read back.
    """
    parts = Path(path).parts[-3:]
    if len(parts) != 3 or parts[1] != "snapshots" or not parts[0].startswith("models--"):
        return None
    return parts[0].removeprefix("models--").replace("--", "/")


def public_name(model: str) -> str:
    """Return the name of a model for others to read: a hub id, or of a folder the last part of its path."""
    path = Path(model).expanduser()
    local = path.is_absolute() or path.exists() or model.startswith(".")
    return (snapshot_id(model) or Path(os.path.abspath(path)).name) if local else model


def origin_of(model: Any, method: str, samples: int | None = None) -> Origin:
    """Return the origin of a result that ``method`` gets from a Hugging Face model.

    Args:
        model: Hugging Face model.
        method: How the result is made, in words.
        samples: Number of calibration sequences; None if there are none.
    """
    name = getattr(model.config, "_name_or_path", None) or None
    return Origin(None if name is None else public_name(name), config_hash(model.config), method, samples)


def weights_hash(model: Any) -> str:
    """Hash the name, the shape and a few values of every parameter and saved buffer, whatever its dtype.

    A base model and a model tuned from it share their ``config_hash``, but not this hash. Only 8 values spread over
    each parameter are read, which takes milliseconds for any size, so a change between them is not noticed. The values
    are rounded to bfloat16, and those under 2**-16, which float16 does not hold as exactly, count as zero. So a
    checkpoint has one hash in float32, bfloat16 and float16; only one that is stored in float32 and run in float16 may
    have two. Weights that are quantised, or held by adapters, are others.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.
    """
    found = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *_saved_buffers(model)):  # quantised weights are buffers
        values = tensor.detach() if tensor.device.type != "meta" else _offloaded(model, name)
        values = getattr(values, "qdata", values)  # the integers of torchao, whose tensors read no single elements
        some = spread_values(values, min(8, values.numel())).to(torch.bfloat16).float()
        some[some.abs() < 2**-16] = 0.0  # not -0.0, whose bytes differ
        found.update(f"{name} {tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return found.hexdigest()[:16]


def _saved_buffers(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Return the buffers that are no derived values, with their names; a state dict may hold them in another form."""
    derived = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    return ((name, buffer) for name, buffer in model.named_buffers() if name not in derived)


def _offloaded(model: Any, name: str) -> torch.Tensor:
    """Return a weight that a hook of accelerate holds while the model has none.

    Raises:
        ValueError: No hook holds it.
    """
    parent, _, own = name.rpartition(".")
    hook = getattr(model.get_submodule(parent), "_hf_hook", None)
    for each in (hook, *getattr(hook, "hooks", ())):  # several are one SequentialHook
        weights = getattr(each, "weights_map", None)
        if weights is not None:
            return torch.as_tensor(weights[own])
    raise ValueError(f"weight {name}: expected one with values, got one on the meta device")


def check_weights_hash(known: str | None, model: Any, name: str) -> None:
    """Check that a ``weights_hash`` is that of a model.

    Args:
        known: The hash of the weights that something was measured on. None if that is unknown.
        model: Hugging Face model.
        name: What holds the hash, for the error.

    Raises:
        ValueError: The weights are others, or unknown.
    """
    found = weights_hash(model)
    if known != found:
        raise ValueError(
            f"{name}: expected figures of the weights that the model has, with weights_hash {found}, got those of "
            f"{f'other weights, {known}' if known else 'unknown weights'}"
        )


def spread_values(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Return ``count`` evenly spaced values of a tensor, its first and last included: float64 [count] on the CPU."""
    at = torch.linspace(0, max(0, tensor.numel() - 1), count, dtype=torch.float64, device="cpu").long()
    return tensor[torch.unravel_index(at.to(tensor.device), tensor.shape)].double().cpu()


def config_hash(config: Any) -> str:
    """Hash the architecture, depth, widths, heads and vocabulary of a config.

    Args:
        config: Hugging Face config. Of a config with several parts, the text config is used.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.
    """
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    facts = {name: _value(config, name) for name in _HASHED}
    # Some configs leave out head_dim and num_key_value_heads until a model is built; fill in what they default to.
    if facts["head_dim"] is None and facts["num_attention_heads"]:
        facts["head_dim"] = facts["hidden_size"] // facts["num_attention_heads"]
    facts["num_key_value_heads"] = facts["num_key_value_heads"] or facts["num_attention_heads"]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _value(config: Any, name: str) -> Any:
    """Return a member of a config, a list where layers differ in it, or None."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # of transformers for Gemma 4, whose layers differ
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def check_origin(origin: Origin | None, config: Any, name: str) -> None:
    """Check that an origin and a model have the same ``config_hash``.

    Args:
        origin: Origin of a plan or an importance. One without a ``config_hash`` passes, and so does None.
        config: Hugging Face config of the model.
        name: Argument to name in the error.

    Raises:
        ValueError: The hashes differ.
    """
    if origin is None or origin.config_hash is None:
        return
    found = config_hash(config)
    if origin.config_hash != found:
        made_with = f" (made with {origin.model})" if origin.model else ""
        raise ValueError(
            f"{name}: expected one made with a model of config hash {found}, as this "
            f"{getattr(config, 'model_type', None)} has, got {origin.config_hash}{made_with}"
        )
