"""Hostile values in place of a valid argument: wrong kinds, shapes, dtypes, memory, and sharing of memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HUGE = 2**33
"""Columns of an expanded tensor: more than 32 bits, and without memory of their own."""
INTEGERS = (-1, 0, 1, 2, 3, 7, 1000, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**31), -(2**63), 2**63, 2**70)
FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-320, 1e300)
OTHERS: tuple[Any, ...] = (None, True, "", "x", b"x", [], {}, (), 1.5, object, torch.float32, range(3), 1j, [None])
JSON = (
    "", "{}", "[]", "null", "1e999", '{"a": 1}', "[" * 100_000, '{"a":' * 5000, "NaN", '"\\ud800"', "\0", "\ud800",
    '{"num_layers": 1, "num_layers": 2}', "x" * 1_000_000,
)  # fmt: skip


class Subclass(Tensor):
    """A tensor of another class, as wrappers of weights are."""


def same_memory(tensor: Tensor) -> Tensor:
    """Return a tensor of this shape all of whose elements are one."""
    return tensor.flatten()[:1].clone().as_strided(tensor.shape, [0] * tensor.ndim)


def freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous().clone()
    tensor.untyped_storage().resize_(max(0, tensor.untyped_storage().nbytes() - tensor.element_size()))
    return tensor


def with_one(value: float) -> Callable[[Tensor], Tensor]:
    """Return a function that puts `value` at the middle of a copy; a dtype that cannot hold it raises."""

    def put(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return put


def gaps(tensor: Tensor) -> Tensor:
    """Return the same values with a gap after each element of the last dimension."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def offset(tensor: Tensor) -> Tensor:
    """Return the same values at an address that is not aligned."""
    wide = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    return wide.copy_(tensor)


def quantised(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


def resized(dim: int, size: int) -> Callable[[Tensor], Tensor]:
    """Return a function that repeats or cuts a dimension to `size`."""

    def resize(tensor: Tensor) -> Tensor:
        index = torch.arange(size) % max(1, tensor.shape[dim])
        return tensor.index_select(dim, index)

    return resize


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    **{f"dtype {dtype}": lambda t, dtype=dtype: t.to(dtype) for dtype in (
        torch.float64, torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.int64,
        torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8,
    )},
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: t.select(0, 0),
    "flat": lambda t: t.flatten(),
    "0-d": lambda t: t.flatten()[0],
    "empty": lambda t: t[:0],
    "empty columns": lambda t: t[..., :0],
    "empty, three dimensions": lambda t: t.new_empty(0, 3, 0),
    "one row": lambda t: t[:1],
    "one column": lambda t: t[..., :1],
    "one row less": lambda t: t[:-1],
    "one column less": lambda t: t[..., :-1],
    "one row more": lambda t: resized(0, t.shape[0] + 1)(t),
    "one column more": lambda t: resized(-1, t.shape[-1] + 1)(t),
    "many rows": lambda t: resized(0, 300)(t),
    "huge rows": lambda t: t[:1].expand(HUGE, *t.shape[1:]),
    "huge columns": lambda t: t[..., :1].expand(*t.shape[:-1], HUGE),
    "huge everywhere": lambda t: t.flatten()[0].expand([2**20] * t.ndim),
    "nan": with_one(float("nan")),
    "inf": with_one(float("inf")),
    **{f"{value} inside": with_one(value) for value in (-1, 1000, 2**31 - 1, -(2**31), 2**40, -(2**63))},
    "all zero": torch.zeros_like,
    "gaps": gaps,
    "not aligned": offset,
    "column-major": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "reversed dimensions": lambda t: t.permute(*reversed(range(t.ndim))),
    "one element everywhere": same_memory,
    "one row everywhere": lambda t: t[:1].expand(t.shape),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse csr": lambda t: t.to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "quantised": quantised,
    "requires grad": lambda t: t.clone().requires_grad_(),
    "of a graph": lambda t: t.clone().requires_grad_() * 1,
    "negated": lambda t: torch._neg_view(t.clone()),
    "conjugated": lambda t: t.to(torch.complex64).conj(),
    "imaginary part": lambda t: torch.complex(t.float(), t.float()).conj().imag,
    "efficient zero": lambda t: torch._efficientzerotensor(tuple(t.shape), dtype=t.dtype),
    "freed": freed,
    "shrunk": shrunk,
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "parameter": lambda t: torch.nn.Parameter(t.clone()),
    "subclass": lambda t: t.clone().as_subclass(Subclass),
    "numpy": lambda t: t.numpy(),
    "a list": lambda t: t.tolist(),
    "in a list": lambda t: [t],
}  # fmt: skip
"""Changes of a tensor by name. Those that a tensor cannot undergo raise, and another is drawn."""


