"""pop_ext.plan_within and pop_ext.shortest_paying, on made-up times and on measured ones."""

from __future__ import annotations

import functools

import pop_ext
import pytest
from models import shared, tokens
from pop_ext import Plan
from pop_ext.methods import latency
from pop_ext.plans.origin import config_hash


def batches(model):
    return list(tokens(model, 6, 24, seed=4).split(4))


@pytest.fixture
def clock(monkeypatch):
    """Replace measured times by a formula in omitted layers and tokens."""
    loaded = []

    def seconds(native, ids):
        loaded.append(len(native.plan.omit))
        # 1 ms per layer and token, and a fixed cost of pruning that short prompts do not win back.
        overhead = 0.05 if native.plan.omit else 0.0
        return (6 - len(native.plan.omit)) * ids.shape[1] / 1000 + overhead

    monkeypatch.setattr(latency, "seconds_of", seconds)
    return loaded


@pytest.mark.parametrize(("budget", "count"), [(0.61, 0), (0.6, 0), (0.55, 1), (0.46, 2), (0.451, 2), (0.151, 5)])
def test_plan_within_finds_the_fewest_layers_within_seconds(clock, budget, count):
    model = shared("llama")
    choose = functools.partial(Plan.last, 6)
    found = pop_ext.plan_within(model, choose, seconds=budget, tokens=100, repeats=1)
    assert found.plan == Plan.last(6, count)
    assert found.budget == budget
    assert set(clock) == set(found.measured)
    assert found.measured[0] == pytest.approx(0.6)
    assert found.plan.origin.method.startswith("deepest; the fewest within 0.")
    assert found.plan.origin.config_hash == config_hash(model.config)


def test_plan_within_takes_a_speedup_over_the_full_prefill(clock):
    model = shared("llama")
    imp = pop_ext.importance(model, batches(model))
    found = pop_ext.plan_within(model, imp.plan, speedup=1.3, tokens=100, repeats=1)  # 0.6 / 1.3 = 0.46
    assert found.plan == imp.plan(2)
    assert found.budget == pytest.approx(0.6 / 1.3)
    assert found.plan.origin.samples == 6
    assert found.plan.origin.method.startswith("gates, contiguous; the fewest within 0.4615 s for 1 x 100 tokens")


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        (dict(seconds=0.1), ValueError, "seconds: expected at least 0.15 (5 of 6 layers omitted), got 0.1"),
        (dict(speedup=5), ValueError, "speedup: expected at most 4 (5 of 6 layers omitted), got 5.0"),
        ({}, ValueError, "seconds, speedup: expected exactly one of them, got neither"),
        (dict(seconds=1, speedup=1), ValueError, "seconds, speedup: expected exactly one of them, got both"),
        (dict(seconds=0), ValueError, "seconds: expected more than 0, got 0"),
        (dict(speedup="2"), TypeError, "speedup: expected a number, got '2'"),
        (dict(seconds=1, tokens=0), ValueError, "tokens: expected at least 1, got 0"),
        (dict(seconds=1, repeats=1.5), TypeError, "repeats: expected an int, got float 1.5"),
    ],
)
def test_plan_within_refuses_bad_budgets_by_name(clock, how, kind, text):
    arguments = {"tokens": 100, "repeats": 1, **how}
    with pytest.raises(kind) as error:
        pop_ext.plan_within(shared("llama"), functools.partial(Plan.last, 6), **arguments)
    assert str(error.value) == text


def test_shortest_paying_finds_where_pruning_stays_faster(clock):
    # Omitting two of six layers saves 2 ms per token and costs 50 ms, so it pays from 25 tokens on.
    model, plan = shared("llama"), Plan.last(6, 2)
    told = []
    found = pop_ext.shortest_paying(model, plan, (16, 64, 32, 8), repeats=1, progress=lambda *done: told.append(done))
    assert found == 32
    assert told == [(1, 4), (2, 4), (3, 4)]  # the first length at which it does not pay ends the search
    assert pop_ext.shortest_paying(model, plan, (8, 16), repeats=1) is None
    assert pop_ext.shortest_paying(model, plan, (30, 40), repeats=1) == 30


def test_latency_measures_real_times():
    model = shared("llama")
    found = pop_ext.plan_within(model, functools.partial(Plan.last, 6), seconds=60, tokens=40, repeats=2)
    assert found.plan == Plan.last(6, 0)
    assert all(0 < seconds < 60 for seconds in found.measured.values())
    assert pop_ext.shortest_paying(model, Plan.last(6, 5), (20, 40), repeats=2) in (None, 20, 40)
