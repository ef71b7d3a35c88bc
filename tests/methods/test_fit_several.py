"""pop_ext.fit of several plans: one reading, and the same fits as one by one."""

from __future__ import annotations

import copy

import pop_ext
import pytest
from models import batches, shared, tokens
from pop_ext import Plan

PLANS = [Plan(6, (4, 5)), Plan(6, (1, 3, 5), boundary=4), Plan(6, (3, 4, 5), boundary=2), Plan(6, (4, 5), boundary=3)]


def tasks(model):
    return [(row[:20], row[20:]) for row in tokens(model, 9, 23, seed=90)]


@pytest.mark.parametrize(
    ("family", "method", "given"),
    [
        ("llama", "ridge", {}),
        ("llama", "distill", {"lambdas": [0.1]}),
        ("llama", "ridge", {"weighting": "uniform"}),
        ("gemma2", "ridge", {"lambdas": [0.1]}),
        ("phi3", "distill", {"lambdas": [0.1, 1.0]}),
    ],
)
def test_plans_fitted_together_are_as_fitted_one_by_one(family, method, given):
    model = shared(family)
    options = {"method": method, "tasks": tasks(model), **({"steps": 3} if method == "distill" else {}), **given}
    together = pop_ext.fit(model, PLANS, batches(model, count=9), **options)
    for plan, fitted in zip(PLANS, together, strict=True):
        alone = pop_ext.fit(model, plan, batches(model, count=9), **options)
        assert fitted == alone
        assert fitted.projections.report == alone.projections.report
        assert fitted.origin == alone.origin


def test_several_plans_take_one_reading():
    model, forwards = copy.deepcopy(shared("llama")), []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: forwards.append(1))
    runs = [Plan(6, (4, 5)), Plan(6, (3, 4, 5)), Plan(6, (5,))]
    counts = []
    for plans in (runs[0], runs):
        forwards.clear()
        pop_ext.fit(model, plans, batches(model, count=4), lambdas=[0.1])
        counts.append(len(forwards))
    first, several = counts
    assert several == first + 2 * 2  # each plan is first tried on two tokens, one in each phase of a prefill


def test_progress_of_several_plans_ends_at_its_total():
    model, seen = shared("llama"), []
    pop_ext.fit(
        model,
        PLANS[:2],
        batches(model, count=8),
        method="distill",
        steps=2,
        lambdas=[0.1, 1.0],
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1][0] == seen[-1][1]


def test_held_out_sequences_are_left_out_for_wide_boundaries_alone():
    model = shared("llama")
    short, long = tokens(model, 2, 12, seed=3), tokens(model, 2, 24, seed=4)
    wide = Plan(6, (4, 5), boundary=16)
    narrow, _ = pop_ext.fit(model, [PLANS[0], wide], batches(model), holdout=[short, long])
    assert narrow.projections.report.holdout == 4
    assert pop_ext.fit(model, [wide], batches(model), holdout=[short, long])[0].projections.report.holdout == 2


@pytest.mark.parametrize(
    ("plans", "error", "text"),
    [
        ([], ValueError, "plan: expected at least one plan, got none"),
        ("last", TypeError, "plan: expected a pop_ext.Plan or a sequence of them, got str"),
        ([PLANS[0], 3], TypeError, r"plan\[1\]: expected a pop_ext.Plan, got int"),
        ([PLANS[0], Plan(6, ())], ValueError, r"plan\[1\]: expected at least one omitted layer to fit, got none"),
    ],
)
def test_errors_name_the_plan(plans, error, text):
    model = shared("llama")
    with pytest.raises(error, match=text):
        pop_ext.fit(model, plans, batches(model))


def test_several_plans_share_no_state_file(tmp_path):
    model = shared("llama")
    with pytest.raises(ValueError, match="resume: expected None with several plans"):
        pop_ext.fit(model, PLANS, batches(model), method="distill", resume=tmp_path / "state.pt")


def test_a_boundary_that_covers_the_training_sequences_is_refused_before_any_training(monkeypatch):
    model, plans = shared("llama"), [Plan(6, (4, 5)), Plan(6, (4, 5), boundary=20)]
    monkeypatch.setattr("pop_ext.methods.fitting.distill", lambda *_: pytest.fail("trained"))
    how = {"method": "distill", "lambdas": [0.1], "holdout": [tokens(model, 2, 64, seed=5)]}
    with pytest.raises(ValueError, match="batches: expected sequences longer than the boundary 20 and a continuation"):
        pop_ext.fit(model, plans, [tokens(model, 3, 24)], **how)
