"""Where a plan or an importance comes from: which model, by what method."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

# What makes a choice of layers meaningless in another model. Not among them: paths, dtype, RoPE, special tokens.
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
    """Where a plan or an importance comes from.

    Attributes:
        model: name or path of the model; for people, nothing compares it.
        config_hash: ``config_hash`` of the model; None: not known, any model of the plan's depth will do.
        method: how the layers were chosen, in words.
        samples: how many calibration sequences chose them.
        fit: how the K/V projections of the omitted layers were fitted, in words; None: they were not.
        fit_samples: on how many sequences.
    """

    model: str | None = None
    config_hash: str | None = None
    method: str | None = None
    samples: int | None = None
    fit: str | None = None
    fit_samples: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Members that are known, for JSON."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_dict(cls, members: Any) -> Origin:
        """What ``to_dict`` gave. Members that it does not know are ignored.

        Raises:
            ValueError: a member of another type.
        """
        if not isinstance(members, dict):
            raise ValueError(f"origin: expected an object, got {type(members).__name__}")
        known: dict[str, Any] = {}
        kinds = {"model": str, "config_hash": str, "method": str, "samples": int, "fit": str, "fit_samples": int}
        for name, kind in kinds.items():
            value = members.get(name)
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                raise ValueError(f"origin.{name}: expected {kind.__name__}, got {type(value).__name__} {value!r}")
            known[name] = value
        return cls(**known)


def origin_of(model: Any, method: str, samples: int | None = None) -> Origin:
    """The origin of what is made with a Hugging Face model."""
    name = getattr(model.config, "_name_or_path", None) or None
    return Origin(name, config_hash(model.config), method, samples)


def weights_hash(model: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a few values of every parameter, and of its name, shape and dtype.

    A base model and what was tuned from it have one ``config_hash``, but not this. Values are spread over each
    parameter; a change between them goes unseen.
    """
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = spread_values(parameter.detach(), min(8, parameter.numel()))
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + some.numpy().tobytes())
    return found.hexdigest()[:16]


def spread_values(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` values spread over a tensor, its first and last among them: float64, on the CPU."""
    at = torch.linspace(0, max(0, tensor.numel() - 1), count, dtype=torch.float64, device="cpu").long()
    return tensor[torch.unravel_index(at.to(tensor.device), tensor.shape)].double().cpu()


def config_hash(config: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of architecture, depth, widths, heads and vocabulary.

    Args:
        config: a Hugging Face config; of a model with several parts, its text config is taken.
    """
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    facts = {name: getattr(config, name, None) for name in _HASHED}
    # Some configs leave out what follows from the others, until a model is made of them.
    if facts["head_dim"] is None and facts["num_attention_heads"]:
        facts["head_dim"] = facts["hidden_size"] // facts["num_attention_heads"]
    facts["num_key_value_heads"] = facts["num_key_value_heads"] or facts["num_attention_heads"]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def check_origin(origin: Origin | None, config: Any, name: str) -> None:
    """Raises ValueError if what argument ``name`` carries was made with a model of another config."""
    if origin is None or origin.config_hash is None:
        return
    found = config_hash(config)
    if origin.config_hash != found:
        made_with = f" (made with {origin.model})" if origin.model else ""
        raise ValueError(
            f"{name}: expected one made with a model of config hash {found}, as this "
            f"{getattr(config, 'model_type', None)} has, got {origin.config_hash}{made_with}"
        )
