#!/usr/bin/env python
"""Time the prefill of other CPU engines and of pop_ext in one run: ``python bench/peers.py``; see bench/README.md."""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import time
from collections.abc import Sequence
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
from pop_ext.hf.weight_map import describe  # noqa: E402
from pop_ext.plans.plan import Plan  # noqa: E402
from pop_ext.plans.presets import preset_or_third  # noqa: E402

from bench.engines.catalogue import PEERS, PLAIN, QUANTISED, suited  # noqa: E402
from bench.engines.comparison import Engines, PeerCase, run_peers  # noqa: E402
from bench.environment import environment  # noqa: E402
from bench.memory import release_memory  # noqa: E402
from bench.peer_report import case_json, case_text  # noqa: E402
from bench.report import SCHEMA, environment_text, write_json  # noqa: E402
from bench.shapes import SHAPES, load_model  # noqa: E402

CPU = torch.device("cpu")
FOLDER = ROOT / "build" / "peers"
_CPUINFO = Path("/proc/cpuinfo")
RESULTS = ROOT / "bench" / "results"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def parser() -> argparse.ArgumentParser:
    """Return the parser with all options."""
    p = argparse.ArgumentParser(prog="bench/peers.py", description="Time prefill by other CPU engines and by pop_ext.")
    p.add_argument("--model", default="llama-3.2-1b", help=f"a shape (demo, {', '.join(SHAPES)}) or a directory")
    p.add_argument("--random-weights", action="store_true", help="read only the config of --model")
    p.add_argument("--lengths", nargs="+", type=int, default=[512, 2048], help="prompt lengths in tokens")
    p.add_argument("--dtype", default="bfloat16", choices=_DTYPES, help="dtype of the weights")
    p.add_argument("--threads", type=int, help="threads of every engine (default: one for each core that may be used)")
    p.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        help="engines beside Hugging Face and pop_ext (default: all without quantised weights; with --int8, all with "
        "them that suit the processor)",
    )
    p.add_argument("--int8", action="store_true", help="add arms of pop_ext with products in 8-bit integers")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="run the hf-compile arm")
    p.add_argument("--compile-mode", default="default", help="mode of torch.compile for hf-compile (default: default)")
    p.add_argument("--plan", nargs="+", type=Path, default=[], help="plan files (Plan.save)")
    p.add_argument("--count", nargs="+", type=int, default=[], help="omit the COUNT deepest layers; each a plan")
    p.add_argument("--repeats", type=int, default=7, help="timed rounds (default: 7)")
    p.add_argument("--warmup", type=int, default=2, help="untimed prefills of each arm before the rounds (default: 2)")
    p.add_argument(
        "--budget", type=float, help="seconds for the rounds of each length; fewer rounds run if it is spent"
    )
    p.add_argument(
        "--timeout", type=float, default=1200, help="seconds that an engine may take for one answer (default: 1200)"
    )
    p.add_argument(
        "--install", action=argparse.BooleanOptionalAction, default=True, help="create venvs that are missing"
    )
    p.add_argument("--fresh", action="store_true", help="convert the weights again")
    p.add_argument("--folder", type=Path, default=FOLDER, help="folder of venvs and weights (default: build/peers)")
    p.add_argument("--json", type=Path, help="where to save (default: bench/results/local-peers-<time>.json)")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison. Return 0; 1 if an arm or an engine has no samples; 2 for bad arguments."""
    argv = sys.argv[1:] if arguments is None else list(arguments)
    options = parsed(argv)
    problem = _problem(options)
    if problem:
        print(f"bench/peers.py: error: {problem}", file=sys.stderr)
        return 2
    started = time.monotonic()
    cpus = sorted(os.sched_getaffinity(0))[: options.threads]
    facts = environment(CPU) | {"threads": len(cpus)}
    print(environment_text(facts))
    engines = prepared(options, cpus)
    cases = run_peers(engines, options.lengths, options.repeats, options.warmup, options.budget)
    for case in cases:
        print("\n" + case_text(case), flush=True)
    report = {
        "schema": SCHEMA,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": argv,
        "environment": facts,
        "cases": [],
        "peers": [case_json(case) for case in cases],
        "seconds": round(time.monotonic() - started, 1),
    }
    path = options.json or RESULTS / f"local-peers-{datetime.now().strftime('%Y%m%d-%H%M%S')}.json"
    write_json(path, report)
    print(f"\n{report['seconds']:.0f} s; every sample is in {path}")
    return 1 if any(_has_gap(case) for case in cases) else 0


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the options, and choose the engines if ``--peers`` does not."""
    options = parser().parse_args(argv)
    if options.peers is None:
        cpuinfo = _CPUINFO.read_text() if _CPUINFO.is_file() else ""
        options.peers = suited(QUANTISED, cpuinfo) if options.int8 else PLAIN
    return options


def _problem(options: argparse.Namespace) -> str | None:
    """Return the error of bad options; None if they are good."""
    if not hasattr(os, "sched_setaffinity"):
        return "this needs Linux: engines are held to the same cores"
    if any(tokens < 2 for tokens in options.lengths):
        return f"--lengths: expected integers from 2, got {options.lengths}"
    cores = len(os.sched_getaffinity(0))
    for name, most in (("repeats", None), ("warmup", None), ("threads", cores)):
        value = getattr(options, name)
        if value is not None and (value < 1 or (most is not None and value > most)):
            return f"--{name}: expected at least 1{f' and at most {most}' if most else ''}, got {value}"
    return None


def _has_gap(case: PeerCase) -> bool:
    return bool(case.missing) or any(arm.failed for arm in case.arms)


def prepared(options: argparse.Namespace, cpus: list[int]) -> Engines:
    """Save the weights that all engines read, and return the settings of the comparison."""
    model = load_model(options.model, _DTYPES[options.dtype], CPU, options.random_weights)
    config = model.model.config
    depth = config.num_hidden_layers
    plans = [Plan.load(path) for path in options.plan] + [Plan.last(depth, count=count) for count in options.count]
    plans = [plan.replace(min_tokens=0) for plan in plans or [preset_or_third(config)]]
    spec = describe(model.model).spec
    home = options.folder / "models" / f"{Path(options.model).name}-{options.dtype}"
    weights = home / "weights"
    if options.fresh or not _holds(weights, spec, model.model):
        shutil.rmtree(home, ignore_errors=True)
        model.model.save_pretrained(weights, max_shard_size="1TB")
        (home / "spec.json").write_text(_fingerprint(spec, model.model))
    size = sum(path.stat().st_size for path in weights.glob("*.safetensors"))
    found = Engines(options, model.name, model.weights, spec, tuple(plans), home, size, cpus)
    model.model = None
    gc.collect()
    release_memory(CPU)
    return found


def _holds(weights: Path, spec: _core.ModelSpec, model: Any) -> bool:
    """Return whether a folder holds the weights of this model already."""
    path = weights.parent / "spec.json"
    return path.is_file() and path.read_text() == _fingerprint(spec, model)


def _fingerprint(spec: _core.ModelSpec, model: Any) -> str:
    """Return a text that differs between models of one name: the shape, and a few values of every tensor."""
    sums = [float(p.detach().view(-1)[:: max(1, p.numel() // 64)].double().sum()) for p in model.parameters()]
    return f"{spec.to_json()}\n{sums}\n"


if __name__ == "__main__":
    sys.exit(main())
