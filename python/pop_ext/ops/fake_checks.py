"""Registration of fake kernels, and the checks that they share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def named(name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a list under their names in errors: ``name[0]``, ``name[1]``, ..."""
    return {f"{name}[{index}]": tensor for index, tensor in enumerate(tensors)}


def check_devices(op: str, **tensors: Tensor | list[Tensor] | None) -> None:
    """Check that all tensors, and those of lists, are on the device of the first one.

    The kernels check this as well. But if only one of several tensors is on the meta device, torch calls the fake
    kernel in their place. (A FakeTensor has the device that it stands for.)

    Raises:
        RuntimeError: at least one is elsewhere.
    """
    places: dict[str, Tensor | None] = {}
    for name, value in tensors.items():
        places |= named(name, value) if isinstance(value, list) else {name: value}
    given = {place: tensor for place, tensor in places.items() if tensor is not None}
    like, device = next((place, tensor.device) for place, tensor in given.items())
    for place, tensor in given.items():
        if tensor.device != device:
            raise RuntimeError(f"pop::{op}: {place}: expected device {device} like {like}, got {tensor.device}")


def check_lengths(op: str, **lengths: Tensor | None) -> None:
    """Check that tensors of lengths are on the CPU.

    Raises:
        RuntimeError: at least one is elsewhere.
    """
    for name, tensor in lengths.items():
        if tensor is not None and tensor.device.type != "cpu":
            raise RuntimeError(
                f"pop::{op}: {name}: expected a tensor on the CPU (the operator never synchronises), "
                f"got {tensor.device}"
            )


def fake(name: str) -> Callable[[_Function], _Function]:
    """Register the fake kernel of an operator; it gets a tensor for every argument that takes no None.

    None reaches the kernels of the operator as well, and is an error there.
    """

    def register(kernel: _Function) -> _Function:
        required = [key for key, hint in kernel.__annotations__.items() if hint == "Tensor" and key != "return"]
        parameters = list(inspect.signature(kernel).parameters)

        @functools.wraps(kernel)
        def checked(*arguments: Any, **named: Any) -> Any:
            given = dict(zip(parameters, arguments, strict=False)) | named
            for key in required:
                if given.get(key) is None:
                    raise RuntimeError(f"pop::{name}: {key}: expected a tensor, got None")
            return kernel(*arguments, **named)

        torch.library.register_fake(f"pop::{name}")(checked)
        return kernel

    return register
