"""Run a call through the native path and through the oracle, and compare outputs and caches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pop_ext
import torch
from models import float32_twin
from pop_ext import Plan, reference
from tolerance import assert_close_fp32, assert_low_precision, compare_caches
from torch import Tensor, nn
from transformers import Cache, DynamicCache

# Families with native support.
NATIVE = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "olmo2", "mixtral", "qwen3_moe")

# Omitted layers of a model of six.
OMITS = {
    "none": (),
    "last layer": (5,),
    "deepest third": (4, 5),
    "gaps": (1, 3, 4),
    "first": (0,),
    "alternate": (0, 2, 4),
    "all but the first": (1, 2, 3, 4, 5),
    "all but the last": (0, 1, 2, 3, 4),
}
LAST = OMITS["deepest third"]
GAPS = OMITS["gaps"]


@dataclass
class Result:
    logits: Tensor
    hidden_states: Tensor
    cache: Cache


def plan_of(model: nn.Module, omit: tuple[int, ...] = LAST, boundary: int = 1) -> Plan:
    return Plan(num_layers=model.config.num_hidden_layers, omit=omit, boundary=boundary)


@contextmanager
def lm_head_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record the inputs of the head within the block: hidden states [batch, rows, hidden], one entry a call."""
    seen: list[Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    try:
        yield seen
    finally:
        hook.remove()


def run_oracle(model: nn.Module, plan: Plan, ids: Tensor | None = None, **call: Any) -> Result:
    with lm_head_inputs(model) as seen:
        logits, cache = reference.prefill(model, ids, plan, **call)
    hidden = torch.cat([rows[0] for rows in seen])
    return Result(logits, hidden.view(*logits.shape[:-1], -1), cache)


def run_native(model: nn.Module, plan: Plan, ids: Tensor | None = None, **call: Any) -> Result:
    out = pop_ext.load(model, plan).prefill(ids, **call)
    return Result(out.logits, out.hidden_states, out.past_key_values)


@torch.no_grad()
def run_stock(model: nn.Module, ids: Tensor, **call: Any) -> tuple[Tensor, Cache]:
    """Return logits of all rows, and a cache with every position in every layer."""
    output = model(ids, use_cache=True, **{"past_key_values": DynamicCache(), **call})
    return output.logits, output.past_key_values


def assert_equals_oracle(
    model: nn.Module,
    plan: Plan,
    ids: Tensor | None = None,
    *,
    past: Cache | None = None,
    oracle_past: Cache | None = None,
    mask: Tensor | None = None,
    **call: Any,
) -> Result:
    """Compare logits, hidden states and K/V of every layer and position: float32 within 1e-4, else `tolerance`'s rule.

    Args:
        model: the model.
        plan: the plan.
        ids: [batch, T].
        past: the cache that the native call continues; a copy of it is used.
        oracle_past: the cache that the oracle continues, if another.
        mask: attention mask; masked columns of the native cache must be zero.
    """
    call["attention_mask"] = mask
    ours = run_native(model, plan, ids, past_key_values=copy.deepcopy(past), **call)
    expected_past = past if oracle_past is None else oracle_past
    theirs = run_oracle(model, plan, ids, past_key_values=expected_past, **call)
    if ours.logits.dtype == torch.float32:
        assert_close_fp32(ours.logits, theirs.logits, "logits")
        assert_close_fp32(ours.hidden_states, theirs.hidden_states, "hidden states")
        compare_caches(ours.cache, theirs.cache, mask=mask)
        return ours
    truth_call = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in call.items()
    }
    truth = run_oracle(float32_twin(model), plan, ids, past_key_values=float32_cache(expected_past), **truth_call)
    assert_low_precision(ours.logits, theirs.logits, truth.logits, "logits")
    assert_low_precision(ours.hidden_states, theirs.hidden_states, truth.hidden_states, "hidden states")
    compare_caches(ours.cache, theirs.cache, mask=mask, oracle_fp32=truth.cache)
    return ours


def float32_cache(cache: Cache | None) -> Cache | None:
    """Return a copy of a dynamic cache in float32."""
    if cache is None:
        return None
    cache = copy.deepcopy(cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.float(), layer.values.float()
        layer.dtype = torch.float32
    return cache
