"""Loads the operator library and gives its operators their fake kernels.

Importing this module registers ``torch.ops.pop.*``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pop_ext import _core

# Beside the other compiled module: in an editable install that is not where this file is.
_LIBRARY = Path(_core.__file__).with_name("_ops.so")


def _load_library() -> None:
    if not _LIBRARY.exists():
        raise ImportError(
            f"pop_ext was installed without its operator library: expected {_LIBRARY}. "
            "Install with `pip install .`, or build in place with `make dev`."
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        raise ImportError(
            f"pop_ext's operator library does not load under torch {torch.__version__}: "
            f"it is built for torch >= 2.11 (libtorch stable ABI). {error}"
        ) from error


def _schema_mismatches() -> dict[str, str]:
    """aten operators whose schema is not the one that this library calls: name -> what torch has.

    The C++ side passes arguments without a count, so a changed schema must be noticed here.
    """
    mismatches = {}
    for expected in torch.ops.pop.aten_schemas().split("\n"):
        qualified = expected[: expected.index("(")]
        name, _, overload = qualified.removeprefix("aten::").partition(".")
        try:
            actual = str(getattr(getattr(torch.ops.aten, name), overload or "default")._schema)
        except AttributeError:
            actual = "missing"
        if actual != expected:
            mismatches[qualified] = actual
    return mismatches


_load_library()
SCHEMA_MISMATCHES = _schema_mismatches()
# The library refuses these calls itself too, however they are reached: torch.ops.pop needs no Python of ours.
for _name, _found in SCHEMA_MISMATCHES.items():
    torch.ops.pop.disable_aten(_name, f"torch {torch.__version__} has another operator of that name: {_found}")


def require_aten() -> None:
    """Raises RuntimeError when this torch's aten operators are not those the library was written for."""
    if SCHEMA_MISMATCHES:
        listed = "; ".join(f"{name}: found {found}" for name, found in SCHEMA_MISMATCHES.items())
        raise RuntimeError(
            f"pop_ext's matrix products are disabled under torch {torch.__version__}, whose operators changed "
            f'({listed}). pop_ext.enable with backend="reference" works.'
        )


def _named(name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name}[{index}]": tensor for index, tensor in enumerate(tensors)}


def _check_devices(tensors: dict[str, Tensor], input: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != input.device:
            raise RuntimeError(f"pop::prefill: {name}: expected device {input.device} like input, got {tensor.device}")


@torch.library.register_fake("pop::prefill")
def _(
    model: int,
    input: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    past_lens: Tensor,
    cache_start: Tensor,
    boundary: Tensor,
    logits_to_keep: Tensor,
    key_cache: list[Tensor],
    value_cache: list[Tensor],
    slot_table: Tensor | None = None,
    restore_on_error: bool = True,
    window_only: bool = False,
) -> Tensor:
    # Where one of several tensors is on the meta device this is called for all: the kernels' checks see none of them.
    caches = {**_named("key_cache", key_cache), **_named("value_cache", value_cache)}
    _check_devices({"cos": cos, "sin": sin, **caches}, input)
    hidden_size = json.loads(torch.ops.pop.info(model))["spec"]["hidden_size"]
    wanted = torch.library.get_ctx().new_dynamic_size(min=1)
    return key_cache[0].new_empty((wanted, hidden_size))


@torch.library.register_fake("pop::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("pop::add_rms_norm")
def _(x: Tensor, delta: Tensor, weight: Tensor, eps: float, delta_bias: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("pop::gated_act")
def _(gate: Tensor, up: Tensor, *rest: Any, **options: Any) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("pop::attention")
def _(query: Tensor, *rest: Any, **options: Any) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.register_fake("pop::fold_kv")
def _(k_proj: list[Tensor], v_proj: list[Tensor], input_norm: list[Tensor]) -> Tensor:
    kv_dim, hidden_size = k_proj[0].shape
    return k_proj[0].new_empty((2 * len(k_proj) * kv_dim, hidden_size))


@torch.library.register_fake("pop::rope_cache_write")
def _(*arguments: Any, **options: Any) -> None:
    return None


@torch.library.register_fake("pop::kv_project")
def _(*arguments: Any, **options: Any) -> None:
    return None
