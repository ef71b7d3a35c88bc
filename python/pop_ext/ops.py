"""Loads the operator library and gives its operators their fake kernels.

Importing this module registers ``torch.ops.pop.*``.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch
from torch import Tensor

from pop_ext import _core

# Beside the other compiled module: in an editable install that is not where this file is.
_LIBRARY = Path(_core.__file__).with_name("_ops.so")


# What no prefill does without; the other operators of foreign_schemas() are ways of computing attention, or make and
# read prepacked weights.
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


# Where one of several tensors is on the meta device, the fake kernel is called for all, and the checks of the kernels
# see none of them: what they say of devices is said here, too. (A FakeTensor has the device it stands for.)


def _named(name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name}[{index}]": tensor for index, tensor in enumerate(tensors)}


def _check_devices(op: str, **tensors: Tensor | list[Tensor] | None) -> None:
    """Raises RuntimeError unless all tensors, and those of lists, are on the device of the first one."""
    places: dict[str, Tensor | None] = {}
    for name, value in tensors.items():
        places |= _named(name, value) if isinstance(value, list) else {name: value}
    given = {place: tensor for place, tensor in places.items() if tensor is not None}
    like, device = next((place, tensor.device) for place, tensor in given.items())
    for place, tensor in given.items():
        if tensor.device != device:
            raise RuntimeError(f"pop::{op}: {place}: expected device {device} like {like}, got {tensor.device}")


def _check_lengths(op: str, **lengths: Tensor | None) -> None:
    for name, tensor in lengths.items():
        if tensor is not None and tensor.device.type != "cpu":
            raise RuntimeError(
                f"pop::{op}: {name}: expected a tensor on the CPU (the operator never synchronises), "
                f"got {tensor.device}"
            )


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
    _check_devices(
        "prefill",
        input=input,
        cos=cos,
        sin=sin,
        cos_local=cos_local,
        sin_local=sin_local,
        feature_index=feature_index,
        features=features,
        key_cache=key_cache,
        value_cache=value_cache,
    )
    _check_lengths(
        "prefill",
        cu_seqlens=cu_seqlens,
        past_lens=past_lens,
        cache_start=cache_start,
        boundary=boundary,
        logits_to_keep=logits_to_keep,
        slot_table=slot_table,
        blocks=blocks,
    )
    hidden_size = json.loads(torch.ops.pop.info(model))["spec"]["hidden_size"]
    wanted = torch.library.get_ctx().new_dynamic_size(min=1)
    return key_cache[0].new_empty((wanted, hidden_size))


@torch.library.register_fake("pop::linear")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("pop::fp8_linear")
def _(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    _check_devices("fp8_linear", x=x, weight=weight, weight_scale=weight_scale)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("pop::quantize_rows")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("pop::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    _check_devices("rms_norm", x=x, weight=weight)
    return x.new_empty(x.shape)


@torch.library.register_fake("pop::add_rms_norm")
def _(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    eps: float,
    delta_bias: Tensor | None = None,
    delta_norm: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor:
    _check_devices("add_rms_norm", x=x, delta=delta, weight=weight, delta_bias=delta_bias, delta_norm=delta_norm)
    return x.new_empty(x.shape)


@torch.library.register_fake("pop::gated_act")
def _(
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    _check_devices("gated_act", gate=gate, up=up, gate_bias=gate_bias, up_bias=up_bias)
    return gate.new_empty(gate.shape)


@torch.library.register_fake("pop::attention")
def _(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cu_seqlens: Tensor,
    past_lens: Tensor,
    cache_start: Tensor,
    scale: float,
    window: int = 0,
    slot_table: Tensor | None = None,
    softcap: float = 0.0,
    blocks: Tensor | None = None,
) -> Tensor:
    _check_devices("attention", query=query, key_cache=key_cache, value_cache=value_cache)
    _check_lengths(
        "attention",
        cu_seqlens=cu_seqlens,
        past_lens=past_lens,
        cache_start=cache_start,
        slot_table=slot_table,
        blocks=blocks,
    )
    return query.new_empty(query.shape)


@torch.library.register_fake("pop::fold_kv")
def _(k_proj: list[Tensor], v_proj: list[Tensor], input_norm: list[Tensor], norm_offset: float = 0.0) -> Tensor:
    _check_devices("fold_kv", k_proj=k_proj, v_proj=v_proj, input_norm=input_norm)
    kv_dim, hidden_size = k_proj[0].shape
    return k_proj[0].new_empty((2 * len(k_proj) * kv_dim, hidden_size))


@torch.library.register_fake("pop::rope_cache_write")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    past_lens: Tensor,
    cache_start: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    slot_table: Tensor | None = None,
    norm_offset: float = 0.0,
) -> None:
    _check_devices(
        "rope_cache_write",
        query=query,
        key=key,
        value=value,
        cos=cos,
        sin=sin,
        key_cache=key_cache,
        value_cache=value_cache,
        q_norm=q_norm,
        k_norm=k_norm,
    )
    _check_lengths(
        "rope_cache_write",
        cu_seqlens=cu_seqlens,
        past_lens=past_lens,
        cache_start=cache_start,
        slot_table=slot_table,
    )


@torch.library.register_fake("pop::kv_project")
def _(
    hidden: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    past_lens: Tensor,
    cache_start: Tensor,
    eps: float,
    key_cache: list[Tensor],
    value_cache: list[Tensor],
    k_bias: list[Tensor] | None = None,
    v_bias: list[Tensor] | None = None,
    k_norm: list[Tensor] | None = None,
    slot_table: Tensor | None = None,
    norm_offset: float = 0.0,
) -> None:
    _check_devices(
        "kv_project",
        hidden=hidden,
        weight=weight,
        cos=cos,
        sin=sin,
        key_cache=key_cache,
        value_cache=value_cache,
        k_bias=k_bias,
        v_bias=v_bias,
        k_norm=k_norm,
    )
    _check_lengths(
        "kv_project",
        cu_seqlens=cu_seqlens,
        past_lens=past_lens,
        cache_start=cache_start,
        slot_table=slot_table,
    )
