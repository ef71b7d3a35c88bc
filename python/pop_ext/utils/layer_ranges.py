"""Layers and other numbers as people write them: ``22-31`` or ``8,9,11``."""

from __future__ import annotations

import re


def parse_layers(text: str) -> list[int]:
    """``"3,5-7"`` -> ``[3, 5, 6, 7]``; "" is no layer.

    Raises:
        ValueError: anything else.
    """
    layers: list[int] = []
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"--omit: expected layers like 22-31 or 8,9,11, got {text!r}")
        layers.extend(range(first, last + 1))
    return layers
