"""Pruned prefill beside compressed caches and windowed attention: ``python examples/demo_model/composition.py``.

Each table has the loss of a continuation above that at full depth with nothing else: the other method alone, POP alone,
both, and what POP adds where the other method is there already; paired, prompt by prompt. The presses are those of
kvpress (``pip install --no-deps kvpress cachetools fire termcolor``); without it there is no table of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pop_ext
import torch
from pop_ext import Plan
from pop_ext.evaluation.prompts import read_texts, text_sets
from pop_ext.hf.compat import cache_of, with_cache
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from kv_compression import pressed  # noqa: E402

KEYS_AND_VALUES = ("KnormPress", "KeyDiffPress", "StreamingLLMPress")
HIDDEN_STATES = ("SnapKVPress", "ExpectedAttentionPress")
RATIOS = (0.25, 0.5)
WINDOWS = (32, 64, 128)
SINKS = 4
BATCH = 8


@dataclass
class Prompts:
    """context int64 [prompts, T]; continuation int64 [prompts, n]."""

    context: Tensor
    continuation: Tensor


# Compressed caches


@torch.no_grad()
def pressed_losses(model: Any, plan: Plan | None, press: Any, prompts: Prompts, hidden_states: bool) -> Tensor:
    """[prompts] float64: nats a token of continuations which the stock model reads over the compressed caches.

    plan: None: the stock prefill. press: None: nothing is compressed.
    """
    found = []
    backend = "reference" if hidden_states else "native"
    for context, continuation in zip(prompts.context.split(BATCH), prompts.continuation.split(BATCH), strict=True):
        length, new = context.shape[1], continuation.shape[1]
        with (
            nullcontext() if plan is None else pop_ext.enabled(model, plan, strict=True, backend=backend),
            nullcontext() if press is None else pressed(model, press, hidden_states),
        ):
            prompt = model(context, logits_to_keep=1, use_cache=True)
        # At the positions that they have in the text, however few are left in the cache.
        positions = torch.arange(length, length + new - 1)[None]
        call = {"position_ids": positions, "use_cache": True, **with_cache(model, cache_of(prompt))}
        following = model(continuation[:, :-1], **call)
        log_p = torch.cat([prompt.logits, following.logits], dim=1).double().log_softmax(-1)
        found.append(-log_p.gather(2, continuation[..., None])[..., 0].mean(dim=1))
    return torch.cat(found)


def press_rows(model: Any, plans: dict[str, Plan], prompts: Prompts, full: Tensor) -> Iterator[dict[str, Any]]:
    import kvpress

    for name in KEYS_AND_VALUES + HIDDEN_STATES:
        for ratio in RATIOS:
            press, hidden = getattr(kvpress, name)(compression_ratio=ratio), name in HIDDEN_STATES
            alone = pressed_losses(model, None, press, prompts, hidden)
            both = {arm: pressed_losses(model, plan, press, prompts, hidden) for arm, plan in plans.items()}
            yield row(f"{name}, {ratio:.0%} dropped", full, alone, both)


# Windowed attention


@contextmanager
def windowed_attention(model: Any, window: int, sinks: int, layers: range) -> Iterator[None]:
    """Within it rows of ``layers`` see ``window`` positions, themselves included, and the first ``sinks`` ones."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: Any) -> Any:
        position = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
        other = torch.arange(key.shape[2])
        seen = other <= position
        if module.layer_idx in layers:
            seen &= (other > position - window) | (other < sinks)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, seen[None, None], **how)

    AttentionInterface.register("windowed", attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("windowed")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def with_windows(model: Any, window: int, layers: range) -> Any:
    """The same model as a Qwen2, whose config has a window for each layer: what runs natively."""
    config, depth = model.config.to_dict(), model.config.num_hidden_layers
    kinds = ["sliding_attention" if layer in layers else "full_attention" for layer in range(depth)]
    for name in ("model_type", "architectures", "attention_bias", "mlp_bias"):
        config.pop(name, None)
    config |= {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}
    twin = Qwen2ForCausalLM(Qwen2Config(**config)).eval()
    biases = {name: torch.zeros_like(value) for name, value in twin.state_dict().items() if name.endswith(".bias")}
    twin.load_state_dict({**model.state_dict(), **biases})
    return twin


def losses(model: Any, plan: Plan, prompts: Prompts, backend: str = "native") -> Tensor:
    """[prompts] float64: nats a token of each continuation, by ``pop_ext.score``."""
    with pop_ext.enabled(model, plan, backend=backend):
        scores = pop_ext.score(model, list(prompts.context), list(prompts.continuation), BATCH)
    return (
        -torch.tensor([score.log_likelihood for score in scores], dtype=torch.float64) / prompts.continuation.shape[1]
    )


def window_rows(model: Any, plans: dict[str, Plan], prompts: Prompts, full: Tensor) -> Iterator[dict[str, Any]]:
    depth = model.config.num_hidden_layers
    retained = range(min(min(plan.omit) for plan in plans.values()))  # in every plan
    for window in WINDOWS:
        twin = with_windows(model, window, retained)
        alone = losses(twin, Plan(depth, ()), prompts)
        both = {arm: losses(twin, plan, prompts) for arm, plan in plans.items()}
        arms = {"alone": Plan(depth, ()), **plans}
        with windowed_attention(model, window, 0, retained):
            same = {arm: losses(model, plan, prompts, "reference") for arm, plan in arms.items()}
        apart = max(float((same[arm] - found).abs().max()) for arm, found in [("alone", alone), *both.items()])
        yield {**row(f"window {window}, native", full, alone, both), "from_reference": apart}
        with windowed_attention(model, window, SINKS, retained):
            alone, *found = (losses(model, plan, prompts, "reference") for plan in arms.values())
        yield row(f"window {window} and {SINKS} sinks, reference", full, alone, dict(zip(plans, found, strict=True)))


# Tables


def mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def row(name: str, full: Tensor, alone: Tensor, both: dict[str, Tensor]) -> dict[str, Any]:
    cells = {"alone": mean_and_error(alone - full)}
    for arm, found in both.items():
        cells |= {arm: mean_and_error(found - full), f"{arm} adds": mean_and_error(found - alone)}
    return {"name": name, "cells": cells}


def show(title: str, rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    done: list[dict[str, Any]] = []
    for found in rows:
        if not done:
            print(f"\n| {title} | {' | '.join(found['cells'])} |\n{'|---' * (len(found['cells']) + 1)}|")
        cells = " | ".join(f"{mean:.3f} ({error:.3f})" for mean, error in found["cells"].values())
        print(f"| {found['name']} | {cells} |", flush=True)
        done.append(found)
    return done


def main() -> int:
    """Prints the tables, and writes them as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--continuation", type=int, default=32)
    parser.add_argument("--count", type=int, default=4, help="how many of the deepest layers are omitted")
    parser.add_argument("--boundary", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    model = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32)
    texts = read_texts(sorted((HERE / "heldout").glob("*.py.txt")), tokenizer)
    pairs = text_sets(texts, tokenizer, [options.length], options.continuation, options.prompts)[0].pairs
    prompts = Prompts(*(torch.stack(part) for part in zip(*pairs, strict=True)))

    depth = model.config.num_hidden_layers
    plans = {f"POP b{boundary}": Plan.last(depth, options.count, boundary=boundary) for boundary in options.boundary}
    full = pressed_losses(model, None, None, prompts, False)
    report: dict[str, Any] = {"full": mean_and_error(full), "prompts": len(full), "omitted": options.count}
    print(f"{len(full)} prompts; at full depth {full.mean():.3f} ({report['full'][1]:.3f}) nats a token")
    both = {arm: pressed_losses(model, plan, None, prompts, False) for arm, plan in plans.items()}
    report["nothing"] = show(f"omitted {options.count}/{depth}", iter([row("nothing else", full, full, both)]))
    if importlib.util.find_spec("kvpress") is None:
        print("\nkvpress is not installed: no table of its presses")
    else:
        report["presses"] = show("press", press_rows(model, plans, prompts, full))
    report["windows"] = show("attention", window_rows(model, plans, prompts, full))
    apart = max(found.get("from_reference", 0.0) for found in report["windows"])
    print(f"\nnative windows and the reference's differ by at most {apart:.1e} nats a token in a prompt")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
