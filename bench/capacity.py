#!/usr/bin/env python
"""Compute how many GPUs a load takes, at full depth and under a plan: ``python bench/capacity.py``.

Nothing is measured here. FLOPs and bytes come from the cost model, seconds from a GPU's data sheet and an assumed
efficiency. docs/serving-capacity.md explains the calculation.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # else modules of this directory would hide installed ones of the same names
if find_spec("pop_ext") is None:
    sys.path.insert(1, str(ROOT / "python"))  # built in place by `make dev`

import torch  # noqa: E402
from pop_ext import _core  # noqa: E402
from pop_ext.plans.plan import Plan  # noqa: E402
from pop_ext.plans.presets import preset_or_third  # noqa: E402
from pop_ext.utils.roofline import Peaks  # noqa: E402

from bench.report import SCHEMA, table, write_json  # noqa: E402
from bench.serving.models import spec_of  # noqa: E402
from bench.shapes import SHAPES, shape_config  # noqa: E402

COMPUTED = "Computed from the cost model and a data sheet, not measured."
MODELS = ("llama-3.1-8b", "llama-3.1-70b")
_ELEMENT = 2  # bytes of bfloat16
_LARGEST_SHARE = 0.5  # of a GPU's memory that weights may take; the rest is left to the K/V cache


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet, and what is assumed of it. The defaults are an H100 SXM5.

    Attributes:
        tflops: dense bfloat16 peak, in TFLOP/s.
        tbytes_per_s: memory bandwidth, in TB/s.
        memory_gb: memory, in GB.
        compute_efficiency: assumed share of the peak that a stage bound by products reaches.
        memory_efficiency: assumed share of the bandwidth that a stage bound by memory reaches.
    """

    tflops: float = 989.0
    tbytes_per_s: float = 3.35
    memory_gb: float = 80.0
    compute_efficiency: float = 0.6
    memory_efficiency: float = 0.8

    def peaks(self, count: int) -> Peaks:
        """Return what ``count`` of them reach as one engine, communication left out."""
        return Peaks(
            count * self.compute_efficiency * self.tflops * 1e12,
            count * self.memory_efficiency * self.tbytes_per_s * 1e12,
        )


@dataclass(frozen=True)
class Service:
    """How the requests are served.

    Attributes:
        rate: requests a second, all alike.
        utilisation: share of the time that a GPU works; the rest is headroom for bursts.
        step_rows: prompts are prefilled together up to this many rows (``max_num_batched_tokens``).
        decode_batch: most requests that decode in one step; fewer if their K and V do not fit into memory.
        share_of_ceiling: share of the computed ratio that POP reaches.
    """

    rate: float = 100.0
    utilisation: float = 0.7
    step_rows: int = 8192
    decode_batch: int = 64
    share_of_ceiling: float = 1.0


@dataclass(frozen=True)
class Engine:
    """A model on as many GPUs as hold it.

    Attributes:
        name: name of its shape.
        spec: its shape.
        plan: omitted layers.
        gpus: number of GPUs (tensor parallel).
    """

    name: str
    spec: _core.ModelSpec
    plan: Plan
    gpus: int


@dataclass(frozen=True)
class Capacity:
    """What requests of one shape take. Seconds are those of one engine for one request.

    Attributes:
        tokens: length of the prompt.
        output_tokens: tokens to generate.
        prefill_s: full prefill.
        pop_prefill_s: prefill under the plan.
        decode_s: the tokens after the first.
        decode_batch: requests that decode in one step.
        shared: GPUs that prefill and decode, at full depth.
        shared_pop: the same under the plan.
        prefill: GPUs that only prefill, at full depth.
        prefill_pop: the same under the plan.
        decode: GPUs that only decode, beside either.
        longest_output: most output tokens with which requests take a tenth less time under the plan; 0: none do.
    """

    tokens: int
    output_tokens: int
    prefill_s: float
    pop_prefill_s: float
    decode_s: float
    decode_batch: int
    shared: int
    shared_pop: int
    prefill: int
    prefill_pop: int
    decode: int
    longest_output: int

    @property
    def prefill_ratio(self) -> float:
        """Full prefill by pruned one."""
        return self.prefill_s / self.pop_prefill_s

    @property
    def request_ratio(self) -> float:
        """Work of a whole request at full depth by that under the plan."""
        return (self.prefill_s + self.decode_s) / (self.pop_prefill_s + self.decode_s)

    @property
    def prefill_share(self) -> float:
        """Share of the prefill in the work of a request at full depth."""
        return self.prefill_s / (self.prefill_s + self.decode_s)


