"""What calibration needs of a model and of its batches: the stock forward, undisturbed, and checked ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pop_ext.hf.compat import uncompiled
from pop_ext.hf.forward import PrefillForward
from pop_ext.hf.restore import forward_attribute

Batches = Iterable[Tensor]
"""Sequences of a calibration: int [batch, T] each, without padding; T may differ between batches."""


def stock_model(model: Any) -> Any:
    """The Hugging Face model: of a compiled one, the model inside its wrapper.

    Raises:
        TypeError: no model with a config.
    """
    inner = uncompiled(model)
    if not isinstance(inner, nn.Module) or not hasattr(inner, "config"):
        raise TypeError(f"model: expected a Hugging Face causal language model, got {type(inner).__name__}")
    return inner


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of any Hugging Face causal language model.

    Raises:
        ValueError: no list of ``config.num_hidden_layers`` layers is found, or more than one.
    """
    depth = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    lists = [child for child in (decoder or model).children() if isinstance(child, nn.ModuleList)]
    lists = [layers for layers in lists if len(layers) == depth]
    if len(lists) != 1:
        raise ValueError(
            f"model: expected one list of {depth} decoder layers in {type(decoder or model).__name__}, got {len(lists)}"
        )
    return list(lists[0])


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside: the stock forward also of an enabled model, evaluation mode, no parameter that asks for a gradient.

    Raises:
        ValueError: parameters made in inference mode, which no backward can read.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(f"model: expected parameters made outside inference mode, got {name} made within")
    training = [module for module in model.modules() if module.training]
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    forward = model.__dict__.get(forward_attribute(model))
    try:
        model.eval()
        for parameter in wanting:
            parameter.requires_grad_(False)
        with forward.stock_inside() if isinstance(forward, PrefillForward) else nullcontext():
            yield
    finally:
        for module in training:
            module.training = True
        for parameter in wanting:
            parameter.requires_grad_(True)


def checked(batches: Batches, model: Any, least: int = 1) -> Iterator[Tensor]:
    """The batches as int64 on the model's device.

    Args:
        least: tokens that each sequence must have.

    Raises:
        TypeError, ValueError: at the batch that is no int [batch, T], too short, or has ids outside the vocabulary.
    """
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable of input_ids [batch, T], got {type(batches).__name__}")
    weight = model.get_input_embeddings().weight
    for index, ids in enumerate(batches):
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"batches: expected int64 or int32 tensors, got {kind} as number {index}")
        if ids.ndim != 2 or ids.shape[0] == 0 or ids.shape[1] < least:
            raise ValueError(
                f"batches: expected [batch, T] with at least {least} tokens, got {list(ids.shape)} as number {index}"
            )
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= weight.shape[0]:
            found = low if low < 0 else high
            raise ValueError(f"batches: expected ids from 0 to {weight.shape[0] - 1}, got {found} in number {index}")
        yield ids.to(weight.device, torch.int64)


def count_sequences(batches: Batches) -> int | None:
    """How many sequences there are; None where only reading them would tell."""
    if not isinstance(batches, Sequence):
        return None
    return sum(len(ids) for ids in batches if isinstance(ids, Tensor) and ids.ndim > 0)


def hidden_states_of(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """The hidden states that a decoder layer is called with, [batch, T, hidden]."""
    states: Tensor = arguments[0] if arguments else keywords["hidden_states"]
    return states


def first_of(output: Any) -> Tensor:
    """The hidden states that a layer returns, alone or first in a tuple."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
