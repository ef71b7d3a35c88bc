"""Checks of the oracle's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pop_ext.hf.modules import Module
from pop_ext.plans.origin import check_origin
from pop_ext.plans.projections import check_fit
from pop_ext.utils.tensors import check_dense

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Dtypes of a tensor with one value per sequence."""


class PlanLike(Protocol):
    """The attributes of a plan that the oracle reads."""

    @property
    def num_layers(self) -> int: ...
    @property
    def omit(self) -> Sequence[int]: ...
    @property
    def boundary(self) -> int: ...


def check_plan(plan: PlanLike, layers: Sequence[Module], config: Any) -> None:
    """Check that a plan fits a model.

    Args:
        plan: The plan.
        layers: All decoder layers of the model.
        config: Config of the model.

    Raises:
        TypeError: ``plan`` lacks an attribute of a plan.
        ValueError: The plan is for another depth or another model, or its projections were fitted on other weights.
    """
    num_layers = len(layers)
    if not all(hasattr(plan, name) for name in ("num_layers", "omit", "boundary")):
        raise TypeError(f"plan: expected a Plan, got {type(plan).__name__}")
    if plan.num_layers != num_layers:
        raise ValueError(f"plan: expected num_layers {num_layers}, the model's, got {plan.num_layers}")
    if any(not 0 <= layer < num_layers for layer in plan.omit):
        raise ValueError(f"plan: expected omit within 0..{num_layers - 1}, got {tuple(plan.omit)}")
    if plan.boundary < 1:
        raise ValueError(f"plan: expected boundary >= 1, got {plan.boundary}")
    check_origin(getattr(plan, "origin", None), config, "plan")
    check_fit(plan, layers)


def check_inputs(model: Module, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Check ids or embeddings, and return the one that is given.

    Args:
        model: The model.
        input_ids: int64 or int32 [batch, T], or None.
        inputs_embeds: [batch, T, hidden] in the model's dtype, or None.

    Raises:
        ValueError: Both or neither are given, or the shape is wrong.
        TypeError: The dtype is wrong.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"input_ids, inputs_embeds: expected exactly one of them, got {given}")
    if inputs_embeds is None:
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids: expected an int64 or int32 tensor, got {describe(input_ids)}")
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids: expected [batch, T] with at least one token, got {list(input_ids.shape)}")
        check_data("input_ids", input_ids)
        return input_ids
    weight = model.get_input_embeddings().weight
    if not isinstance(inputs_embeds, Tensor) or inputs_embeds.dtype != weight.dtype:
        raise TypeError(f"inputs_embeds: expected a {weight.dtype} tensor, got {describe(inputs_embeds)}")
    hidden = weight.shape[1]
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != hidden or 0 in inputs_embeds.shape:
        raise ValueError(
            f"inputs_embeds: expected [batch, T, {hidden}] with at least one token, got {list(inputs_embeds.shape)}"
        )
    check_data("inputs_embeds", inputs_embeds)
    return inputs_embeds


