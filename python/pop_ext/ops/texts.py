"""The operators that return text, over their twins that return it as UTF-8.

A string that an operator of torch's stable ABI returns is never freed (up to torch 2.13), but a list of numbers is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_NAMES = (
    "cpu_isa",
    "device_missing",
    "foreign_schemas",
    "info",
    "int8_isa",
    "prepack_missing",
    "products_missing",
    "stale_weight",
)


def _decoding(twin: Any) -> Callable[..., str]:
    """Return a kernel that decodes what ``twin`` returns."""
    return lambda *arguments: bytes(twin(*arguments)).decode()


_IMPLEMENTATIONS = torch.library.Library("pop", "IMPL")  # unregisters them when it is freed
for _name in _NAMES:
    _twin = getattr(torch.ops.pop, f"{_name}_utf8").default
    _IMPLEMENTATIONS.impl(_name, _decoding(_twin), "CompositeExplicitAutograd")
