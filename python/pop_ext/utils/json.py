"""JSON without NaN and infinity, which the format does not have, and members of the type that they should have."""

from __future__ import annotations

import math
from typing import Any

from pop_ext.utils.texts import short

MOST = 2**53
"""Largest int that every reader of JSON keeps."""


def finite(value: Any) -> Any:
    """Replace NaN and infinity by None in nested dicts, lists and tuples; tuples become lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(member) for name, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(member) for member in value]
    return value


def read_int(name: str, value: Any, least: int = 0) -> int:
    """Return a member of a JSON object; raise ValueError unless it is an int from ``least`` to ``MOST``."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {short(value)}")
    return value


def read_float(name: str, value: Any, missing: float = math.nan) -> float:
    """Return a member of a JSON object; raise ValueError unless it is a number, or null for ``missing``."""
    if value is None:
        return missing
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= 1e308:
        raise ValueError(f"{name}: expected a finite number, got {short(value)}")
    return float(value)


def read_text(name: str, value: Any) -> str:
    """Return a member of a JSON object; raise ValueError unless it is a text."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a text, got {short(value)}")
    return value


def read_list(name: str, value: Any, length: int | None = None) -> list[Any]:
    """Return a member of a JSON object; raise ValueError unless it is a list, of ``length`` items if that is given."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise ValueError(f"{name}: expected a list{'' if length is None else f' of {length}'}, got {short(value)}")
    return value
