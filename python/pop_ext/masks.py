"""Masks that say no more than which tokens are padding, whatever their form.

``generate`` turns a 2-D mask of padding into 4-D causal ones, in a dict by layer type for some families,
before it calls a model with a static cache.
"""

from __future__ import annotations

from typing import Any

import torch

FULL_ATTENTION = "full_attention"


class CustomMaskError(ValueError):
    """The mask says more than which tokens are padding."""


def padding_mask(
    mask: Any, batch: int, columns: int, past: int, layer_types: tuple[str, ...] = ()
) -> torch.Tensor | None:
    """The 2-D mask of padding that ``mask`` stands for.

    Args:
        mask: None, ``[batch, past + columns]``, a 4-D causal mask ``[batch or 1, 1, columns, slots]`` (bool, or
            added to the scores), or a dict of one of them for full attention.
        columns, past: new columns of the call, and slots that the cache holds before them.
        layer_types: kinds of layers of a family that takes a dict, empty for others.

    Returns:
        2-D masks and None as they are; of a 4-D one, bool ``[batch, past + columns]``.

    Raises:
        CustomMaskError: of another kind, or not exactly "what came before and is no padding".
    """
    if isinstance(mask, dict):
        if set(mask) != {FULL_ATTENTION} or set(layer_types) != {FULL_ATTENTION}:
            kinds = ", ".join(map(str, mask))
            raise CustomMaskError(f"attention_mask: expected a mask of padding, got a dict of masks ({kinds})")
        mask = mask[FULL_ATTENTION]
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        return mask
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        raise CustomMaskError(f"attention_mask: expected a 2-D mask of padding, got {_form(mask)}")
    if mask.device.type == "meta":
        raise CustomMaskError("attention_mask: expected a mask with data, got one on the meta device")
    slots = mask.shape[3]
    if mask.shape[0] not in (1, batch) or mask.shape[1:3] != (1, columns) or slots < past + columns:
        raise CustomMaskError(
            f"attention_mask: expected a causal mask of [{batch}, 1, {columns}, {past + columns} or more], "
            f"got {_form(mask)}"
        )
    return torch.stack([_padding_of(causal, past) for causal in mask[:, 0]]).expand(batch, -1)


def _padding_of(causal: torch.Tensor, past: int) -> torch.Tensor:
    """Bool ``[past + columns]`` of one sequence's causal mask ``[columns, slots]``."""
    columns, slots = causal.shape
    seen = causal
    if causal.dtype != torch.bool:
        seen = causal == 0
        if not causal.is_floating_point() or bool((~seen & (causal > torch.finfo(causal.dtype).min)).any()):
            raise CustomMaskError("attention_mask: expected a causal mask, got a 4-D one of other values")
    # The last row sees every slot but padding.
    real = seen[-1]
    slot = torch.arange(slots, device=causal.device)
    expected = (slot[None] <= slot[past : past + columns, None]) & real
    # Rows of padding may see anything: nobody reads what they compute.
    wrong = ((seen != expected) & real[past : past + columns, None]).any() | real[past + columns :].any()
    if bool(wrong):
        raise CustomMaskError("attention_mask: expected a causal mask, got a 4-D one of another pattern")
    return real[: past + columns]


def _form(mask: Any) -> str:
    return f"a {mask.dtype} tensor of {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
