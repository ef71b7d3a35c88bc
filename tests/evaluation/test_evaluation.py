"""pop_ext.evaluation: arms, measures, means with errors, resumed runs, timing and figures."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import models
import numpy as np
import pop_ext
import pytest
import torch
from models import shared, tokens
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
from pop_ext.evaluation import run as running
from pop_ext.evaluation.arms import Arm
from pop_ext.evaluation.results import SCHEMA, mean_of
from pop_ext.evaluation.timing import NATIVE_FULL, STOCK, speedup
from pop_ext.plans.origin import origin_of
from transformers import GenerationConfig

PLAN = Plan(6, (1, 4, 5), boundary=2)


def prompt_sets(model, prompts=3):
    pairs = [(tokens(model, 24, seed=i), tokens(model, 6, seed=20 + i)) for i in range(prompts)]
    return [PromptSet("text", 24, tuple(pairs)), PromptSet("recall", 24, tuple(pairs[:2]))]


# Arms


def test_arms_are_each_kind_of_each_plan_once():
    plans = [Plan(6, (4, 5), boundary) for boundary in (1, 16)]
    names = [arm.name for arm in make_arms(plans)]
    assert names == [
        "full",
        "pop 4-5 b1",
        "pop 4-5 b16",
        "no-kv 4-5 b1",
        "no-kv 4-5 b16",
        "no-boundary 4-5",
        "dropped 4-5",
    ]
    assert [arm.name for arm in make_arms([Plan(6, (1, 4, 5), min_tokens=9)], ["pop"])] == ["full", "pop 1,4-5 b1"]
    assert make_arms([Plan(6, (1,), min_tokens=9)], ["pop"])[1].plan.min_tokens == 0


def test_a_fitted_plan_has_arms_with_and_without_its_fit():
    model = shared("llama")
    ids = torch.randint(0, model.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(2))
    fitted = pop_ext.fit(model, PLAN, [ids], lambdas=[0.1])
    arms = {arm.kind: arm for arm in make_arms([fitted])}
    assert arms["pop-fitted"].plan == fitted
    assert arms["pop"].plan == PLAN
    assert arms["pop"].plan.origin.fit is None
    result = evaluate(model, prompt_sets(model), [fitted])
    losses = {kind: result.find(0, arm.name)["samples"]["loss"] for kind, arm in arms.items()}
    assert losses["pop-fitted"] != losses["pop"] != losses["full"]


def test_resume_measures_a_new_fit_again(tmp_path):
    model, path = shared("llama"), tmp_path / "evaluation.json"
    ids = torch.randint(0, model.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(2))
    first, second = (pop_ext.fit(model, PLAN, [ids], lambdas=[ridge]) for ridge in (0.1, 0.01))
    before = evaluate(model, prompt_sets(model), [first], resume=path)
    after = evaluate(model, prompt_sets(model), [second], resume=path)
    assert len(after.cells) == len(before.cells)
    fresh = evaluate(model, prompt_sets(model), [second])
    name = next(arm.name for arm in make_arms([second]) if arm.kind == "pop-fitted")
    assert after.find(0, name)["samples"] == fresh.find(0, name)["samples"] != before.find(0, name)["samples"]


def with_method(plan, method):
    """Return a plan with its fit said to be by another method, and with other values."""
    report = dataclasses.replace(plan.projections.report, method=method)
    matrices = {layer: matrix * 1.001 for layer, matrix in plan.projections.matrices.items()}
    return plan.replace(projections=dataclasses.replace(plan.projections, report=report, matrices=matrices))


def test_fits_of_the_same_layers_are_arms_named_by_their_methods():
    model = shared("llama")
    ids = torch.randint(0, model.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(2))
    first, second = (pop_ext.fit(model, PLAN, [ids], lambdas=[ridge]) for ridge in (0.1, 0.01))
    distilled = with_method(first, "distill")
    arms = make_arms([first, distilled, second, first])
    tag = second.projections.digest[:6]
    fitted = [arm for arm in arms if arm.kind == "pop-fitted"]
    assert [arm.name for arm in fitted] == [
        "pop-ridge 1,4-5 b2",
        "pop-distill 1,4-5 b2",
        f"pop-ridge 1,4-5 b2 {tag}",
    ]
    assert [arm.fit for arm in fitted] == [plan.projections.digest for plan in (first, distilled, second)]
    result = evaluate(model, prompt_sets(model)[1:], [first, second], kinds=["pop-fitted"])
    losses = [cell["samples"]["loss"] for cell in result.cells]
    assert len({tuple(values) for values in losses}) == 3
    assert [row["method"] for row in result.summary()] == [None, "ridge", "ridge"]


def test_results_from_before_there_were_methods_are_of_ridge_fits(tmp_path):
    result = Evaluation({"schema": SCHEMA, "num_layers": 6, "sets": []})
    result.add(0, Arm("pop-fitted", PLAN), {"loss": [1.0]})
    del result.cells[0]["method"]
    result.save(tmp_path / "e.json")
    [cell] = Evaluation.load(tmp_path / "e.json").cells
    assert (cell["arm"], cell["method"]) == ("pop-ridge 1,4-5 b2", "ridge")
    assert not Evaluation({}, [cell]).has(0, Arm("pop-fitted", PLAN))  # kl was not measured


@pytest.mark.parametrize(
    ("plans", "kinds", "text"),
    [
        ([], ["pop"], r"plans: expected at least one, all of one depth, got depths \[\]"),
        ([Plan(6, ()), Plan(5, ())], ["pop"], r"got depths \[5, 6\]"),
        ([Plan(6, ())], ["full", "none"], "kinds: expected of full, pop, .*, got 'none'"),
    ],
)
def test_make_arms_refuses_bad_plans_and_kinds(plans, kinds, text):
    with pytest.raises(ValueError, match=text):
        make_arms(plans, kinds)


# Measures


def test_losses_match_score_and_agreement_matches_generate():
    model = shared("llama")
    sets = prompt_sets(model)
    told = []
    result = evaluate(model, sets, [PLAN], greedy_tokens=5, progress=lambda *done: told.append(done))
    assert told == [(i, 10) for i in range(1, 11)]
    full, pruned = (result.find(0, name)["samples"] for name in ("full", "pop 1,4-5 b2"))
    for index, (context, continuation) in enumerate(sets[0].pairs):
        with torch.no_grad():
            rows = model(torch.cat([context, continuation])[None]).logits[0, 23:-1].log_softmax(-1)
        assert full["loss"][index] == pytest.approx(-float(rows.gather(1, continuation[:, None]).mean()), abs=1e-4)
        assert full["first"][index] == pytest.approx(-float(rows[0, continuation[0]]), abs=1e-4)
        how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        stock = model.generate(context[None], **how)[0, 24:].tolist()
        with pop_ext.enabled(model, PLAN, strict=True):
            [score] = pop_ext.score(model, [context], [continuation])
            made = model.generate(context[None], **how)[0, 24:].tolist()
        assert pruned["loss"][index] == pytest.approx(-score.log_likelihood / 6, abs=1e-4)
        leading = next((i for i, (a, b) in enumerate(zip(stock, made, strict=True)) if a != b), 5)
        assert pruned["agreement"][index] == pytest.approx(leading / 5)
    assert full["agreement"] == [1.0] * 3
    assert result.find(1, "full")["samples"].keys() == {"loss", "first", "kl", "exact"}


def test_kl_is_the_divergence_from_the_full_model_over_the_continuation():
    model = shared("llama")
    sets = prompt_sets(model)
    result = evaluate(model, sets, [PLAN], kinds=["pop"], greedy_tokens=0)
    full, pruned = (result.find(0, name)["samples"]["kl"] for name in ("full", "pop 1,4-5 b2"))
    assert full == [0.0] * 3
    for index, (context, continuation) in enumerate(sets[0].pairs):
        ids = torch.cat([context, continuation[:-1]])[None]
        with torch.no_grad():
            teacher = model(ids).logits[0, 23:].double().log_softmax(-1)
        logits, _ = pop_ext.reference.prefill(model, ids, PLAN, 6, boundary=7)
        student = logits[0].double().log_softmax(-1)
        wanted = float((teacher.exp() * (teacher - student)).sum(-1).mean())
        assert wanted > 0.01
        assert pruned[index] == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_second_turn_is_prefilled_over_the_cache_of_the_first(backend, monkeypatch):
    model = shared("llama")
    monkeypatch.setattr(running, "backend_of", lambda model: backend)
    turns = [(tokens(model, n, seed=i), tokens(model, 4, seed=9 + i)) for i, n in enumerate((24, 31))]
    pairs = [(tokens(model, 12 + i, seed=30 + i), tokens(model, 3 + i, seed=40 + i)) for i in range(2)]
    dialogues = PromptSet("second turn", 24, tuple(pairs), tuple(turns))
    kinds = ["pop", "no-kv", "dropped"]
    result = evaluate(model, [dialogues], [PLAN], kinds=kinds)
    assert [cell["arm"] for cell in result.cells] == ["full", "pop 1,4-5 b2", "dropped 1,4-5"]
    full, pruned = (result.find(0, name)["samples"] for name in ("full", "pop 1,4-5 b2"))
    for index, ((prompt, said), (new, value)) in enumerate(zip(turns, pairs, strict=True)):
        whole = torch.cat([prompt, said, new, value])[None]
        rows = {}
        with torch.no_grad():
            rows["full"] = model(whole).logits[0, -len(value) - 1 : -1]
            with pop_ext.enabled(model, PLAN, strict=True):
                cache = model(prompt[None], logits_to_keep=1).past_key_values
                for token in said:
                    cache = model(token.view(1, 1), past_key_values=cache).past_key_values
                out = model(new[None], past_key_values=cache, logits_to_keep=1)
                assert pop_ext.last_call(model).backend == "native"
                made = [out.logits[0, -1]]
                for token in value[:-1]:
                    out = model(token.view(1, 1), past_key_values=out.past_key_values)
                    made.append(out.logits[0, -1])
            rows["pop"] = torch.stack(made)
        for found, key in ((full, "full"), (pruned, "pop")):
            loss = -rows[key].log_softmax(-1).gather(1, value[:, None]).mean()
            assert found["loss"][index] == pytest.approx(float(loss), abs=2e-4)
        assert abs(full["loss"][index] - pruned["loss"][index]) > 1e-2
    assert set(pruned) == {"loss", "first", "kl", "exact"}


def test_fp8_arms_prefill_in_fp8_and_decode_as_stock():
    model = shared("llama")
    sets = prompt_sets(model)
    result = evaluate(model, sets, [PLAN, PLAN.replace(boundary=3)], kinds=["full-fp8", "pop-fp8"], greedy_tokens=0)
    names = [cell["arm"] for cell in result.cells if cell["set"] == 0]
    assert names == ["full", "full-fp8", "pop-fp8 1,4-5 b2", "pop-fp8 1,4-5 b3"]
    for name, plan in (("full-fp8", Plan(6, ())), ("pop-fp8 1,4-5 b2", PLAN)):
        native = pop_ext.load(model, plan, fp8=True)
        losses = result.find(0, name)["samples"]["loss"]
        for loss, (context, continuation) in zip(losses, sets[0].pairs, strict=True):
            out = native.prefill(context[None])
            rows = [out.logits[0, -1]]
            for token in continuation[:-1]:
                with torch.no_grad():
                    rows.append(model(token.view(1, 1), past_key_values=out.past_key_values).logits[0, -1])
            found = torch.stack(rows).log_softmax(-1).gather(1, continuation[:, None])
            assert loss == pytest.approx(-float(found.mean()), abs=2e-3)


def test_greedy_ignores_the_checkpoints_generation_config(monkeypatch):
    model = shared("llama")
    own = GenerationConfig(eos_token_id=2, repetition_penalty=1.3, suppress_tokens=[5], min_new_tokens=2)
    monkeypatch.setattr(model, "generation_config", own)
    sets = prompt_sets(model)[:1]
    greedy = running._greedy(model, sets[0], 6).pairs[0][1]
    ids = sets[0].pairs[0][0]
    for token in greedy:
        with torch.no_grad():
            assert int(model(ids[None]).logits[0, -1].argmax()) == int(token)
        ids = torch.cat([ids, token[None]])
    assert model.generation_config is own
    result = evaluate(model, sets, [Plan(6, (5,))], kinds=["pop"], greedy_tokens=8)
    assert result.find(0, "pop 5 b1")["samples"]["agreement"] == [1.0] * 3


def test_summary_has_paired_differences_with_standard_errors():
    model = shared("llama")
    result = evaluate(model, prompt_sets(model), [PLAN], kinds=["pop"], greedy_tokens=5)
    rows = {(row["set"], row["kind"]): row for row in result.summary()}
    full, pruned = (result.find(0, name)["samples"]["loss"] for name in ("full", "pop 1,4-5 b2"))
    differences = torch.tensor(pruned).double() - torch.tensor(full).double()
    found = rows["text", "pop"]["delta_loss"]
    assert found.value == pytest.approx(float(differences.mean()), abs=1e-6)
    assert found.error == pytest.approx(float(differences.std() / math.sqrt(3)), abs=1e-6)
    assert rows["text", "full"]["delta_loss"] == (0.0, 0.0)
    agreement = result.find(0, "pop 1,4-5 b2")["samples"]["agreement"]
    assert rows["text", "pop"]["match"].value == pytest.approx(sum(share == 1 for share in agreement) / 3)
    assert mean_of([2.0]).value == 2.0
    assert math.isnan(mean_of([2.0]).error)


@pytest.mark.parametrize("kinds", [["dropped", "no-kv"], ["pop"]])
def test_plans_of_other_models_are_refused_for_every_kind(kinds):
    model = shared("llama")
    other = Plan(6, (5,), origin=origin_of(shared("qwen3"), "by hand"))
    with pytest.raises(ValueError, match="plan: expected one made with a model of config hash"):
        evaluate(model, prompt_sets(model), [Plan(6, (5,)), other], kinds=kinds)
    with pytest.raises(ValueError, match="plan: expected num_layers=6 like the model, got 5"):
        evaluate(model, prompt_sets(model), [Plan(5, (4,))], kinds=kinds)


def test_a_model_without_native_form_uses_the_reference():
    model = models.granite()
    result = evaluate(model, prompt_sets(model, 2), [Plan(6, (4, 5))], kinds=["pop"], greedy_tokens=0)
    assert result.facts["backend"] == "reference"
    assert result.find(0, "pop 4-5 b1")["samples"]["loss"][0] > 0


def test_a_stopped_evaluation_resumes_where_it_stopped(tmp_path, monkeypatch):
    model = shared("llama")
    sets, path = prompt_sets(model), tmp_path / "deep" / "evaluation.json"
    whole = evaluate(model, sets, [PLAN], greedy_tokens=5)
    measured = []
    original = running._measure

    def stopping(model, arm, *rest):
        if len(measured) == 4:
            raise RuntimeError("planted")
        measured.append(arm.name)
        return original(model, arm, *rest)

    monkeypatch.setattr(running, "_measure", stopping)
    with pytest.raises(RuntimeError, match="planted"):
        evaluate(model, sets, [PLAN], greedy_tokens=5, resume=path)
    monkeypatch.setattr(
        running, "_measure", lambda model, arm, *rest: measured.append("") or original(model, arm, *rest)
    )
    found = evaluate(model, sets, [PLAN], greedy_tokens=5, resume=path)
    assert len(measured) == 10
    assert found.cells == whole.cells == Evaluation.load(path).cells
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"evaluation.json: expected an evaluation as Evaluation.save writes it"):
        evaluate(model, sets, [PLAN], resume=path)


def test_resume_names_the_fact_that_differs(tmp_path):
    model, path = shared("llama"), tmp_path / "evaluation.json"
    sets, how = prompt_sets(model), {"kinds": ["pop"], "resume": path}
    evaluate(model, sets, [PLAN], greedy_tokens=2, **how)
    with pytest.raises(ValueError, match=r"greedy tokens \(--greedy\) 4 in .*evaluation.json, got 2; .*another file"):
        evaluate(model, sets, [PLAN], greedy_tokens=4, **how)
    with pytest.raises(ValueError, match=r"--samples.* 3 text of 24 tokens in .*, got 3 text of 24 tokens, 2 recall"):
        evaluate(model, sets[:1], [PLAN], greedy_tokens=2, **how)
    others = [PromptSet(s.kind, s.length, s.pairs[::-1]) for s in sets]
    with pytest.raises(ValueError, match=r"texts and continuations \(--text, --continuation\) of digest"):
        evaluate(model, others, [PLAN], greedy_tokens=2, **how)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.model.layers[1].self_attn.v_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"expected weights of hash .* in .*evaluation.json, got .*another file"):
        evaluate(tuned, sets, [PLAN], greedy_tokens=2, **how)
    with pytest.raises(ValueError, match=r"expected dtype \(--dtype\) bfloat16 in .*, got float32"):
        evaluate(copy.deepcopy(model).bfloat16(), sets, [PLAN], greedy_tokens=2, **how)
    with pytest.raises(ValueError, match="expected a model of config hash"):
        evaluate(models.qwen3(), sets, [PLAN], greedy_tokens=2, **how)


def test_a_saved_evaluation_states_versions_sets_and_plans(tmp_path):
    model = shared("llama")
    result = evaluate(model, prompt_sets(model), [PLAN], kinds=["pop"], greedy_tokens=0)
    result.save(tmp_path / "e.json")
    members = json.loads((tmp_path / "e.json").read_text())
    assert members["facts"]["environment"]["torch"] == torch.__version__
    assert members["facts"]["sets"] == [
        {"kind": "text", "length": 24, "prompts": 3},
        {"kind": "recall", "length": 24, "prompts": 2},
    ]
    plan = members["cells"][1]["plan"]
    assert (plan["omit"], plan["boundary"]) == ([1, 4, 5], 2)


def test_infinite_samples_are_saved_as_null_and_read_as_nan(tmp_path):
    result = Evaluation({"schema": SCHEMA, "sets": []})
    result.add(0, make_arms([PLAN])[0], {"loss": [math.nan, 1.5, math.inf]})
    result.save(tmp_path / "e.json")
    text = (tmp_path / "e.json").read_text()
    assert '"loss": [null, 1.5, null]' in text
    loss = Evaluation.load(tmp_path / "e.json").cells[0]["samples"]["loss"]
    assert [math.isnan(value) for value in loss] == [True, False, True]


# Timing and figures


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


# States of the full model, reused


@pytest.mark.parametrize("plan", [PLAN, Plan(6, (3, 4, 5), boundary=3), Plan(6, (0,), boundary=40)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_arms_from_states_measure_what_prefills_measure(family, plan):
    model = shared(family)
    fitted = pop_ext.fit(model, plan.replace(boundary=1), models.batches(model), lambdas=[0.1]).replace(
        boundary=plan.boundary
    )
    sets = prompt_sets(model)
    first = tuple((tokens(model, 20, seed=70 + i), tokens(model, 4, seed=80 + i)) for i in range(3))
    sets.append(PromptSet("second turn", 20, sets[0].pairs, first))
    apart = evaluate(model, sets, [fitted], greedy_tokens=4)
    reused = evaluate(model, sets, [fitted], greedy_tokens=4, reuse_states=True)
    assert reused.facts["backend"] == "reference"
    assert [(cell["set"], cell["arm"]) for cell in reused.cells] == [(cell["set"], cell["arm"]) for cell in apart.cells]
    for cell, other in zip(reused.cells, apart.cells, strict=True):
        for name, samples in cell["samples"].items():
            assert samples == pytest.approx(other["samples"][name], abs=2e-4), (cell["arm"], name)


def test_reused_states_take_one_forward_of_the_full_model_per_set_of_prompts():
    model, forwards = copy.deepcopy(shared("llama")), []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: forwards.append(1))
    plans = [Plan(6, tuple(range(start, 6)), boundary) for start in (2, 3, 4) for boundary in (1, 8)]
    sets = prompt_sets(model)
    first = tuple((tokens(model, 20, seed=70 + i), tokens(model, 4, seed=80 + i)) for i in range(3))
    sets.append(PromptSet("second turn", 20, sets[0].pairs, first))
    evaluate(model, sets, plans, kinds=["pop"], greedy_tokens=0, reuse_states=True)
    assert len(forwards) == 3