def check_mask(mask: Tensor | None, batch: int, past_length: int, new: int, device: torch.device) -> Tensor:
    """Check an attention mask, and return it as bool [batch, P + T].

    Args:
        mask: 0/1 or bool [batch, P + T], or None for no padding.
        batch: Number of sequences.
        past_length: Columns ``P`` in the cache.
        new: New columns ``T``.
        device: Device of the result.

    Raises:
        TypeError: ``mask`` is not a tensor.
        ValueError: The shape is wrong, a value is not 0 or 1, a sequence has no new token, or its new tokens have a
            hole.
    """
    columns = past_length + new
    if mask is None:
        return torch.ones(batch, columns, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.is_complex():
        raise TypeError(f"attention_mask: expected a tensor of bool, integers or floats, got {describe(mask)}")
    if mask.shape != (batch, columns):
        raise ValueError(
            f"attention_mask: expected [batch, past + new] = [{batch}, {columns}] ({past_length} in the cache and "
            f"{new} new), got {list(mask.shape)}"
        )
    check_data("attention_mask", mask)
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask: expected only 0 and 1, got other values")
    mask = mask.to(device, torch.bool)
    for i, row in enumerate(mask[:, past_length:]):
        real = row.nonzero().flatten()
        if len(real) == 0:
            raise ValueError(f"attention_mask: expected at least one new token a sequence, got none in sequence {i}")
        if real[-1] - real[0] + 1 != len(real):
            raise ValueError(
                f"attention_mask: expected no holes in the new tokens, got {len(real)} tokens between new columns "
                f"{int(real[0])} and {int(real[-1])} in sequence {i}"
            )
    return mask


def check_ids(model: Module, input_ids: Tensor | None, mask: Tensor) -> None:
    """Check that the ids of real tokens are in the vocabulary. Ids in padded columns are ignored.

    Args:
        model: The model.
        input_ids: int [batch, T], or None for embeddings.
        mask: bool [batch, T], True for real tokens.

    Raises:
        ValueError: An id is outside the vocabulary.
    """
    if input_ids is None:
        return
    vocabulary = model.get_input_embeddings().weight.shape[0]
    outside = input_ids[mask & ((input_ids < 0) | (input_ids >= vocabulary))]
    if len(outside):
        raise ValueError(f"input_ids: expected 0..{vocabulary - 1}, got {int(outside[0])}")


def check_positions(position_ids: Tensor | None, mask: Tensor, past_length: int) -> Tensor:
    """Check the positions of the new columns, and return them as int64 [batch, T].

    Args:
        position_ids: int [batch, T] or [1, T]. None to count real positions from the mask, past included.
        mask: bool [batch, P + T].
        past_length: Columns ``P`` in the cache.

    Raises:
        TypeError: The dtype is wrong.
        ValueError: The shape is wrong.
    """
    if position_ids is None:
        return (mask.long().cumsum(1) - 1)[:, past_length:]
    batch, new = mask.shape[0], mask.shape[1] - past_length
    if not isinstance(position_ids, Tensor) or position_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"position_ids: expected an int64 or int32 tensor, got {describe(position_ids)}")
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != new:
        raise ValueError(f"position_ids: expected [{batch}, {new}] or [1, {new}], got {list(position_ids.shape)}")
    check_data("position_ids", position_ids)
    return position_ids.long().to(mask.device).expand(batch, new)


def per_sequence(name: str, value: int | Sequence[int] | Tensor, lengths: Sequence[int]) -> list[int]:
    """Return an argument as one int per sequence.

    Args:
        name: Name of the argument, for errors.
        value: An int, or one int per sequence (1-D).
        lengths: Number ``T_i`` of new tokens of each sequence.

    Raises:
        TypeError: ``value`` has the wrong type.
        ValueError: The number of values is wrong, or one is outside 1..T_i.
    """
    if isinstance(value, Tensor):
        check_data(name, value)
    if isinstance(value, int) and not isinstance(value, bool):
        values: list[Any] = [value] * len(lengths)
    elif isinstance(value, Tensor) and value.dim() == 1 and value.dtype in INTEGERS:
        values = value.tolist()
    elif isinstance(value, Sequence) and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        values = list(value)
    else:
        raise TypeError(f"{name}: expected an int or one int a sequence, got {describe(value)}")
    if len(values) != len(lengths):
        raise ValueError(f"{name}: expected one value for each of {len(lengths)} sequences, got {len(values)}")
    for i, (v, length) in enumerate(zip(values, lengths, strict=True)):
        if not 1 <= v <= length:
            raise ValueError(f"{name}: expected 1..{length}, the new tokens of sequence {i}, got {v}")
    return values


def check_data(name: str, tensor: Tensor) -> None:
    """Raise ValueError if a tensor is on the meta device, sparse or nested, or its memory was freed."""
    check_dense({name: tensor})
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with data, got one on the meta device")


def describe(value: Any) -> str:
    """Describe a value for an error: dtype and shape of a tensor, type and repr of anything else."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"
