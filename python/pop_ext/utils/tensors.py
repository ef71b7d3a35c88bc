"""Checks of tensors that a kernel would read as they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def check_memory(tensors: Mapping[str, Any]) -> None:
    """Check that tensors have memory for their elements: a storage may have been freed or shrunk under one.

    Args:
        tensors: by their names in the error; values that are no plain dense tensors are passed over.

    Raises:
        ValueError: One has none. torch itself would read what lies there.
    """
    for name, tensor in tensors.items():
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.device.type == "meta":
            continue
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (tensor.storage_offset() + steps + 1) * tensor.element_size()
        if tensor.numel() and tensor.untyped_storage().nbytes() < needed:
            raise ValueError(
                f"{name}: expected a tensor with memory for its elements, got shape {list(tensor.shape)} over "
                f"a storage of {tensor.untyped_storage().nbytes()} bytes (freed or shrunk)"
            )
