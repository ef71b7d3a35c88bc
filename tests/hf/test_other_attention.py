"""Test a custom attention: the reference backend runs it, and native windows equal it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pop_ext
import pytest
import torch
from enabled_models import PLAN, generate
from models import WINDOW, llama, qwen2, tokens
from pop_ext import Plan, reference
from pop_ext.hf.compat import cache_of
from tolerance import assert_close_fp32, compare_caches
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LAYERS = 6
LENGTH = 3 * WINDOW + 1
RETAINED = [layer for layer in range(LAYERS) if layer not in PLAN.omit]


@pytest.fixture
def calls() -> Iterator[list[tuple[int, int, int]]]:
    """Register an attention with windows in the retained layers of PLAN. Record (layer, rows, keys) of each call."""
    seen: list[tuple[int, int, int]] = []

    def windowed(module: Any, query: Any, key: Any, value: Any, mask: Any, **how: Any) -> Any:
        rows, keys = query.shape[2], key.shape[2]
        seen.append((module.layer_idx, rows, keys))
        if mask is None:
            position = torch.arange(keys - rows, keys, device=query.device)[:, None]
            mask = torch.arange(keys, device=query.device) <= position
            if module.layer_idx in RETAINED:
                mask &= torch.arange(keys, device=query.device) > position - WINDOW
            mask = mask[None, None]
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **how)

    AttentionInterface.register("test_windowed", windowed)
    yield seen
    del AttentionInterface._global_mapping["test_windowed"]


def with_attention(model: Any) -> Any:
    """Return a copy of the model with the attention of `calls`."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("test_windowed")
    return model


def with_native_windows(model: Any) -> Any:
    """Return a Qwen2 with the same weights, whose config sets the same windows."""
    kinds = ["sliding_attention" if layer in RETAINED else "full_attention" for layer in range(LAYERS)]
    twin = qwen2(use_sliding_window=True, layer_types=kinds)
    twin.load_state_dict(model.state_dict())
    return twin


def test_context_and_boundary_rows_both_use_the_custom_attention(calls):
    model = with_attention(llama())
    reference.prefill(model, tokens(model, 1, LENGTH), PLAN.replace(boundary=3))
    of_rows = {(layer, rows) for layer, rows, keys in calls if (rows, keys) != (1, 1)}  # no one row over one key
    context = {(layer, LENGTH - 3) for layer in RETAINED}
    boundary = {(layer, 3) for layer in range(LAYERS)}
    assert of_rows == context | boundary


@torch.no_grad()
def test_a_custom_attention_runs_only_in_the_reference_backend(calls):
    model = with_attention(llama())
    ids = tokens(model, 2, LENGTH)
    expected, cache = reference.prefill(model, ids, PLAN)
    plain, _ = reference.prefill(llama(), ids, PLAN)
    assert (expected - plain).abs().max() > 1e-2  # the window changes something
    with pop_ext.enabled(model, PLAN, strict=True, backend="reference"):
        output = model(ids, logits_to_keep=1)
        assert pop_ext.last_call(model).backend == "reference"
    assert torch.equal(output.logits, expected)
    compare_caches(cache_of(output), cache)
    with pop_ext.enabled(model, PLAN):
        decision = pop_ext.explain(model, ids, logits_to_keep=1)
    assert (decision.backend, decision.rule, decision.declined) == ("stock", "attention", True)
    assert "test_windowed" in decision.reason


@torch.no_grad()
@pytest.mark.parametrize("boundary", [1, WINDOW + 2])
def test_native_windows_equal_an_attention_with_the_same_windows(calls, boundary):
    model = qwen2()
    native = pop_ext.load(with_native_windows(model), PLAN.replace(boundary=boundary))
    assert list(native.spec.window) == [WINDOW if layer in RETAINED else 0 for layer in range(LAYERS)]
    ids = tokens(model, 1, LENGTH)
    expected, _ = reference.prefill(with_attention(model), ids, PLAN.replace(boundary=boundary))
    assert_close_fp32(native.prefill(ids).logits, expected, "logits")


def test_generate_with_a_custom_attention_equals_native_windows(calls):
    model = qwen2()
    ids = tokens(model, 1, LENGTH)
    ours = pop_ext.enable(with_attention(model), PLAN, strict=True, backend="reference")
    theirs = pop_ext.enable(with_native_windows(model), PLAN, strict=True)
    assert generate(ours, ids).tolist() == generate(theirs, ids).tolist()
    assert len(set(generate(ours, ids)[0, LENGTH:].tolist())) > 8


def test_bidirectional_models_stay_with_the_stock_forward_on_either_backend():
    model = llama()
    model.config.is_causal = False
    for backend in ("native", "reference"):
        with pop_ext.enabled(model, PLAN, backend=backend), torch.no_grad():
            assert pop_ext.explain(model, tokens(model, 1, 19), logits_to_keep=1).rule == "attention"


def test_attention_wrapped_by_kvpress_is_native_unless_keys_are_masked():
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def wrapped(func: Any) -> Any:
        def wrapper(module: Any, *args: Any, **kwargs: Any) -> Any:
            return func(module, *args, **kwargs)

        wrapper.__module__ = "kvpress.attention_patch"
        return wrapper

    def mine(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    model = pop_ext.enable(llama(), Plan.last(LAYERS))
    call = {"input_ids": tokens(model, 1, 19), "logits_to_keep": 1}
    try:
        with torch.no_grad():
            AttentionInterface.register("sdpa", wrapped(wrapped(original)))
            assert pop_ext.explain(model, **call).native
            model.model.layers[4].self_attn.masked_key_indices = (torch.tensor([0]),) * 3
            assert "masked_key_indices (layer 4)" in pop_ext.explain(model, **call).reason
            model.model.layers[4].self_attn.masked_key_indices = None
            assert pop_ext.explain(model, **call).native
            AttentionInterface.register("sdpa", wrapped(mine))
            assert "test_other_attention" in pop_ext.explain(model, **call).reason
    finally:
        AttentionInterface.register("sdpa", original)
