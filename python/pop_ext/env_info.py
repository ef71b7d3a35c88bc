"""Facts about the installation and about a model under a plan, as ``pop-ext info`` prints them."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pop_ext import _core, ops
from pop_ext.hf.decision import Products
from pop_ext.hf.families import FAMILIES, WRAPPERS
from pop_ext.plans.plan import Plan
from pop_ext.plans.presets import PRESETS
from pop_ext.utils.roofline import Peaks, measure_peaks

CEILING_TOKENS = (512, 2048, 8192)
"""Lengths of the prompts for which `model_summary` gives the ceilings."""


class LoadedModel(Protocol):
    """The members of a ``NativeModel`` that `model_summary` reads."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def plan(self) -> Plan: ...

    @property
    def spec(self) -> _core.ModelSpec: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def extra_bytes(self) -> int: ...

    @property
    def products(self) -> Products | None: ...


def installation() -> dict[str, Any]:
    """Return versions, instruction set, state of CUDA, checks at import, families and presets, as JSON values."""
    build = _core.build_info()
    return {
        "pop_ext": build["version"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "built_with": {"torch_headers": build["torch_headers"], "compiler": build["compiler"], "cuda": build["cuda"]},
        "transformers": _version_of("transformers"),
        "cpu_isa": torch.ops.pop.cpu_isa(),
        "int8_isa": int8_isa(),
        "threads": torch.get_num_threads(),
        "cuda": _cuda(build["cuda"]),
        "aten_schemas": ops.changed_aten() or "as expected",
        "attention": ops.attention_providers(),
        "prepack": _prepack(),
        "families": sorted({*FAMILIES, *WRAPPERS}),
        "presets": [
            {
                "names": list(preset.names),
                "omitted": len(preset.plan.omit),
                "layers": preset.plan.num_layers,
                "published": preset.published,
                "source": preset.source,
            }
            for preset in {preset.names: preset for preset in PRESETS.values()}.values()
        ],
    }


def model_summary(native: LoadedModel) -> dict[str, Any]:
    """Return shape, plan, 8-bit products, extra memory (bytes) and ceilings of a loaded model, as JSON values.

    Measures the peaks of the model's device for the rooflines, which takes about a second.
    """
    spec, plan = native.spec, native.plan
    peaks = measure_peaks(native.device, native.dtype)
    return {
        "architecture": spec.architecture,
        "dtype": spec.dtype,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "sliding_windows": sorted({window for window in spec.window if window}),
        "parameters": sum(parameter.numel() for parameter in native.model.parameters()),
        "plan": describe_plan(plan),
        "products": native.products,
        "extra_bytes": native.extra_bytes,
        "peaks": asdict(peaks),
        "ceilings": [ceilings(spec, plan, tokens, peaks) for tokens in CEILING_TOKENS],
    }


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON values, without its fitted projections."""
    return {
        "num_layers": plan.num_layers,
        "omit": list(plan.omit),
        "boundary": plan.boundary,
        "min_tokens": plan.min_tokens,
    }


def flop_ceiling(spec: _core.ModelSpec, plan: Plan, tokens: int) -> float:
    """Return the FLOPs of the stock forward by those of a pruned prefill, at batch 1, for ``tokens`` tokens."""
    rows = [_core.SequenceShape(tokens, boundary=min(plan.boundary, tokens))]
    return _core.stock_cost(spec, rows)["flops"] / _core.plan_cost(spec, plan, rows)["flops"]


def ceilings(spec: _core.ModelSpec, plan: Plan, tokens: int, peaks: Peaks) -> dict[str, Any]:
    """Return upper bounds of the speed-up at batch 1 for a prompt of ``tokens`` tokens.

    Returns:
        ``tokens``, the ratios of FLOPs ``pop_over_stock``, ``pop_over_native_full`` and ``native_full_over_stock``, and
        as ``roofline`` the same with bytes, at these peaks.
    """
    rows = [_core.SequenceShape(tokens, boundary=min(plan.boundary, tokens))]
    pruned = _core.plan_cost(spec, plan, rows)
    full = _core.plan_cost(spec, Plan(plan.num_layers, ()), rows)
    stock = _core.stock_cost(spec, rows)
    pairs = {
        "pop_over_stock": (pruned, stock),
        "pop_over_native_full": (pruned, full),
        "native_full_over_stock": (full, stock),
    }
    return {
        "tokens": tokens,
        **{name: baseline["flops"] / cost["flops"] for name, (cost, baseline) in pairs.items()},
        "roofline": {name: peaks.roofline(*pair) for name, pair in pairs.items()},
    }


def int8_isa() -> str:
    """Return the instruction set whose kernels compute products of 8-bit integers."""
    return str(torch.ops.pop.int8_isa())


def processor() -> str:
    """Return the name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def hardware(device: torch.device, dtype: torch.dtype) -> str:
    """Return what a model in this place runs on, in words: the GPU, or the processor and its threads; and the dtype."""
    kind = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {kind}"
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}, {kind} on {device.type}"


def _version_of(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _prepack() -> str:
    """Return whether the weights of a dense model can be prepacked on this machine, or the reason why not."""
    spec = _core.ModelSpec(
        architecture="llama",
        dtype="bfloat16",
        num_layers=1,
        hidden_size=16,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=16,
        vocab_size=1,
    )
    return torch.ops.pop.prepack_missing(spec.to_json(), torch.empty(0)) or "possible, of bfloat16 weights on the CPU"


def _cuda(built: str) -> str:
    """Return the state of CUDA, given the version that the library was built with ("" for none)."""
    if not built:
        return "not built"
    if torch.version.cuda is None:
        return f"built with CUDA {built}; this torch is a CPU build"
    if not torch.cuda.is_available():
        return f"built with CUDA {built}; no device found"
    return "; ".join([f"built with CUDA {built}", *map(_device_state, range(torch.cuda.device_count()))])


def _device_state(index: int) -> str:
    """Return the name of a CUDA device, and why the kernels cannot run there if they cannot."""
    missing = torch.ops.pop.device_missing(torch.empty(0, device=f"cuda:{index}"))
    return f"{torch.cuda.get_device_name(index)}: {f'not supported: {missing}' if missing else 'supported'}"
