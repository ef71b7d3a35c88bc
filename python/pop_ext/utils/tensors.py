"""Checks of tensors that a kernel would read as they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd import forward_ad

_functorch = torch._C._functorch


def in_transform() -> bool:
    """Return whether the code runs inside a transform of ``torch.func``, such as ``vmap``, or in forward-mode AD."""
    return _functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def unusual_kind(tensor: torch.Tensor) -> str | None:
    """Return what a tensor is, for an error, if it is not strided memory with the values in it, else None."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"one of layout {tensor.layout}"
    return f"one of {tensor.dtype}" if tensor.is_quantized else None


def check_dense(tensors: Mapping[str, Any]) -> None:
    """Check that tensors are dense, and that they have memory.

    Args:
        tensors: by their names in the error; values that are no tensors are passed over.

    Raises:
        ValueError: One is sparse, nested, quantised or inside a transform of ``torch.func``, or as for
            ``check_memory``.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        found = unusual_kind(tensor)
        if found is None and _functorch.is_functorch_wrapped_tensor(tensor):
            found = "one inside a transform of torch.func"
        if found is not None:
            raise ValueError(f"{name}: expected a dense tensor, got {found}")
    check_memory(tensors)


def check_memory(tensors: Mapping[str, Any]) -> None:
    """Check that tensors have memory for their elements: a storage may have been freed or shrunk under one.

    Args:
        tensors: by their names in the error; values that are no dense tensors are passed over.

    Raises:
        ValueError: One has none. torch itself would read what lies there.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and not _has_memory(tensor):
            _raise_without_memory(name, tensor)


def check_layers(cache: Any) -> None:
    """Check that the tensors of a cache of layers have memory (``check_memory``)."""
    for index, layer in enumerate(getattr(cache, "layers", None) or ()):
        for name in ("keys", "values", "cumulative_length"):
            tensor = getattr(layer, name, None)
            if tensor is not None and isinstance(tensor, torch.Tensor) and not _has_memory(tensor):
                _raise_without_memory(f"past_key_values: layer {index} {name}", tensor)


def _raise_without_memory(name: str, tensor: torch.Tensor) -> None:
    raise ValueError(
        f"{name}: expected a tensor with memory for its elements, got shape {list(tensor.shape)} over "
        f"a storage of {tensor.untyped_storage().nbytes()} bytes (freed or shrunk)"
    )


def _has_memory(tensor: torch.Tensor) -> bool:
    """Return False if the storage of a tensor ends before its last element. What has no storage to look at has memory.

    Subclasses that wrap other tensors (fake tensors, quantised weights) have none of their own.
    """
    if type(tensor) is torch.Tensor:
        return _fits_its_storage(tensor)
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return True
    with torch._C.DisableTorchFunctionSubclass():
        return _fits_its_storage(tensor)


def _fits_its_storage(tensor: torch.Tensor) -> bool:
    if tensor.is_nested:
        return True
    try:
        size = tensor.untyped_storage().nbytes()
    except RuntimeError:  # sparse, or inside a transform of torch.func
        return True
    last = count = tensor.numel()
    if count and not tensor.is_contiguous():
        last = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return count == 0 or size >= (tensor.storage_offset() + last) * tensor.element_size()


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory could not be allocated. For a tensor on a CPU torch raises a plain RuntimeError then."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and ("alloc" in str(error) or "memory" in str(error))


def resolved(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with its values in consecutive memory; the tensor itself if it is so already.

    torch may leave it to the reader to negate values, or to take zeros for memory that is not there.
    """
    return (tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()).contiguous()