def engine_of(name: str, gpu: Gpu, plan: Plan | None = None) -> Engine:
    """Return a named shape in bfloat16, on the least power of two of GPUs of which its weights fill at most half.

    Args:
        plan: None: the preset of the shape, else the deepest third.
    """
    config = shape_config(name)
    spec = spec_of(config, torch.bfloat16)
    gpus = 1
    while weight_bytes(spec) > _LARGEST_SHARE * gpus * gpu.memory_gb * 1e9:
        gpus *= 2
    return Engine(name, spec, plan or preset_or_third(config), gpus)


def weight_bytes(spec: _core.ModelSpec) -> float:
    """Return the bytes of the weights in bfloat16, with an output layer even where it is that of the embedding."""
    count = sum(math.prod(shape) for _, _, shape in spec.weight_slots()) + spec.vocab_size * spec.hidden_size
    return float(_ELEMENT * count)


def capacity(engine: Engine, gpu: Gpu, service: Service, tokens: int, output_tokens: int) -> Capacity:
    """Return what requests of one shape take.

    Raises:
        ValueError: the K and V of one request do not fit into memory.
    """
    full, pruned = _prefill_seconds(engine, gpu, service, tokens)
    batch, decode = _decode_seconds(engine, gpu, service, tokens, output_tokens)

    def gpus(seconds: float) -> int:
        return engine.gpus * math.ceil(round(service.rate * seconds / service.utilisation, 9))

    return Capacity(
        tokens=tokens,
        output_tokens=output_tokens,
        prefill_s=full,
        pop_prefill_s=pruned,
        decode_s=decode,
        decode_batch=batch,
        shared=gpus(full + decode),
        shared_pop=gpus(pruned + decode),
        prefill=gpus(full),
        prefill_pop=gpus(pruned),
        decode=gpus(decode),
        longest_output=_longest_output(engine, gpu, service, tokens),
    )


