"""Shallow copies of modules, in which something else may stand in a child's place."""

from __future__ import annotations

from typing import Any

from torch import nn


def shell_of(module: nn.Module, **children: nn.Module) -> Any:
    """A shallow copy: the same modules but for ``children``, and the ``forward`` of its class.

    Whatever is assigned to it stays there. It holds no ``forward`` of ours, so that no cycle keeps it alive.
    """
    shell: nn.Module = object.__new__(type(module))
    shell.__dict__.update({name: value for name, value in module.__dict__.items() if name != "forward"})
    if children:
        shell.__dict__["_modules"] = {**module._modules, **children}
    return shell
