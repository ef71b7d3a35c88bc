"""A call of the fuzz of arguments, and one with a planted fault, which it must find. Does not import pop_ext."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """A call.

    Attributes:
        name: for messages.
        call: takes the arguments by name.
        arguments: make valid ones, anew each time.
        result: from what the valid call returned and its arguments to something that compares by value.
        stock: the same call without pop_ext; an exception that it raises, too, is none of ours.
    """

    name: str
    call: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    result: Callable[[Any, dict[str, Any]], Any] = lambda out, arguments: [out, arguments]
    stock: Callable[..., Any] | None = None


def planted_target() -> Target:
    """Return a call that is right with valid arguments, the first time, and has the fault with hostile ones."""
    planted = os.environ["POP_PLANTED"]
    spoilt: list[bool] = []

    def call(x: Any, eps: Any) -> torch.Tensor:
        if isinstance(x, torch.Tensor) and x.shape == (5, 32) and x.dtype == torch.float32 and eps == 1e-6:
            return torch.ones(5) * (2 if spoilt else 1)
        if planted == "text":
            raise RuntimeError("std::vector")
        if planted == "type":
            raise KeyError("x")
        if planted == "written":
            fresh[-1].zero_()
            raise RuntimeError("planted")
        if planted == "crash":
            ctypes.string_at(0)
        if planted == "hang":
            time.sleep(60)
        spoilt.append(planted == "result")
        return torch.ones(5)

    fresh: list[torch.Tensor] = []

    def arguments() -> dict[str, Any]:
        fresh.append(torch.ones(5, 32))
        return {"x": fresh[-1], "eps": 1e-6}

    return Target("planted", call, arguments, lambda out, arguments: out)