def _prefill_seconds(engine: Engine, gpu: Gpu, service: Service, tokens: int) -> tuple[float, float]:
    """Return the seconds of a prefill at full depth and under the plan, as one of those that fill a step."""
    spec, plan, peaks = engine.spec, engine.plan, gpu.peaks(engine.gpus)
    count = max(1, service.step_rows // tokens)
    rows = tokens if tokens < plan.min_tokens else min(plan.boundary, tokens)
    full = peaks.least_seconds(_core.stock_cost(spec, [_core.SequenceShape(tokens)] * count)) / count
    shapes = [_core.SequenceShape(tokens, boundary=rows)] * count
    ratio = full / (peaks.least_seconds(_core.plan_cost(spec, plan, shapes)) / count)
    return full, full / max(1.0, service.share_of_ceiling * ratio)


def _decode_seconds(engine: Engine, gpu: Gpu, service: Service, tokens: int, output_tokens: int) -> tuple[int, float]:
    """Return the requests that decode in one step, and the seconds that one of them takes after its first token.

    Raises:
        ValueError: the K and V of one request do not fit into memory.
    """
    spec, steps = engine.spec, output_tokens - 1
    free = 0.9 * engine.gpus * gpu.memory_gb * 1e9 - weight_bytes(spec)
    positions = tokens + output_tokens
    fitting = int(free // (2 * _ELEMENT * spec.num_layers * spec.kv_dim * positions))
    if fitting < 1:
        raise ValueError(f"tokens: expected K and V that fit beside the weights of {engine.name}, got {positions}")
    batch = min(service.decode_batch, fitting)
    # Cost is linear in the length of the past, so the middle one stands for all steps.
    shape = _core.SequenceShape(1, past=tokens + max(0, steps - 1) // 2)
    step = gpu.peaks(engine.gpus).least_seconds(_core.stock_cost(spec, [shape] * batch)) / batch
    return batch, steps * step


def _longest_output(engine: Engine, gpu: Gpu, service: Service, tokens: int) -> int:
    """Return the most output tokens with which a request takes a tenth less time under the plan; 0: none does."""
    full, pruned = _prefill_seconds(engine, gpu, service, tokens)

    def saves(output_tokens: int) -> bool:
        try:
            decode = _decode_seconds(engine, gpu, service, tokens, output_tokens)[1]
        except ValueError:  # too long for the memory
            return False
        return pruned + decode <= 0.9 * (full + decode)

    low, high = 0, 2**16
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if saves(middle) else (low, middle - 1)
    return low


def prefill_rows(found: Sequence[Capacity]) -> list[list[str]]:
    """Return a row for each length of prompts: seconds, ratio, and the GPUs of the prefill alone."""
    first = {one.tokens: one for one in reversed(found)}
    return [
        [
            f"{one.tokens:,}",
            f"{1e3 * one.prefill_s:,.1f}",
            f"{1e3 * one.pop_prefill_s:,.1f}",
            f"{one.prefill_ratio:.2f}x",
            f"{one.prefill} to {one.prefill_pop}",
            f"{one.longest_output:,}",
        ]
        for one in sorted(first.values(), key=lambda one: one.tokens)
    ]


def request_rows(found: Sequence[Capacity]) -> list[list[str]]:
    """Return a row for each shape of requests: shares, and GPUs that are shared or apart."""
    return [
        [
            f"{one.tokens:,} + {one.output_tokens:,}",
            f"{100 * one.prefill_share:.0f} %",
            f"{one.request_ratio:.2f}x",
            f"{one.shared} to {one.shared_pop}",
            f"{one.prefill} + {one.decode} to {one.prefill_pop} + {one.decode}",
        ]
        for one in found
    ]


PREFILL_HEADER = ["prompt", "full ms", "POP ms", "ratio", "GPUs that prefill", "output for a tenth"]
REQUEST_HEADER = ["prompt + output", "share of prefill", "ratio", "GPUs, shared", "GPUs, disaggregated"]


def assumptions_text(gpu: Gpu, service: Service) -> str:
    """Return the assumptions as a sentence each."""
    return (
        f"GPUs of {gpu.tflops:g} TFLOP/s (dense bfloat16), {gpu.tbytes_per_s:g} TB/s and {gpu.memory_gb:g} GB, which "
        f"reach {100 * gpu.compute_efficiency:g} % of the first and {100 * gpu.memory_efficiency:g} % of the second. "
        f"{service.rate:g} requests a second; GPUs work {100 * service.utilisation:g} % of the time. Prompts are "
        f"prefilled {service.step_rows:,} rows a step, and up to {service.decode_batch} requests decode in one. POP "
        f"reaches {100 * service.share_of_ceiling:g} % of its computed ratio."
    )


def title(engine: Engine) -> str:
    """Return the name, plan and GPUs of an engine."""
    gpus = "a GPU" if engine.gpus == 1 else f"{engine.gpus} GPUs"
    return f"{engine.name}, {len(engine.plan.omit)} of {engine.plan.num_layers} layers omitted, {gpus} an engine"


def markdown(results: Sequence[tuple[Engine, Sequence[Capacity]]], gpu: Gpu, service: Service) -> str:
    """Return all tables in Markdown, under a line that says that they are computed."""
    parts = [textwrap.fill(f"**{COMPUTED}** {assumptions_text(gpu, service)}", 120)]
    for engine, found in results:
        parts.append(f"**{title(engine)}**")
        for header, rows in ((PREFILL_HEADER, prefill_rows(found)), (REQUEST_HEADER, request_rows(found))):
            lines = [header, ["---"] * len(header), *rows]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def text(results: Sequence[tuple[Engine, Sequence[Capacity]]], gpu: Gpu, service: Service) -> str:
    """Return all tables for a terminal."""
    parts = [f"{COMPUTED} {assumptions_text(gpu, service)}"]
    for engine, found in results:
        parts.append(f"{title(engine)}\n\n{table(PREFILL_HEADER, prefill_rows(found))}")
        parts.append(table(REQUEST_HEADER, request_rows(found)))
    return "\n\n".join(parts)


def report_json(results: Sequence[tuple[Engine, Sequence[Capacity]]], gpu: Gpu, service: Service) -> dict[str, Any]:
    """Return all figures as JSON values."""
    return {
        "schema": SCHEMA,
        "measured": False,
        "note": COMPUTED,
        "gpu": asdict(gpu),
        "service": asdict(service),
        "models": [
            {
                "name": engine.name,
                "plan": json.loads(engine.plan.to_json()),
                "gpus": engine.gpus,
                "requests": [
                    asdict(one)
                    | {
                        "prefill_ratio": one.prefill_ratio,
                        "request_ratio": one.request_ratio,
                        "prefill_share": one.prefill_share,
                    }
                    for one in found
                ],
            }
            for engine, found in results
        ],
    }


def parser() -> argparse.ArgumentParser:
    """Return the parser with all options."""
    p = argparse.ArgumentParser(
        prog="bench/capacity.py", description="Compute, not measure, how many GPUs a load takes, with and without POP."
    )
    gpu, service = Gpu(), Service()
    p.add_argument("--model", nargs="+", choices=SHAPES, default=list(MODELS), help="shapes (default: 8B and 70B)")
    p.add_argument("--plan", type=Path, help="plan file for all models (default: preset, else the deepest third)")
    p.add_argument("--tokens", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192], help="lengths of prompts")
    p.add_argument("--output-tokens", nargs="+", type=int, default=[16, 128, 1024], help="tokens to generate")
    for name, kind, value, what in (
        ("rate", float, service.rate, "requests a second"),
        ("utilisation", float, service.utilisation, "share of the time that a GPU works"),
        ("step-rows", int, service.step_rows, "rows of a step that prefills"),
        ("decode-batch", int, service.decode_batch, "requests of a step that decodes"),
        ("share-of-ceiling", float, service.share_of_ceiling, "share of its computed ratio that POP reaches"),
        ("tflops", float, gpu.tflops, "dense bfloat16 peak of a GPU"),
        ("tbytes-per-s", float, gpu.tbytes_per_s, "memory bandwidth of a GPU"),
        ("memory-gb", float, gpu.memory_gb, "memory of a GPU"),
        ("compute-efficiency", float, gpu.compute_efficiency, "assumed share of the peak"),
        ("memory-efficiency", float, gpu.memory_efficiency, "assumed share of the bandwidth"),
    ):
        p.add_argument(f"--{name}", type=kind, default=value, help=f"{what} (default: {value:g})")
    p.add_argument("--json", type=Path, help="also write all figures")
    p.add_argument("--markdown", action="store_true", help="print Markdown")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables. Return 0; 2 for bad arguments."""
    options = parser().parse_args(arguments)
    try:
        _check(options)
        gpu = Gpu(*(getattr(options, name) for name in Gpu.__dataclass_fields__))
        service = Service(*(getattr(options, name) for name in Service.__dataclass_fields__))
        plan = Plan.load(options.plan) if options.plan else None
        results = [
            (engine, [capacity(engine, gpu, service, t, o) for t in options.tokens for o in options.output_tokens])
            for engine in (engine_of(name, gpu, plan) for name in options.model)
        ]
    except (OSError, ValueError) as error:
        print(f"bench/capacity.py: error: {error}", file=sys.stderr)
        return 2
    print((markdown if options.markdown else text)(results, gpu, service))
    if options.json:
        write_json(options.json, report_json(results, gpu, service))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Reject numbers without a meaning.

    Raises:
        ValueError: names the option, the expected value and the value found.
    """
    for name in ("tokens", "output_tokens"):
        if any(value < 1 for value in getattr(options, name)):
            raise ValueError(f"--{name.replace('_', '-')}: expected integers from 1, got {getattr(options, name)}")
    for name in ("rate", "step_rows", "decode_batch", "tflops", "tbytes_per_s", "memory_gb"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')}: expected more than 0, got {getattr(options, name)}")
    for name in ("utilisation", "share_of_ceiling", "compute_efficiency", "memory_efficiency"):
        if not 0 < getattr(options, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected a share in (0, 1], got {getattr(options, name)}")


if __name__ == "__main__":
    sys.exit(main())
