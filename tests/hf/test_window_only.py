"""Test `window_only`: omitted layers with a sliding window project only positions that a later row can see."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from models import WINDOW, gemma2, gemma3, mistral, phi3, qwen2, tokens
from op_calls import SENTINEL, op_call, run_op
from pop_ext.hf.kv_cache import CacheTransaction
from transformers.cache_utils import Cache, DynamicCache, StaticCache, StaticLayer

LAYERS = 6
OMIT = (1, 3, 4)  # projected with layer 5, which is retained and keeps every position
LENGTHS = (WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW)


FAMILIES = {
    "mistral": mistral,
    "qwen2": lambda: qwen2(use_sliding_window=True),
    "phi3": phi3,
    "gemma2": gemma2,
    "gemma3": gemma3,
}


def build(family: str):
    return pop_ext.load(FAMILIES[family](), pop_ext.Plan(LAYERS, OMIT, boundary=2))


def run_both(native, prompts, **options):
    """Run a call with every position projected, and with window_only. Return both outputs and both calls."""
    whole, windowed = (op_call(native, prompts, **options) for _ in range(2))
    return run_op(whole), run_op({**windowed, "window_only": True}), whole, windowed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("boundary", [1, 3])
def test_window_only_skips_only_positions_out_of_reach(family, length, boundary):
    native = build(family)
    prompts = [tokens(native.model, n, seed=n) for n in (length, 5, length + 2)]
    expected, actual, whole, windowed = run_both(native, prompts, boundary=[boundary] * 3, start=[0, 2, 1])
    torch.testing.assert_close(actual, expected)
    for layer in range(LAYERS):
        window = native.spec.window[layer] if layer in OMIT else 0
        for name in ("key_cache", "value_cache"):
            ours, theirs = windowed[name][layer], whole[name][layer]
            for i, (start, prompt) in enumerate(zip([0, 2, 1], prompts, strict=True)):
                seen = max(0, len(prompt) - boundary - (window - 1)) if window else 0
                end = start + len(prompt)
                torch.testing.assert_close(ours[i, :, start + seen : end], theirs[i, :, start + seen : end])
                assert (ours[i, :, start : start + seen] == SENTINEL).all(), (name, layer, i)


def test_window_only_skips_some_position():
    native = build("mistral")
    windowed = op_call(native, [tokens(native.model, 3 * WINDOW)])
    run_op({**windowed, "window_only": True})
    assert (windowed["key_cache"][OMIT[0]][0, :, 0] == SENTINEL).all()
    assert not (windowed["key_cache"][0][0, :, 0] == SENTINEL).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_later_turns_never_read_skipped_positions(family):
    native = build(family)
    prompts = [tokens(native.model, n, seed=n) for n in (WINDOW + 9, WINDOW + 1)]
    _, _, whole, windowed = run_both(native, prompts, capacity=80)
    past = [len(prompt) for prompt in prompts]
    for turn in (1, WINDOW):
        more = [tokens(native.model, turn, seed=turn + i) for i in range(2)]
        results = []
        for filled, options in ((whole, {}), (windowed, {"window_only": True})):
            again = op_call(native, more, past=past, capacity=80)
            again.update(key_cache=filled["key_cache"], value_cache=filled["value_cache"], **options)
            results.append(run_op(again))
        torch.testing.assert_close(results[1], results[0])
        past = [p + turn for p in past]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_skipped_positions_are_zero_and_decode_is_unchanged(kind):
    native = build("mistral")
    ids = tokens(native.model, 2, 2 * WINDOW)
    results, caches = [], []
    for window_only in (False, True):
        # A full-length cache, which a caller may pass to a model with windows.
        cache = DynamicCache() if kind == "dynamic" else full_length_static_cache(native, 4 * WINDOW)
        first = native.prefill(ids, past_key_values=cache, window_only=window_only)
        second = native.prefill(tokens(native.model, 2, 1), past_key_values=cache, window_only=window_only)
        results.append(torch.cat([first.logits, second.logits]))
        caches.append(cache)
    torch.testing.assert_close(results[1], results[0])
    seen = 2 * WINDOW - native.plan.boundary - (WINDOW - 1)
    for layer in OMIT:
        assert (caches[1].layers[layer].keys[:, :, :seen] == 0).all()
        assert not (caches[0].layers[layer].keys[:, :, :seen] == 0).any()


def recorded_cache(model) -> DynamicCache:
    """Return a cache whose layers also keep positions before the window, so that it can be cropped."""
    cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        layer.activate_past_recording()
    return cache


@pytest.mark.parametrize(
    ("cache", "dropped"),
    [
        (lambda model: DynamicCache(config=model.config), True),
        (lambda model: StaticCache(config=model.config, max_cache_len=4 * WINDOW), True),
        (lambda model: DynamicCache(), False),
        (recorded_cache, False),
    ],
    ids=["windows", "static windows", "full length", "recorded windows"],
)
def test_what_the_cache_will_drop_is_not_projected(cache, dropped, monkeypatch):
    native = build("mistral")
    opened = []

    class Opened(CacheTransaction):
        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            opened.append(self)

    monkeypatch.setattr("pop_ext.hf.native_model.CacheTransaction", Opened)
    native.prefill(tokens(native.model, 2, 2 * WINDOW), past_key_values=cache(native.model))
    seen = 2 * WINDOW - native.plan.boundary - (WINDOW - 1)
    for layer in OMIT:
        for tensor in (opened[0].key_cache[layer], opened[0].value_cache[layer]):
            assert (tensor[:, :, :seen] == 0).all() == dropped
            assert not (tensor[:, :, seen : 2 * WINDOW] == 0).any()


def full_length_static_cache(native, capacity: int) -> Cache:
    return Cache(layers=[StaticLayer(max_cache_len=capacity) for _ in range(native.spec.num_layers)])
