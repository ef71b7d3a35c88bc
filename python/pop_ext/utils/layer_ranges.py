"""Lists of integers as people write them: ``22-31`` or ``8,9,11``."""

from __future__ import annotations

import re
from collections.abc import Iterable


def parse_ranges(text: str) -> list[int]:
    """Parse numbers and inclusive ranges separated by commas: ``"3,5-7"`` -> ``[3, 5, 6, 7]``; ``""`` -> ``[]``.

    Raises:
        ValueError: The text is anything else, or a range runs backwards.
    """
    numbers: list[int] = []
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"expected numbers like 1,2,4 or 1-6, got {text!r}")
        numbers.extend(range(first, last + 1))
    return numbers


def parse_layers(text: str, argument: str = "--omit") -> list[int]:
    """Parse layer indices as ``parse_ranges`` does; an error names ``argument``.

    Raises:
        ValueError: The text is no list of numbers and ranges.
    """
    try:
        return parse_ranges(text)
    except ValueError:
        raise ValueError(f"{argument}: expected layers like 22-31 or 8,9,11, got {text!r}") from None


def format_layers(layers: Iterable[int], separator: str = ", ") -> str:
    """Write ascending layer indices as people do: ``[3, 5, 6, 7]`` -> ``"3, 5-7"``; none -> ``""``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return separator.join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
