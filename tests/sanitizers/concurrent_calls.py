"""Threads that load, prefill, free, enable and disable models at once. Run by make tsan.

The results are those of one thread; ThreadSanitizer reports accesses that no lock or atomic orders.
"""

from __future__ import annotations

import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, plan_of
from enabled_models import OTHER, PLAN, T, prefill
from models import llama, mistral, qwen2, tokens
from threads import run_threads

TIMES = 8


def logits(native, ids):
    return native.prefill(ids).logits


def load_prefill_free(model, plan, ids):
    """Return the logits of calls whose model is loaded before, and freed after each."""
    return [logits(pop_ext.load(model, plan), ids) for _ in range(TIMES)]


def enable_prefill_disable(model, plan, ids):
    """Return the logits of calls of a model that is enabled before, and disabled after each."""
    results = []
    for _ in range(TIMES):
        pop_ext.enable(model, plan, strict=True)
        results.append(prefill(model, ids).logits)
        assert pop_ext.stats(model)["prefill"] == 1
        pop_ext.disable(model)
    return results


def assert_all_equal(results, expected) -> None:
    assert all(torch.equal(result, expected) for result in results)


def test_two_threads_that_load_and_free_one_models_weights():
    model = llama()
    ids = [tokens(model, 1, n, seed=n) for n in (40, 150)]
    plans = [plan_of(model, GAPS, 2), plan_of(model, LAST, 2)]
    expected = [logits(pop_ext.load(model, plan), rows) for plan, rows in zip(plans, ids, strict=True)]
    jobs = [lambda at=at: load_prefill_free(model, plans[at], ids[at]) for at in range(2)]
    for results, one in zip(run_threads(*jobs), expected, strict=True):
        assert_all_equal(results, one)


def test_two_threads_that_enable_and_disable_two_models():
    models, plans = [llama(), qwen2()], [PLAN, OTHER]
    ids = [tokens(model, 2, T) for model in models]
    expected = [enable_prefill_disable(*each)[0] for each in zip(models, plans, ids, strict=True)]
    jobs = [lambda at=at: enable_prefill_disable(models[at], plans[at], ids[at]) for at in range(2)]
    for results, one in zip(run_threads(*jobs), expected, strict=True):
        assert_all_equal(results, one)


def test_a_thread_that_enables_beside_one_that_prefills_and_one_that_loads():
    enabled, other = pop_ext.enable(mistral(), PLAN, strict=True), llama()
    ids, rows = tokens(enabled, 1, T), tokens(other, 1, 70)
    expected = prefill(enabled, ids).logits
    results, *_ = run_threads(
        lambda: [prefill(enabled, ids).logits for _ in range(3 * TIMES)],
        lambda: enable_prefill_disable(other, OTHER, rows),
        lambda: load_prefill_free(qwen2(), OTHER, rows),
    )
    assert_all_equal(results, expected)


@pytest.mark.parametrize(
    "options", [{name: True} for name in ("prepack", "fp8", "int8")], ids=lambda options: next(iter(options))
)
def test_two_threads_that_prefill_copied_weights(options):
    model = llama(dtype=torch.bfloat16)
    try:
        native = pop_ext.load(model, plan_of(model, GAPS, 2), **options)
    except pop_ext.UnsupportedModelError as reason:
        pytest.skip(str(reason))
    ids = tokens(model, 1, 150)
    expected = logits(native, ids)
    for results in run_threads(*[lambda: [logits(native, ids) for _ in range(TIMES)]] * 2):
        assert_all_equal(results, expected)
