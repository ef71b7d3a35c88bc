"""Plans from scores: the layers of the lowest scores, as a run or singly."""

from __future__ import annotations

import dataclasses

import pop_ext
import pytest
from models import shared, tokens
from pop_ext import Plan
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
