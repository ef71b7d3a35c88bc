"""Masks that say no more than which tokens are padding, whatever their form.

``generate`` turns a 2-D mask of padding into 4-D ones, in a dict by kind of layers for some families, before it calls
a model with a static cache. ``padding_mask`` reads the padding off them; ``check_pattern`` makes sure that they say
nothing else than a native prefill does by itself: causal, the window of a layer, images that see themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"

_Masks = dict["LayerKind", torch.Tensor | None]


class CustomMaskError(ValueError):
    """The mask says more than which tokens are padding."""


@dataclass(frozen=True)
class LayerKind:
    """What the stock model makes a mask of its own for.

    Attributes:
        name: key of the mask in a dict.
        window: slots that a row sees, its own included; 0: all before it.
        first: slot of the cache that the mask's first column stands for.
    """

    name: str
    window: int
    first: int


def kinds_of(config: Any, cache: Any, columns: int) -> list[LayerKind]:
    """The kinds of a model's layers, for a call that brings ``columns`` new ones.

    Args:
        config: of the language model.
        cache: a transformers Cache or None.
    """
    window = getattr(config, "sliding_window", None) or 0
    names = list(getattr(config, "layer_types", None) or [SLIDING_ATTENTION if window else FULL_ATTENTION])
    kinds = []
    for name in dict.fromkeys(names):
        first = 0 if cache is None else int(cache.get_mask_sizes(columns, names.index(name))[1])
        kinds.append(LayerKind(name, window if name == SLIDING_ATTENTION else 0, first))
    return kinds


def padding_mask(mask: Any, batch: int, columns: int, past: int, kinds: Sequence[LayerKind]) -> torch.Tensor | None:
    """The 2-D mask of padding that ``mask`` stands for, if it stands for one: ``check_pattern`` finds out.

    Args:
        mask: None, ``[batch, past + columns]``, a 4-D mask ``[batch or 1, 1, columns, slots]`` (bool, or added to the
            scores), or a dict of a 4-D mask or None for each of ``kinds``.
        columns, past: new columns of the call, and slots that the cache holds before them.

    Returns:
        2-D masks and None as they are; of 4-D ones, bool ``[batch, past + columns]``. Slots that no row sees count as
        padding.

    Raises:
        CustomMaskError: of another form.
    """
    if isinstance(mask, dict) and len(kinds) == 1:
        only = mask.get(kinds[0].name)
        if isinstance(only, torch.Tensor) and only.ndim == 2:
            return only
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        return mask
    given = [(kind, causal) for kind, causal in _by_kind(mask, kinds).items() if causal is not None]
    real = None
    for kind, causal in given:
        _check_form(kind, causal, batch, columns, past)
        seen = torch.stack([_padding_of(rows, kind, past) for rows in causal[:, 0]]).expand(batch, -1)
        real = seen if real is None else real | seen
    return real


def check_pattern(
    mask: Any,
    padding: torch.Tensor | None,
    blocks: list[tuple[int, int, int]],
    columns: int,
    past: int,
    kinds: Sequence[LayerKind],
) -> None:
    """Raises ``CustomMaskError`` for 4-D masks that are not what a native prefill computes.

    Args:
        mask, columns, past, kinds: as of ``padding_mask``, which returned ``padding``.
        blocks: (sequence, begin, end) of real new tokens that see each other.
    """
    if not isinstance(mask, dict) and (mask is None or mask.ndim == 2):
        return
    for kind, causal in _by_kind(mask, kinds).items():
        if causal is None:
            # The stock attention is causal then, over the new columns alone.
            plain = past == 0 and not blocks and (padding is None or bool(padding.all()))
            if not plain or 0 < kind.window < columns:
                raise CustomMaskError(f"attention_mask: expected a mask for {kind.name} layers, got None")
        elif causal.ndim == 4 and padding is not None:
            for sequence, real in enumerate(padding):
                own = [(begin, end) for number, begin, end in blocks if number == sequence]
                _check_rows(causal[sequence if len(causal) > 1 else 0, 0], kind, real, own, past)


def _by_kind(mask: Any, kinds: Sequence[LayerKind]) -> _Masks:
    """The mask of each kind. Raises ``CustomMaskError`` for kinds without one, or that nothing is known of."""
    names = ", ".join(kind.name for kind in kinds)
    for kind in kinds:
        if kind.name not in (FULL_ATTENTION, SLIDING_ATTENTION):
            raise CustomMaskError(f"attention_mask: expected a 2-D mask of padding for {kind.name} layers, got another")
    if not isinstance(mask, dict):
        return dict.fromkeys(kinds, mask)
    if not {kind.name for kind in kinds} <= set(mask):
        found = ", ".join(map(str, mask))
        raise CustomMaskError(f"attention_mask: expected masks for {names} layers, got a dict of masks for {found}")
    return {kind: mask[kind.name] for kind in kinds}


def _check_form(kind: LayerKind, causal: Any, batch: int, columns: int, past: int) -> None:
    if not isinstance(causal, torch.Tensor) or causal.ndim != 4:
        raise CustomMaskError(f"attention_mask: expected a 2-D mask of padding or a 4-D one, got {_form(causal)}")
    if causal.device.type == "meta":
        raise CustomMaskError("attention_mask: expected a mask with data, got one on the meta device")
    needed = past + columns - kind.first
    if causal.shape[0] not in (1, batch) or causal.shape[1:3] != (1, columns) or causal.shape[3] < needed:
        raise CustomMaskError(
            f"attention_mask: expected a causal mask of [{batch}, 1, {columns}, {needed} or more], got {_form(causal)}"
        )
    if causal.dtype == torch.bool:
        return
    if not causal.is_floating_point() or not bool(((causal == 0) | (causal <= torch.finfo(causal.dtype).min)).all()):
        raise CustomMaskError("attention_mask: expected a causal mask, got a 4-D one of other values")


def _seen(causal: torch.Tensor) -> torch.Tensor:
    return causal if causal.dtype == torch.bool else causal == 0


def _padding_of(causal: torch.Tensor, kind: LayerKind, past: int) -> torch.Tensor:
    """Bool ``[past + columns]``: slots that a row of one sequence's mask ``[columns, slots]`` sees."""
    columns, device = len(causal), causal.device
    # The last row that a window lets see a slot: rows of padding, which may see anything, come first.
    slot = torch.arange(kind.first, past + columns, device=device)
    reader = torch.full_like(slot, columns - 1)
    if kind.window:
        reader = (slot - past + kind.window - 1).clamp(max=columns - 1)
    real = torch.zeros(past + columns, dtype=torch.bool, device=device)
    real[kind.first :] = _seen(causal)[reader.clamp(min=0), slot - kind.first] & (reader >= 0)
    return real


