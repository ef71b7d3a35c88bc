"""Calls that the fuzz of arguments leaves out, by name: faults that are not mended."""

from __future__ import annotations

from typing import Any


def stock_reads_no_memory(target: str, labels: dict[str, str], arguments: dict[str, Any]) -> bool:
    """The stock forward reads tensors whose storage was freed or shrunk, where it runs a call: torch's fault."""
    freed = any(label in ("freed", "shrunk") for label in labels.values())
    return target in ("enabled forward", "explain") and freed


KNOWN = {"the stock forward without memory": stock_reads_no_memory}


def known_fault(target: str, labels: dict[str, str], arguments: dict[str, Any]) -> str | None:
    """Return the name of the known fault that a call would meet, or None."""
    return next((name for name, meets in KNOWN.items() if meets(target, labels, arguments)), None)
