"""Values in error texts: short, whatever they are."""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def short(value: Any) -> str:
    """Return the ``repr`` of a value, of a long one only the beginning and the end."""
    try:
        return _SHORT.repr(value)
    except Exception:  # an int of so many digits that Python does not write them, or a repr that fails
        return f"an int of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def missing_or(error: Exception) -> str:
    """Return what an error says that reading a file met. A KeyError names the member that is missing."""
    return f"no member {short(error.args[0])}" if isinstance(error, KeyError) and error.args else f"{error!r:.200}"


def refuse_unknown(name: str, members: dict[str, Any], known: Collection[str]) -> None:
    """Raise ValueError for a member of a JSON object that nobody reads; ``name`` is that of the object."""
    for member in members:
        if member not in known:
            raise ValueError(f"{name}: {short(member)}: expected no such member, got {short(members[member])}")
