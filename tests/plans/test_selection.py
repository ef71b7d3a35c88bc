"""From scores to plans: the lowest layers, together or apart; ShortGPT's block influence; plans by measured time."""

from __future__ import annotations

import dataclasses
import functools
import math

import pop_ext
import pytest
import torch
from models import FAMILIES, shared, tokens
from pop_ext import Plan
from pop_ext.methods import latency
from pop_ext.plans.origin import Origin, config_hash
from pop_ext.plans.selection import ranked_plan

ORIGIN = Origin("m", "0" * 16, "gates", 8)


def batches(model):
    return list(tokens(model, 6, 24, seed=4).split(4))


def omit(scores, count, contiguous):
    return ranked_plan(scores, ORIGIN, count, contiguous=contiguous).omit


@pytest.mark.parametrize(
    ("count", "together", "apart"),
    [
        (0, (), ()),
        (1, (4,), (4,)),
        (2, (4, 5), (1, 4)),
        (3, (3, 4, 5), (1, 4, 5)),
        (5, (1, 2, 3, 4, 5), (1, 2, 3, 4, 5)),
    ],
)
def test_lowest_scores_are_omitted_as_a_run_or_singly(count, together, apart):
    scores = [9.0, 1.0, 8.0, 2.5, 0.5, 2.0]
    assert omit(scores, count, True) == together
    assert omit(scores, count, False) == apart


def test_ties_omit_the_deeper_layers():
    assert omit([1.0] * 5, 2, True) == (3, 4)
    assert omit([1.0] * 5, 2, False) == (3, 4)


def test_a_ranked_plan_has_its_method_in_its_origin():
    assert ranked_plan([1.0, 2.0, 3.0], ORIGIN, 1, contiguous=True).origin == Origin(
        "m", "0" * 16, "gates, contiguous", 8
    )
    plan = ranked_plan([1.0, 2.0, 3.0], ORIGIN, fraction=0.4, contiguous=False, boundary=7, min_tokens=9)
    assert (plan, plan.origin.method) == (Plan(3, (0,), 7, 9), "gates, free")
    with pytest.raises(ValueError, match=r"count: expected an integer in 0...2, got 3"):
        ranked_plan([1.0, 2.0, 3.0], ORIGIN, 3, contiguous=True)
    with pytest.raises(TypeError, match="contiguous: expected a bool, got str"):
        ranked_plan([1.0], ORIGIN, 0, contiguous="no")


def test_importance_plan_omits_the_lowest_contiguous_prefill_scores():
    model = shared("llama")
    imp = pop_ext.importance(model, batches(model))
    scores = (9.0, 1.0, 8.0, 2.5, 0.5, 2.0)
    imp = dataclasses.replace(imp, layer=dataclasses.replace(imp.layer, prefill=scores, decode=scores[::-1]))
    assert imp.plan(2).omit == imp.plan().omit == (4, 5)
    assert imp.plan(2, contiguous=False).omit == (1, 4)
    assert imp.plan(fraction=0.5, boundary=3, min_tokens=5) == Plan(6, (3, 4, 5), 3, 5)
    assert imp.plan(2).origin == Origin(None, config_hash(model.config), "gates, contiguous", 6)
    pop_ext.load(model, imp.plan(2))


# Block influence


@pytest.mark.parametrize("family", FAMILIES)
def test_block_influence_is_one_minus_the_mean_cosine(family):
    model = shared(family)
    found = pop_ext.block_influence(model, batches(model))
    of_samples = []
    for ids in torch.cat(batches(model)):
        states = []
        hooks = [
            layer.register_forward_hook(lambda m, args, out, states=states: states.append((args[0], out)))
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(ids[None])
        for hook in hooks:
            hook.remove()
        cosines = [(a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)) for a, b in states]
        of_samples.append([1 - float(cosine.mean()) for cosine in cosines])
    samples = torch.tensor(of_samples).double()
    assert found.influence == pytest.approx(samples.mean(0).tolist(), abs=1e-5)
    assert found.error == pytest.approx((samples.std(0) / math.sqrt(len(samples))).tolist(), abs=1e-5)


def test_block_influence_plan_is_not_contiguous_by_default(tmp_path):
    model = shared("llama")
    found = pop_ext.block_influence(model, batches(model))
    found = dataclasses.replace(found, influence=(9.0, 1.0, 8.0, 2.5, 0.5, 2.0))
    assert found.plan(2).omit == (1, 4)
    assert found.plan(2, contiguous=True).omit == (4, 5)
    assert found.plan(2).origin.method == "block influence, free"
    assert found.plan(2).origin.samples == 6
    found.save(tmp_path / "influence.json")
    assert '"influence": [' in (tmp_path / "influence.json").read_text()


def test_block_influence_of_an_enabled_model_reads_the_stock_forward():
    model = shared("llama")
    expected = pop_ext.block_influence(model, batches(model))
    told = []
    with pop_ext.enabled(model, Plan.last(6), strict=True):
        found = pop_ext.block_influence(model, batches(model), progress=lambda *done: told.append(done))
    assert found == expected
    assert told == [(4, 6), (6, 6)]
    with pytest.raises(ValueError, match="batches: expected at least one sequence, got none"):
        pop_ext.block_influence(model, [])


# By measured time


@pytest.fixture
def clock(monkeypatch):
    """Times by the number of omitted layers and tokens, instead of measured ones."""
    loaded = []

    def seconds(native, ids):
        loaded.append(len(native.plan.omit))
        # A millisecond a layer and token, and a cost of pruning that short prompts do not win back.
        overhead = 0.05 if native.plan.omit else 0.0
        return (6 - len(native.plan.omit)) * ids.shape[1] / 1000 + overhead

    monkeypatch.setattr(latency, "_seconds", seconds)
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
    # Two of six layers save 2 ms a token of 1000 and cost 50 ms: from 25 tokens on.
    model, plan = shared("llama"), Plan.last(6, 2)
    told = []
    found = pop_ext.shortest_paying(model, plan, (16, 64, 32, 8), repeats=1, progress=lambda *done: told.append(done))
    assert found == 32
    assert told == [(1, 4), (2, 4), (3, 4)]  # a length at which it does not pay ends the search
    assert pop_ext.shortest_paying(model, plan, (8, 16), repeats=1) is None
    assert pop_ext.shortest_paying(model, plan, (30, 40), repeats=1) == 30


def test_latency_measures_real_times():
    model = shared("llama")
    found = pop_ext.plan_within(model, functools.partial(Plan.last, 6), seconds=60, tokens=40, repeats=2)
    assert found.plan == Plan.last(6, 0)
    assert all(0 < seconds < 60 for seconds in found.measured.values())
    assert pop_ext.shortest_paying(model, Plan.last(6, 5), (20, 40), repeats=2) in (None, 20, 40)
