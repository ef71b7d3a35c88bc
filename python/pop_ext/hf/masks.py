"""Read the padding from an attention mask of any form, and refuse masks with any other pattern.

With a static cache, ``generate`` turns a 2-D padding mask into 4-D masks before it calls the model; some families get a
dict with one mask per layer type. ``padding_mask`` recovers the 2-D mask. ``check_pattern`` makes sure that the 4-D
masks hold nothing but what a native prefill applies by itself: causality, sliding windows, and images whose tokens
attend to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pop_ext.hf.packing import Spans

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"


class CustomMaskError(ValueError):
    """Raised for a mask that does more than mark padding."""


@dataclass(frozen=True)
class LayerType:
    """Describe the mask that the stock model makes for all layers of one type.

    Attributes:
        name: as in ``config.layer_types``; key of the mask in a dict.
        window: slots that a row attends to, its own included. 0: all slots up to its own.
        first: slot of the cache at the first column of the mask.
    """

    name: str
    window: int
    first: int


def mask_layer_types(config: Any, cache: Any, columns: int) -> list[LayerType]:
    """Return the types of a model's layers, with the layout of their masks in one call.

    Args:
        config: of the language model.
        cache: a transformers Cache or None.
        columns: new columns of the call.
    """
    window = getattr(config, "sliding_window", None) or 0
    names = list(getattr(config, "layer_types", None) or [SLIDING_ATTENTION if window else FULL_ATTENTION])
    types = []
    for name in dict.fromkeys(names):
        try:
            first = 0 if cache is None else int(cache.get_mask_sizes(columns, names.index(name))[1])
        except ValueError:  # layers that keep no positions, such as an MLP alone, take no mask
            continue
        types.append(LayerType(name, window if name == SLIDING_ATTENTION else 0, first))
    return types


def padding_mask(mask: Any, batch: int, columns: int, past: int, types: Sequence[LayerType]) -> torch.Tensor | None:
    """Return the 2-D padding mask that ``mask`` was made from. ``check_pattern`` then checks that it was.

    Args:
        mask: None, ``[batch, past + columns]``, a 4-D mask ``[batch or 1, 1, columns, slots]`` (bool, or added to the
            scores), or a dict with a 4-D mask or None for each of ``types``.
        batch: sequences.
        columns: new columns of the call.
        past: slots that the cache holds before them.
        types: from ``mask_layer_types``.

    Returns:
        A 2-D mask or None is returned as it is. A 4-D mask gives bool ``[batch, past + columns]``, True for a real
        token. Slots that no row attends to count as padding.

    Raises:
        CustomMaskError: The mask has another form, shape or other values.
    """
    if isinstance(mask, dict) and len(types) == 1:
        only = mask.get(types[0].name)
        if isinstance(only, torch.Tensor) and only.ndim == 2:
            return only
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        return mask
    real = None
    for layer_type, causal in _masks_by_type(mask, types).items():
        if causal is not None:
            _check_4d_mask(layer_type, causal, batch, columns, past)
            attended = torch.stack([_attended_slots(rows, layer_type, past) for rows in causal[:, 0]]).expand(batch, -1)
            real = attended if real is None else real | attended
    return real


def check_pattern(
    mask: Any, real: torch.Tensor | None, spans: Spans, columns: int, past: int, types: Sequence[LayerType]
) -> None:
    """Raise CustomMaskError for a 4-D mask that a native prefill would not reproduce.

    Args:
        mask: the argument of ``padding_mask``.
        real: the result of ``padding_mask``.
        spans: (sequence, begin, end) of real new tokens that attend to each other in both directions.
        columns: new columns of the call.
        past: slots that the cache holds before them.
        types: from ``mask_layer_types``.
    """
    if not isinstance(mask, dict) and (mask is None or mask.ndim == 2):
        return
    for layer_type, causal in _masks_by_type(mask, types).items():
        if causal is None:
            # Without a mask the stock attention is causal over the new columns alone.
            plain = past == 0 and not spans and (real is None or bool(real.all()))
            if not plain or 0 < layer_type.window < columns:
                raise CustomMaskError(f"attention_mask: expected a mask for {layer_type.name} layers, got None")
        elif causal.ndim == 4 and real is not None:
            for sequence, real_slots in enumerate(real):
                own_spans = [(begin, end) for number, begin, end in spans if number == sequence]
                _check_rows(causal[sequence if len(causal) > 1 else 0, 0], layer_type, real_slots, own_spans, past)


def _masks_by_type(mask: Any, types: Sequence[LayerType]) -> dict[LayerType, torch.Tensor | None]:
    """Return the mask of each layer type. Raise CustomMaskError if one is missing or a type is unknown."""
    names = ", ".join(layer_type.name for layer_type in types)
    for layer_type in types:
        if layer_type.name not in (FULL_ATTENTION, SLIDING_ATTENTION):
            raise CustomMaskError(
                f"attention_mask: expected a 2-D padding mask for {layer_type.name} layers, got a mask of another form"
            )
    if not isinstance(mask, dict):
        return dict.fromkeys(types, mask)
    if not {layer_type.name for layer_type in types} <= set(mask):
        found = ", ".join(map(str, mask))
        raise CustomMaskError(f"attention_mask: expected masks for {names} layers, got a dict of masks for {found}")
    return {layer_type: mask[layer_type.name] for layer_type in types}


def _check_4d_mask(layer_type: LayerType, causal: Any, batch: int, columns: int, past: int) -> None:
    """Raise CustomMaskError unless a mask has the shape and the values of a 4-D causal mask."""
    if not isinstance(causal, torch.Tensor) or causal.ndim != 4:
        raise CustomMaskError(f"attention_mask: expected a 2-D padding mask or a 4-D mask, got {_describe(causal)}")
    if causal.device.type == "meta":
        raise CustomMaskError("attention_mask: expected a mask with data, got one on the meta device")
    needed = past + columns - layer_type.first
    if causal.shape[0] not in (1, batch) or causal.shape[1:3] != (1, columns) or causal.shape[3] < needed:
        raise CustomMaskError(
            f"attention_mask: expected a causal mask of [{batch}, 1, {columns}, {needed} or more], "
            f"got {_describe(causal)}"
        )
    if causal.dtype == torch.bool:
        return
    if not causal.is_floating_point() or not bool(((causal == 0) | (causal <= torch.finfo(causal.dtype).min)).all()):
        raise CustomMaskError(
            "attention_mask: expected a 4-D mask of bools, or of floats that are 0, -inf or the lowest of their dtype, "
            f"got {_describe(causal)} with other values"
        )


def _attends(causal: torch.Tensor) -> torch.Tensor:
    """Return a bool tensor of the mask's shape, True where a row attends to a slot."""
    return causal if causal.dtype == torch.bool else causal == 0


