"""Times of plans in turns, speed-ups with their quartiles, and the figures of an evaluation."""

from __future__ import annotations

import dataclasses

import models
import numpy as np
import pop_ext
import torch
from evaluated_prompts import PLAN, prompt_sets
from models import shared
from pop_ext import Plan
from pop_ext.evaluation import (
    Evaluation,
    PromptSet,
    evaluate,
    make_arms,
    plots,
    time_plans,
    timing,
)
from pop_ext.evaluation.timing import NATIVE_FULL, STOCK, speedup


def test_time_plans_times_stock_native_full_and_each_plan():
    model = shared("llama")
    found = time_plans(model, [PLAN, PLAN.replace(boundary=1)], [16, 32], repeats=3)
    assert [timing["arm"] for timing in found[:4]] == [STOCK, NATIVE_FULL, "pop 1,4-5 b2", "pop 1,4-5 b1"]
    assert {timing["tokens"] for timing in found} == {16, 32}
    assert all(len(timing["seconds"]) == 3 and min(timing["seconds"]) > 0 for timing in found)
    assert found[2]["flops"] < found[1]["flops"] < found[0]["flops"]
    fake = [{"arm": NATIVE_FULL, "tokens": 8, "seconds": [2, 4, 9]}, {"arm": "a", "tokens": 8, "seconds": [1, 4, 3]}]
    assert speedup(fake, "a", 8) == 2
    assert speedup(fake, "b", 8) is None


def test_a_speedup_has_its_quartiles_over_rounds():
    fake = [{"arm": NATIVE_FULL, "tokens": 8, "seconds": [2, 4, 9]}, {"arm": "a", "tokens": 8, "seconds": [1, 4, 3]}]
    assert timing.speed_range(fake, "a", 8) == (1.5, 2, 2.5)
    assert timing.speed_range(fake, "b", 8) is None
    assert timing.median_ms(fake, "a", 8) == 3000
    once = [{**entry, "seconds": entry["seconds"][:1]} for entry in fake]
    assert timing.speed_range(once, "a", 8) == (2, 2, 2)


def test_time_plans_loads_each_plan_once_and_keeps_boundaries(monkeypatch):
    model = shared("llama")
    loaded, boundaries = [], []
    load, native = timing.load, timing._native
    monkeypatch.setattr(timing, "load", lambda model, plan: loaded.append(plan.omit) or load(model, plan))
    monkeypatch.setattr(timing, "_native", lambda of, ids, rows: boundaries.append(rows) or native(of, ids, rows))
    plans = [Plan(6, omit, boundary) for omit in ((4, 5), (5,)) for boundary in (1, 20)]
    found = time_plans(model, plans, [16, 32], repeats=1)
    assert sorted(loaded) == [(), (4, 5), (5,)]
    assert boundaries[:5] == [1, 1, 16, 1, 16]
    assert boundaries[-5:] == [1, 1, 20, 1, 20]
    assert found[2]["extra_bytes"] == found[3]["extra_bytes"] > found[4]["extra_bytes"] > 0


def test_figures_are_drawn_only_where_there_is_data(tmp_path):
    model = shared("llama")
    long = prompt_sets(model)
    short = PromptSet("text", 12, tuple((context[-12:], after) for context, after in long[0].pairs))
    plans = [Plan.last(6, count, boundary=boundary) for count in (1, 2) for boundary in (1, 4)]
    result = evaluate(model, [*long, short], plans, greedy_tokens=0)
    result.timings = time_plans(model, plans, [12, 24], repeats=3)
    for name, draw in plots.FIGURES.items():
        assert draw(result, tmp_path / f"{name}.png"), name
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    empty = evaluate(model, long, [PLAN], kinds=["full"], greedy_tokens=0)
    assert not any(draw(empty, tmp_path / f"no-{name}.png") for name, draw in plots.FIGURES.items())
    assert plots._frontier([(1.0, 0.1), (1.2, 0.1), (1.4, 0.3), (1.3, 0.4)]) == [(1.4, 0.3), (1.2, 0.1)]


def drawn(monkeypatch, draw, result, tmp_path):
    """Draw a figure and return its first axes."""
    made, original = [], plots.new_figure

    def watched(*args, **kwargs):
        figure, axes = original(*args, **kwargs)
        made.extend(axes)
        return figure, axes

    monkeypatch.setattr(plots, "new_figure", watched)
    assert draw(result, tmp_path / "figure.png")
    return made[0]


def with_method(plan, method):
    """Return a plan with its fit said to be by another method, and with other values."""
    report = dataclasses.replace(plan.projections.report, method=method)
    matrices = {layer: matrix * 1.001 for layer, matrix in plan.projections.matrices.items()}
    return plan.replace(projections=dataclasses.replace(plan.projections, report=report, matrices=matrices))


