"""Faults that the fuzz of arguments has found and that are not mended yet, by name; such calls are left out.

Whoever mends one deletes its entry here, and the fuzz holds the right behaviour from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WITHOUT_MEMORY = ("freed", "shrunk")
TEXTS_IN_ERRORS = {"enable", "Plan.preset", "gated_act", "tune", "fit"}


def mask_without_memory(target: str, labels: dict[str, str], arguments: dict[str, Any]) -> bool:
    """`NativeModel.prefill` reads an `attention_mask` whose storage was freed or shrunk: a segmentation fault.

    So does the stock forward, with every tensor, and with it the forward and `explain` of an enabled model.
    """
    names = ("attention_mask",) if target == "native.prefill" else tuple(labels)
    entries = ("native.prefill", "enabled forward", "explain")
    return target in entries and any(name in names and label in WITHOUT_MEMORY for name, label in labels.items())


def huge_cu_seqlens(target: str, labels: dict[str, str], arguments: dict[str, Any]) -> bool:
    """`cu_seqlens` of 2**33 entries is copied before its values are compared: a MemoryError of "std::bad_alloc"."""
    value = arguments.get("cu_seqlens")
    return isinstance(value, torch.Tensor) and value.numel() >= 2**31


def echoed_text(target: str, labels: dict[str, str], arguments: dict[str, Any]) -> bool:
    """An unknown name (of a backend, preset, activation, option, method) of any length is shown whole in the error."""
    return target in TEXTS_IN_ERRORS and any(isinstance(v, str) and len(v) > 1000 for v in arguments.values())


KNOWN: dict[str, Callable[[str, dict[str, str], dict[str, Any]], bool]] = {
    "mask without memory": mask_without_memory,
    "huge cu_seqlens": huge_cu_seqlens,
    "text shown whole": echoed_text,
}


def known_fault(target: str, labels: dict[str, str], arguments: dict[str, Any]) -> str | None:
    """Return the name of the known fault that a call would meet, or None."""
    return next((name for name, meets in KNOWN.items() if meets(target, labels, arguments)), None)
