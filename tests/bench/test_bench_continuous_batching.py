"""The bench of continuous batching times the backend that it names, against the stock forward."""

from __future__ import annotations

import time

import models
import pytest
from pop_ext import Plan

from bench import continuous_batching

PLAN = Plan.last(6)

pytestmark = pytest.mark.cpu
pytest.importorskip("transformers", minversion="5.24")


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_one_length_is_timed_on_a_manager_that_is_gone_afterwards(backend):
    model = models.llama()
    result = continuous_batching.measure(model, PLAN, 24, 2, backend, 2, time.perf_counter)
    assert (result.tokens, result.prompts, result.backend, result.rounds) == (24, 2, backend, 2)
    assert result.omitted == 2
    assert result.stock_s > 0
    assert result.spread[0] <= result.ratio <= result.spread[1]
    assert result.share == pytest.approx(result.ratio / result.ceiling)
    assert 1 < result.ceiling < 2
    assert not hasattr(model, "_cached_continuous_batching_manager")


def test_prompts_that_are_not_pruned_are_an_error(monkeypatch):
    model = models.llama()
    model.model.layers[2].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="expected"):
        continuous_batching.measure(model, PLAN, 24, 1, "portable", 1, time.perf_counter)
