"""pop_ext.evaluation: arms, measures, means with errors, resumed runs."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import models
import pop_ext
import pytest
import torch
from evaluated_prompts import PLAN, prompt_sets
from models import shared, tokens
from pop_ext import Plan
from pop_ext.evaluation import (
    Evaluation,
    PromptSet,
    evaluate,
    make_arms,
)
from pop_ext.evaluation import run as running
from pop_ext.evaluation.arms import Arm
from pop_ext.evaluation.results import SCHEMA, mean_of
from pop_ext.plans.origin import origin_of
from transformers import GenerationConfig

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


@pytest.mark.parametrize("backend", ["native", "portable", "reference"])
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


@pytest.mark.parametrize("products", ["fp8", pytest.param("int8", marks=pytest.mark.cpu)])
def test_arms_of_8_bits_prefill_in_8_bits_and_decode_as_stock(products):
    model = shared("llama")
    sets = prompt_sets(model)
    full, pop, ridge = f"full-{products}", f"pop-{products}", f"pop-ridge-{products}"
    fitted = pop_ext.fit(model, PLAN, models.batches(model, 6, 1, 24), lambdas=[0.01])
    kinds = [full, pop, f"pop-fitted-{products}"]
    result = evaluate(model, sets, [PLAN, PLAN.replace(boundary=3), fitted], kinds=kinds, greedy_tokens=0)
    names = [cell["arm"] for cell in result.cells if cell["set"] == 0]
    assert names == ["full", full, f"{pop} 1,4-5 b2", f"{pop} 1,4-5 b3", f"{ridge} 1,4-5 b2"]
    for name, plan in ((full, Plan(6, ())), (f"{pop} 1,4-5 b2", PLAN), (f"{ridge} 1,4-5 b2", fitted)):
        native = pop_ext.load(model, plan, **{products: True})
        losses = result.find(0, name)["samples"]["loss"]
        # Prompts of one batch, as in the arm: a value near the middle of two 8-bit ones may be rounded to the other one
        # if products of other numbers of rows differ in their last bits.
        contexts, continuations = (torch.stack(part) for part in zip(*sets[0].pairs, strict=True))
        out = native.prefill(contexts)
        rows = [out.logits[:, -1]]
        for token in continuations.T[:-1]:
            with torch.no_grad():
                rows.append(model(token[:, None], past_key_values=out.past_key_values).logits[:, -1])
        found = torch.stack(rows, 1).log_softmax(-1).gather(2, continuations[..., None])
        assert losses == pytest.approx((-found.mean((1, 2))).tolist(), abs=1e-4)


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


def test_a_model_without_native_form_runs_portably(monkeypatch):
    model = models.hyperclovax()
    runs = {}
    for backend in ("portable", "reference"):
        if backend == "reference":
            monkeypatch.setattr(running, "backend_of", lambda model: "reference")
        result = evaluate(model, prompt_sets(model, 2), [Plan(6, (4, 5))], kinds=["pop"], greedy_tokens=0)
        assert result.facts["backend"] == backend
        runs[backend] = result.find(0, "pop 4-5 b1")["samples"]["loss"]
    assert runs["portable"] == pytest.approx(runs["reference"], abs=1e-5)


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
