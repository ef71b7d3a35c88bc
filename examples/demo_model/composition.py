"""Combine pruned prefill with compressed caches and windowed attention: ``python examples/demo_model/composition.py``.

Each table gives the loss of a continuation above that at full depth without any method. Its columns are the other
method alone, POP alone, both, and the loss that POP adds to the other method. Differences are paired by prompt. The
presses come from kvpress (``pip install --no-deps kvpress cachetools fire termcolor``); without it, their table is left
out.
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
    """Prompts and their continuations: context int64 [prompts, T], continuation int64 [prompts, n]."""

    context: Tensor
    continuation: Tensor


# Compressed caches


@torch.no_grad()
def pressed_losses(model: Any, plan: Plan | None, press: Any, prompts: Prompts, hidden_states: bool) -> Tensor:
    """Score continuations with the stock model over compressed caches of the prompts.

    Args:
        model: the model.
        plan: plan of the prefill; None: the stock prefill.
        press: the compression; None: no compression.
        prompts: prompts and continuations.
        hidden_states: keep the layers' inputs for presses that need them.

    Returns:
        The loss in nats a token, [prompts] float64.
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
        # Positions are those in the text, even though the cache has fewer entries.
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
    """Limit attention of ``layers`` within a block: the last ``window`` positions, and the first ``sinks`` ones."""

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
    """Return the model as a Qwen2, whose config can give each layer a window, so that it runs natively."""
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
    """Score continuations by ``pop_ext.score``; return the loss in nats a token, [prompts] float64."""
    with pop_ext.enabled(model, plan, backend=backend):
        scores = pop_ext.score(model, list(prompts.context), list(prompts.continuation), BATCH)
    return (
        -torch.tensor([score.log_likelihood for score in scores], dtype=torch.float64) / prompts.continuation.shape[1]
    )


def window_rows(model: Any, plans: dict[str, Plan], prompts: Prompts, full: Tensor) -> Iterator[dict[str, Any]]:
    depth = model.config.num_hidden_layers
    retained = range(min(min(plan.omit) for plan in plans.values()))  # retained in every plan
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
    """Print the tables, and write them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--continuation", type=int, default=32)
    parser.add_argument("--count", type=int, default=4, help="omit the COUNT deepest layers")
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