def _check_rows(
    causal: torch.Tensor, kind: LayerKind, padding: torch.Tensor, blocks: list[tuple[int, int]], past: int
) -> None:
    """Whether the rows of one sequence's mask ``[columns, slots]`` see what they should, and nothing else.

    Args:
        padding: bool ``[past + columns]``, True for a real token.
        blocks: (begin, end) of real new tokens.
    """
    columns, slots = causal.shape
    new = padding[past:]
    slot = torch.arange(kind.first, kind.first + slots, device=causal.device)
    row = torch.arange(past, past + columns, device=causal.device)[:, None]
    expected = slot[None] <= row
    if kind.window:
        expected &= slot[None] > row - kind.window
    column = int(new.int().argmax())  # of the first real new token
    for begin, end in blocks:
        rows, seen = (slice(start + begin, start + end) for start in (column, column + past - kind.first))
        expected[rows, seen] = True
    real = torch.zeros(slots, dtype=torch.bool, device=causal.device)
    real[: past + columns - kind.first] = padding[kind.first :]
    # Rows of padding may see anything: nobody reads what they compute.
    if bool((((expected & real) != _seen(causal)) & new[:, None]).any()):
        raise CustomMaskError(
            f"attention_mask: expected a causal mask for {kind.name} layers, got a 4-D one of another pattern"
        )


def _form(mask: Any) -> str:
    return f"a {mask.dtype} tensor of {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