def hostile_tensor(rng: random.Random, valid: Tensor, others: list[Tensor]) -> tuple[str, Any]:
    """Return a name and a value in place of a tensor. `others` are the call's other tensors, which it may share."""
    kind = rng.choice(("change", "change", "change", "change", "other", "alias"))
    if kind == "other":
        value = rng.choice((*OTHERS, rng.choice(INTEGERS)))
        return repr(value)[:40], value
    if kind == "alias" and others:
        other = rng.choice(others)
        if rng.random() < 0.5:
            return "another argument", other
        count, room = valid.numel(), other.untyped_storage().nbytes() // other.element_size()
        if other.dtype == valid.dtype and count <= room:
            first = rng.randint(0, room - count)
            flat = other.as_strided((count,), (1,), first)
            return "memory of another argument", flat.view(valid.shape)
        return "another argument", other
    for _ in range(20):
        name, change = rng.choice(list(TENSORS.items()))
        try:
            return name, change(valid)
        except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError):
            continue
    return "None", None


def hostile_list(rng: random.Random, valid: list[Any], others: list[Tensor]) -> tuple[str, Any]:
    """Return a name and a value in place of a list."""
    kind = rng.choice(
        ("element", "element", "element", "shorter", "longer", "empty", "twice", "tuple", "many", "other")
    )
    if kind == "element" and valid:
        index = rng.randrange(len(valid))
        name, value = hostile(rng, valid[index], [*others, *(v for v in valid if isinstance(v, Tensor))])
        return f"[{index}] {name}", [*valid[:index], value, *valid[index + 1 :]]
    values: dict[str, Any] = {
        "shorter": valid[:-1],
        "longer": [*valid, *valid[-1:]],
        "empty": [],
        "twice": valid[:1] * len(valid),
        "tuple": tuple(valid),
        "many": valid * 300,
    }
    if kind in values:
        return kind, values[kind]
    value = rng.choice(OTHERS)
    return repr(value)[:40], value


def hostile_text(rng: random.Random, valid: str) -> tuple[str, Any]:
    """Return a name and a value in place of a text: cut, changed in one place, or another."""
    kind = rng.choice(("cut", "changed", "number", "number", "other", "other"))
    if kind == "cut":
        end = rng.randint(0, len(valid))
        return f"cut at {end}", valid[:end]
    if kind == "changed" and valid:
        at, letter = rng.randrange(len(valid)), rng.choice('0-9{}[]",:\\e\0\x7fä')
        return f"{letter!r} at {at}", valid[:at] + letter + valid[at + 1 :]
    if kind == "number":
        numbers = [i for i, letter in enumerate(valid) if letter.isdigit() and not valid[i - 1].isdigit()]
        if numbers:
            at, value = rng.choice(numbers), rng.choice((*INTEGERS, *FLOATS, "null", '"x"', "[]", "true"))
            end = at + 1
            while end < len(valid) and valid[end].isdigit():
                end += 1
            return f"{value} at {at}", f"{valid[:at]}{value}{valid[end:]}"
    value = rng.choice((*JSON, *OTHERS))
    return repr(value)[:40], value


def hostile(rng: random.Random, valid: Any, others: list[Tensor]) -> tuple[str, Any]:
    """Return a name and a hostile value in place of `valid`."""
    if isinstance(valid, Tensor):
        return hostile_tensor(rng, valid, others)
    if isinstance(valid, (list, tuple)):
        return hostile_list(rng, list(valid), others)
    if isinstance(valid, str):
        return hostile_text(rng, valid)
    numbers: tuple[Any, ...] = FLOATS if isinstance(valid, float) else INTEGERS
    if valid is None and others and rng.random() < 0.7:
        return hostile_tensor(rng, rng.choice(others), others)
    value = rng.choice((*numbers, *OTHERS)) if rng.random() < 0.9 or not others else rng.choice(others)
    return ("a tensor" if isinstance(value, Tensor) else repr(value)[:40]), value