def made_result(plans, length, rates):
    """Make a result of two prompts of ``length`` tokens. ``rates``: (arm, tokens) -> speed relative to native full."""
    facts = {"model": "m", "num_layers": 6, "sets": [{"kind": "text", "length": length, "prompts": 2}]}
    result = Evaluation(facts)
    for number, arm in enumerate(make_arms(plans, ["pop"])):
        result.add(0, arm, {"loss": [1.0 + number, 1.1 + number], "first": [1.0, 1.0]})
    result.timings = [
        {"arm": arm, "tokens": tokens, "seconds": [1 / rate] * 3} for (arm, tokens), rate in rates.items()
    ]
    return result


def test_the_frontier_uses_the_timed_length_and_labels_layers(tmp_path, monkeypatch):
    plans = [Plan(6, (1, 4, 5)), Plan(6, (5,))]
    slow, fast = {"pop 1,4-5 b1": 1.5, "pop 5 b1": 1.2}, {"pop 1,4-5 b1": 3.0, "pop 5 b1": 2.0}
    rates = {(NATIVE_FULL, 24): 1.0, (NATIVE_FULL, 96): 1.0}
    rates |= {(arm, 24): rate for arm, rate in slow.items()} | {(arm, 96): rate for arm, rate in fast.items()}
    ax = drawn(monkeypatch, plots.draw_frontier, made_result(plans, 24, rates), tmp_path)
    assert {text.get_text(): round(text.xy[0], 3) for text in ax.texts} == {"1,4-5": 1.5, "5": 1.2}
    assert "24 tokens" in ax.get_xlabel()
    assert "24 tokens" in ax.get_ylabel()
    ax = drawn(monkeypatch, plots.draw_frontier, made_result(plans, 32, rates), tmp_path)
    assert {text.get_text(): round(text.xy[0], 3) for text in ax.texts} == {"1,4-5": 3.0, "5": 2.0}
    assert "96 tokens" in ax.get_xlabel()
    assert "32 tokens" in ax.get_ylabel()


def test_the_frontier_has_errors_in_both_directions_and_tells_fits_apart(tmp_path, monkeypatch):
    model = shared("llama")
    ids = torch.randint(0, model.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(2))
    fitted = pop_ext.fit(model, Plan(6, (5,)), [ids], lambdas=[0.1])
    result = Evaluation({"model": "m", "num_layers": 6, "sets": [{"kind": "text", "length": 24, "prompts": 2}]})
    for number, arm in enumerate(make_arms([fitted, with_method(fitted, "distill")], ["pop", "pop-fitted"])):
        result.add(0, arm, {"loss": [1.0 + number, 1.2 + 2 * number], "first": [1.0, 1.0]})
    seconds = {NATIVE_FULL: [1.0, 1.0, 1.0], "pop 5 b1": [0.5, 0.25, 0.125]}
    result.timings = [{"arm": arm, "tokens": 24, "seconds": times} for arm, times in seconds.items()]
    ax = drawn(monkeypatch, plots.draw_frontier, result, tmp_path)
    labels = ax.get_legend_handles_labels()[1]
    assert [label.partition(",")[0] + label.partition(",")[2] for label in labels if "boundary" in label] == [
        "POP boundary 1",
        "POP distilled fit, boundary 1",
        "POP ridge fit, boundary 1",
    ]
    [bars] = ax.containers
    horizontal, vertical = (
        list(lines.get_segments()) for lines in sorted(bars[2], key=lambda c: np.ptp(c.get_segments()[0][:, 1]))
    )
    assert horizontal[0][:, 0].tolist() == [3, 6]
    assert len(vertical) == 3
    assert ax.yaxis.get_major_formatter()(0, None) == "full depth  0"


def test_a_line_joins_only_nested_plans(tmp_path, monkeypatch):
    plans = [Plan(6, omit) for omit in ((5,), (4, 5), (1, 2), (3, 4, 5), (1, 2, 3))]
    ax = drawn(monkeypatch, plots.draw_cost, made_result(plans, 24, {}), tmp_path)
    lines = [list(container[0].get_xdata()) for container in ax.containers]
    assert lines == [[1, 2, 3], [2, 3]]
    assert len(ax.get_legend_handles_labels()[1]) == 1


def test_fitted_plans_are_timed_beside_their_unfitted_form():
    model = shared("llama")
    fitted = pop_ext.fit(model, Plan(6, (4, 5)), models.batches(model), lambdas=[0.1])
    times = time_plans(model, [fitted], [16], repeats=3, fits=True)
    assert [timing["arm"] for timing in times] == [STOCK, NATIVE_FULL, "pop 4-5 b1", "pop-ridge 4-5 b1"]
    assert times[2]["flops"] == times[3]["flops"]
    assert [timing["arm"] for timing in time_plans(model, [fitted], [16], repeats=3)][2:] == ["pop 4-5 b1"]
