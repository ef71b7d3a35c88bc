"""Load the library of operators and register their fake kernels.

Importing this module registers ``torch.ops.pop.*``; docs/ops.md is their reference, and `fake_kernels` lists each with
its shapes and dtypes.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from pop_ext import _core

# The library lies beside the other compiled module. In an editable install that is another folder than this file's.
_LIBRARY = Path(_core.__file__).with_name("_ops.so")

# Operators of torch that every prefill calls. The others of foreign_schemas() compute attention, or make and read
# prepacked weights, and have alternatives.
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
    """Tell the library which operators of other libraries it may call.

    The C++ side passes arguments without a count, so a changed schema must be noticed here.

    Returns:
        The operators that it may not call: name -> the schema found in this process, or "missing".
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
    """Return the schema of ``namespace::name.overload`` in this process, or "missing"."""
    namespace, _, rest = qualified.partition("::")
    name, _, overload = rest.partition(".")
    try:
        return str(getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")._schema)
    except AttributeError:
        return "missing"


def _import_flash_attention() -> None:
    """Import flash-attn where it is installed: that registers its operators, which the CUDA backend calls."""
    if torch.version.cuda is None or not _core.build_info()["cuda"]:
        return
    for module in ("flash_attn_interface", "flash_attn"):  # FlashAttention 3, FlashAttention 2
        try:
            importlib.import_module(module)
        except (ImportError, OSError):  # not installed, or built for another torch
            continue


def raise_interrupt(error: RuntimeError) -> None:
    """Raise what a signal handler has raised, such as KeyboardInterrupt, if that is why an operator failed."""
    if "interrupted by a signal" in str(error):
        interrupt = _core.take_interrupt()
        if interrupt is not None:
            interrupt.__suppress_context__ = True  # `from None` would erase a cause of its own
            raise interrupt


_load_library()
importlib.import_module("pop_ext.ops.texts")  # implements foreign_schemas, which the next lines call
torch.ops.pop.set_interrupt_check(_core.interrupt_check())
_import_flash_attention()
FOREIGN_UNKNOWN = _find_foreign()
"""Operators of other libraries that are missing or have an unknown schema: name -> the schema found, or "missing"."""


def changed_aten() -> dict[str, str]:
    """Return torch's operators whose schema the library does not know: name -> the schema found, or "missing"."""
    return {name: found for name, found in FOREIGN_UNKNOWN.items() if name.startswith("aten::")}


def attention_providers() -> dict[str, str]:
    """Return what computes the attention of a prefill: device type -> providers, the preferred one first."""
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
    """Check that the operators which every prefill calls have a schema that the library knows.

    Raises:
        RuntimeError: at least one has another; the text names each with the schema found.
    """
    changed = {name: found for name, found in changed_aten().items() if name in _REQUIRED}
    if changed:
        listed = "; ".join(f"{name}: found {found}" for name, found in changed.items())
        raise RuntimeError(
            f"pop_ext's matrix products are disabled under torch {torch.__version__}, whose operators changed "
            f'({listed}). pop_ext.enable with backend="portable" works.'
        )


# At the end: registration needs the schemas of the loaded library.
from pop_ext.ops import fake_kernels as _fake_kernels  # noqa: E402, F401
