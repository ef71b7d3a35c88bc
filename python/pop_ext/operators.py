"""Loads the operator library and gives its operators their fake kernels.

Importing this module registers ``torch.ops.pop.*``.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pop_ext import _core

# Beside the other compiled module: in an editable install that is not where this file is.
_LIBRARY = Path(_core.__file__).with_name("_ops.so")


# What no prefill does without; the other operators of foreign_schemas() are ways of computing attention.
_REQUIRED = ("aten::mm.out", "aten::mul.Tensor", "aten::detach")


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


def _find_foreign() -> dict[str, str]:
    """Tells the library which operators of others it may call; returns the others: name -> why not.

    The C++ side passes arguments without a count, so a changed schema must be noticed here.
    """
    variants: dict[str, list[str]] = {}
    for schema in torch.ops.pop.foreign_schemas().split("\n"):
        variants.setdefault(schema[: schema.index("(")], []).append(schema)
    unknown = {}
    for qualified, schemas in variants.items():
        found = _schema_of(qualified)
        variant = schemas.index(found) if found in schemas else -1
        reason = "" if variant >= 0 else f"under torch {torch.__version__}: {found}"
        torch.ops.pop.set_foreign(qualified, variant, reason)
        if variant < 0:
            unknown[qualified] = found
    return unknown


def _schema_of(qualified: str) -> str:
    """Schema text of ``namespace::name.overload`` in this process, or "missing"."""
    namespace, _, rest = qualified.partition("::")
    name, _, overload = rest.partition(".")
    try:
        return str(getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")._schema)
    except AttributeError:
        return "missing"


def _import_flash_attention() -> None:
    """Registers flash-attn's operators, for the CUDA backend, where that package is installed."""
    if torch.version.cuda is None or not _core.build_info()["cuda"]:
        return
    for module in ("flash_attn_interface", "flash_attn"):  # FA3, FA2
        try:
            importlib.import_module(module)
        except (ImportError, OSError):  # not installed, or built for another torch
            continue


_load_library()
_import_flash_attention()
FOREIGN_UNKNOWN = _find_foreign()
"""Operators of other libraries that are missing here, or of an unknown schema: name -> what is there."""


def changed_aten() -> dict[str, str]:
    """torch's operators whose schema is none that this library knows: name -> what torch has."""
    return {name: found for name, found in FOREIGN_UNKNOWN.items() if name.startswith("aten::")}


def attention_providers() -> dict[str, str]:
    """Device type -> what computes prefill attention there, the preferred first."""
    providers = {"cpu": "pop::attention (own kernel)"}
    if _core.build_info()["cuda"]:
        names = {
            "flash_attn_3::fwd": "FlashAttention 3",
            "flash_attn::_flash_attn_forward": "FlashAttention 2",
            "aten::scaled_dot_product_attention": "torch's sdpa (no past, compute capability 9.0 up)",
            "aten::_flash_attention_forward": "torch's flash",
        }
        found = [text for name, text in names.items() if name not in FOREIGN_UNKNOWN]
        providers["cuda"] = ", ".join([*found, "pop::attention (own kernel: float32, few rows, slot tables)"])
    return providers


def require_aten() -> None:
    """Raises RuntimeError when this torch's aten operators are not those the library was written for."""
    changed = {name: found for name, found in changed_aten().items() if name in _REQUIRED}
    if changed:
        listed = "; ".join(f"{name}: found {found}" for name, found in changed.items())
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
    cos_local: Tensor | None = None,
    sin_local: Tensor | None = None,
    blocks: Tensor | None = None,
    feature_index: Tensor | None = None,
    features: list[Tensor] | None = None,
) -> Tensor:
    # Where one of several tensors is on the meta device this is called for all: the kernels' checks see none of them.
    caches = {**_named("key_cache", key_cache), **_named("value_cache", value_cache)}
    options = {"cos_local": cos_local, "sin_local": sin_local, "feature_index": feature_index}
    given = {name: tensor for name, tensor in options.items() if tensor is not None}
    _check_devices({"cos": cos, "sin": sin, **given, **_named("features", features or []), **caches}, input)
    hidden_size = json.loads(torch.ops.pop.info(model))["spec"]["hidden_size"]
    wanted = torch.library.get_ctx().new_dynamic_size(min=1)
    return key_cache[0].new_empty((wanted, hidden_size))


@torch.library.register_fake("pop::linear")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("pop::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("pop::add_rms_norm")
def _(x: Tensor, delta: Tensor, weight: Tensor, eps: float, *rest: Any, **options: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("pop::gated_act")
def _(gate: Tensor, up: Tensor, *rest: Any, **options: Any) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("pop::attention")
def _(query: Tensor, *rest: Any, **options: Any) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.register_fake("pop::fold_kv")
def _(k_proj: list[Tensor], v_proj: list[Tensor], input_norm: list[Tensor], norm_offset: float = 0.0) -> Tensor:
    kv_dim, hidden_size = k_proj[0].shape
    return k_proj[0].new_empty((2 * len(k_proj) * kv_dim, hidden_size))


@torch.library.register_fake("pop::rope_cache_write")
def _(*arguments: Any, **options: Any) -> None:
    return None


@torch.library.register_fake("pop::kv_project")
def _(*arguments: Any, **options: Any) -> None:
    return None
