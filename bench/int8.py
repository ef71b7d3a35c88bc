"""Time products and prefills in 8-bit integers beside those in the model's dtype: ``python -m bench.int8``.

All arms run in turn, with random weights, and are timed by the processor time of this process, which other processes
disturb less than wall time. The prefills are native: at full depth, and of a plan that omits the deepest third.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pop_ext
import torch
from torch.nn import functional as F

from bench.environment import environment
from bench.memory import resident_bytes
from bench.options import at_least
from bench.shapes import load_model

SHAPES = {"q_proj, o_proj": (2048, 2048), "gate_proj, up_proj": (2048, 8192), "down_proj": (8192, 2048)}
"""Of Llama-3.2-1B: (elements along k, columns)."""
PLANS: dict[str, Callable[[int], pop_ext.Plan]] = {
    "full": lambda depth: pop_ext.Plan(depth, ()),
    "POP": pop_ext.Plan.last,
}
"""Plans of the prefills, by the number of layers."""


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of processor time of each call in each round; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(1 + rounds):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            if turn > 0:
                seconds[name].append(time.process_time() - begin)
    return seconds


def summarise(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Return the median and the range of each call in ms, and the median over rounds of ``base`` by the call."""
    return {
        name: {
            "ms": 1e3 * statistics.median(samples),
            "least_ms": 1e3 * min(samples),
            "most_ms": 1e3 * max(samples),
            f"{base} by this": statistics.median(a / b for a, b in zip(seconds[base], samples, strict=True)),
        }
        for name, samples in seconds.items()
    }


def time_products(rows: list[int], rounds: int) -> list[dict[str, Any]]:
    """Time the products of a layer in float32 (torch's, and the library's in blocks) and in int8, rounding included."""
    results = []
    for name, (k, n) in SHAPES.items():
        weight = torch.randn(n, k) / k**0.5
        packed, scale = torch.ops.pop.quantize_rows(weight, "int8")
        for m in rows:
            x = torch.randn(m, k)
            calls: dict[str, Callable[[], Any]] = {
                "float32": lambda x=x, w=weight: F.linear(x, w),
                "float32 in blocks": lambda x=x, w=weight: torch.ops.pop.linear(x, w),
                "int8": lambda x=x, p=packed, s=scale: torch.ops.pop.int8_linear(x, p, s),
            }
            arms = summarise(in_turn(calls, rounds), "float32")
            for arm in arms.values():
                arm["gop_per_s"] = 2e-6 * m * n * k / arm["ms"]
            results.append({"product": name, "rows": m, "k": k, "n": n, "arms": arms})
            rates = ", ".join(f"{arm} {found['gop_per_s']:.1f}" for arm, found in arms.items())
            print(f"{name:20} {m:5} rows, Gop/s: {rates}", flush=True)
    return results


def time_prefills(
    model_name: str, tokens: int, dtypes: list[str], rounds: int, plan_names: list[str], free_weights: bool
) -> dict[str, Any]:
    """Time native prefills, plain and in int8.

    Args:
        model_name: a shape, or a folder with a config; weights are random.
        tokens: of the prompt.
        dtypes: of the weights.
        rounds: number of calls of each.
        plan_names: of `PLANS`.
        free_weights: only those in int8, whose matrices are kept in integers alone, under one plan.
    """
    calls: dict[str, Callable[[], Any]] = {}
    facts: dict[str, Any] = {"model": Path(model_name).name, "tokens": tokens, "extra_bytes": {}}
    for dtype in dtypes:
        model = load_model(model_name, getattr(torch, dtype), torch.device("cpu"), random_weights=True).model
        depth = model.config.num_hidden_layers
        plans = {name: PLANS[name](depth) for name in plan_names}
        facts["omitted"], facts["layers"] = {name: list(plan.omit) for name, plan in plans.items()}, depth
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
        for plan_name, plan in plans.items():
            for int8 in (True,) if free_weights else (False, True):
                native = pop_ext.load(model, plan, int8=int8, free_weights=free_weights)
                name = f"{plan_name}, {dtype}{', int8' * int8}"
                facts["extra_bytes"][name] = native.extra_bytes
                calls[name] = lambda native=native, ids=ids: native.prefill(ids)
    arms = summarise(in_turn(calls, rounds), next(iter(calls)))
    for name, found in arms.items():
        print(f"{name:24} {found['ms']:8.0f} ms ({found['least_ms']:.0f} to {found['most_ms']:.0f})", flush=True)
    facts["resident_bytes"] = resident_bytes()
    print(f"resident: {facts['resident_bytes'] / 2**30:.1f} GiB", flush=True)
    return {**facts, "arms": arms}


def main() -> None:
    p = argparse.ArgumentParser(prog="bench/int8.py", description=__doc__.splitlines()[0])
    p.add_argument("--rows", nargs="*", type=at_least(1), default=[8, 512, 2048], help="of the products; may be none")
    p.add_argument("--model", default="llama-3.2-1b", help="shape of the prefills")
    p.add_argument("--tokens", nargs="*", type=at_least(2), default=[512], help="of the prefills; may be none")
    p.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    p.add_argument(
        "--plans", nargs="+", default=list(PLANS), choices=list(PLANS), help="of the prefills (default: all)"
    )
    p.add_argument(
        "--free-weights", action="store_true", help="prefills in int8 with free_weights=True, under one plan"
    )
    p.add_argument("--rounds", type=at_least(1), default=7)
    p.add_argument("--json", type=Path)
    arguments = p.parse_args()
    if arguments.free_weights and len(arguments.plans) * len(arguments.dtypes) > 1:
        p.error("--free-weights: expected one of --plans and one of --dtypes, since it changes the model")
    products = time_products(arguments.rows, arguments.rounds)
    how = arguments.dtypes, arguments.rounds, arguments.plans, arguments.free_weights
    prefills = [time_prefills(arguments.model, n, *how) for n in arguments.tokens]
    if arguments.json:
        facts = {
            "clock": "processor time",
            "rounds": arguments.rounds,
            "threads": torch.get_num_threads(),
            "int8_isa": torch.ops.pop.int8_isa(),
            "environment": environment(torch.device("cpu")),
        }
        arguments.json.write_text(json.dumps({**facts, "products": products, "prefills": prefills}, indent=1) + "\n")


if __name__ == "__main__":
    main()