def _attended_slots(causal: torch.Tensor, layer_type: LayerType, past: int) -> torch.Tensor:
    """Return bool ``[past + columns]``, True for a slot that the last row which can reach it attends to.

    Args:
        causal: mask of one sequence, ``[columns, slots]``.
        layer_type: of the mask.
        past: slots that the cache holds before the new columns.
    """
    columns, device = len(causal), causal.device
    # The last row that reaches a slot: rows of left padding, which may attend to anything, come before it.
    slot = torch.arange(layer_type.first, past + columns, device=device)
    reader = torch.full_like(slot, columns - 1)
    if layer_type.window:
        reader = (slot - past + layer_type.window - 1).clamp(max=columns - 1)
    real = torch.zeros(past + columns, dtype=torch.bool, device=device)
    real[layer_type.first :] = _attends(causal)[reader.clamp(min=0), slot - layer_type.first] & (reader >= 0)
    return real


def _check_rows(
    causal: torch.Tensor, layer_type: LayerType, real: torch.Tensor, spans: list[tuple[int, int]], past: int
) -> None:
    """Raise CustomMaskError unless each real row of one sequence attends to what a native prefill lets it attend to.

    Args:
        causal: mask of the sequence, ``[columns, slots]``.
        layer_type: of the mask.
        real: bool ``[past + columns]``, True for a real token.
        spans: (begin, end) of real new tokens that attend to each other in both directions.
        past: slots that the cache holds before the new columns.
    """
    columns, slots = causal.shape
    new = real[past:]
    slot = torch.arange(layer_type.first, layer_type.first + slots, device=causal.device)
    row = torch.arange(past, past + columns, device=causal.device)[:, None]
    expected = slot[None] <= row
    if layer_type.window:
        expected &= slot[None] > row - layer_type.window
    column = int(new.int().argmax())  # of the first real new token
    for begin, end in spans:
        first_row, first_slot = column + begin, column + begin + past - layer_type.first
        expected[first_row : first_row + end - begin, first_slot : first_slot + end - begin] = True
    real_columns = torch.zeros(slots, dtype=torch.bool, device=causal.device)
    real_columns[: past + columns - layer_type.first] = real[layer_type.first :]
    # Rows of padding may attend to anything: their results are not used.
    if bool((((expected & real_columns) != _attends(causal)) & new[:, None]).any()):
        raise CustomMaskError(
            f"attention_mask: expected a causal mask for {layer_type.name} layers, got a 4-D mask with another pattern"
        )


def _describe(mask: Any) -> str:
    """Return dtype and shape of a mask for an error text, or the type of something that is no tensor."""
    return f"a {mask.dtype} tensor of {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
