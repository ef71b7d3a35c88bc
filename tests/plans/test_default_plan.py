"""The plan of a model when the caller names none: measured plans beside it, published presets, else every layer."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import huggingface_hub
import pop_ext
import pytest
from pop_ext.plans.card import CardQuality, PlanCard
from pop_ext.plans.default import choose_plan, default_plan, plan_to_measure
from pop_ext.plans.origin import Origin, config_hash, weights_hash
from pop_ext.plans.plan import Plan
from pop_ext.plans.presets import PRESETS

CONFIG = SimpleNamespace(
    model_type="llama",
    num_hidden_layers=6,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=100,
)
PLAN = Plan(6, (3, 4), boundary=2, min_tokens=9)
CARD = PlanCard(
    num_layers=6,
    omit=(3, 4),
    boundary=2,
    config_hash=config_hash(CONFIG),
    quality=(CardQuality("loss", 0.01, 0.002, "nats a token", 48),),
)


def config(**changes):
    return SimpleNamespace(**{**vars(CONFIG), **changes})


def write(folder, plan=PLAN, card=CARD):
    """Write a plan and its card beside a checkpoint; return the config of the checkpoint."""
    (folder / "pop_ext").mkdir(parents=True)
    plan.save(folder / "pop_ext" / "plan.json")
    if card is not None:
        (folder / "pop_ext" / "card.json").write_text(card if isinstance(card, str) else card.to_json())
    return config(_name_or_path=str(folder))


def shape_of(name, **more):
    return SimpleNamespace(**PRESETS[name].config, **more)


def named(name):
    """Return the config of a checkpoint that was loaded by its hub id."""
    return shape_of(name, _name_or_path=name)


def test_a_measured_plan_beside_the_checkpoint_runs(tmp_path):
    chosen = default_plan(write(tmp_path))
    assert (chosen.plan, chosen.unmeasured) == (PLAN, False)
    assert str(tmp_path) in chosen.reason


@pytest.mark.parametrize(
    ("why", "plan", "card"),
    [
        ("card.json: expected measured quality figures, got none", PLAN, None),
        ("expected measured quality figures, got none", PLAN, dataclasses.replace(CARD, quality=())),
        ("expected config_hash .*, the model's, got 0000", PLAN, dataclasses.replace(CARD, config_hash="0" * 16)),
        ("card: expected the figures of Plan", PLAN.replace(boundary=1), CARD),
        ("card: expected the figures of Plan", PLAN, dataclasses.replace(CARD, fit="ridge")),
        (
            "expected a plan of 6 layers, got one of 7",
            Plan(7, (3, 4), boundary=2),
            dataclasses.replace(CARD, num_layers=7),
        ),
        ("expected one made with a model of config hash", PLAN.replace(origin=Origin("other", "1" * 16)), CARD),
        ("card.json: card: expected JSON", PLAN, "{"),
        ("card.quality.value: expected int or float, got str", PLAN, CARD.to_json().replace("0.01", '"little"')),
    ],
)
def test_an_unmeasured_or_foreign_plan_beside_the_checkpoint_does_not_run(tmp_path, why, plan, card):
    chosen = default_plan(write(tmp_path, plan, card))
    assert (chosen.plan, chosen.unmeasured) == (Plan(6, ()), True)
    assert re.match(rf"the plan beside its checkpoint does not run \(.*{why}", chosen.reason), chosen.reason


def test_a_broken_plan_file_does_not_run(tmp_path):
    there = write(tmp_path)
    (tmp_path / "pop_ext" / "plan.json").write_text("no plan")
    assert default_plan(there).plan == Plan(6, ())


def test_a_hub_name_is_looked_up_in_the_local_cache_at_its_commit(tmp_path, monkeypatch):
    write(tmp_path)
    asked = []

    def cached(repo_id, filename, cache_dir=None, revision=None, repo_type=None):
        asked.append((repo_id, filename, revision))
        return str(tmp_path / filename) if repo_id == "someone/model" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    there = config(_name_or_path="someone/model", _commit_hash="abc")
    assert default_plan(there).plan == PLAN
    assert default_plan(config(_name_or_path="someone/other")).plan == Plan(6, ())
    assert default_plan(config(), "someone/model", "v1").plan == PLAN
    assert asked == [
        ("someone/model", "pop_ext/plan.json", "abc"),
        ("someone/other", "pop_ext/plan.json", None),
        ("someone/model", "pop_ext/plan.json", "v1"),
    ]


def test_a_name_that_is_neither_a_folder_nor_a_hub_name_has_no_plan():
    assert default_plan(config(_name_or_path="/nowhere/to be found")).unmeasured


def test_only_published_presets_run_by_themselves():
    published = {name for name, preset in PRESETS.items() if not default_plan(named(name)).unmeasured}
    assert published == {
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Llama-3.1-8B-Instruct",
        "Qwen/Qwen3-VL-8B-Instruct",
        "Qwen/Qwen3-VL-8B-Thinking",
        "google/gemma-3-12b-pt",
        "google/gemma-3-12b-it",
    }
    for name in published:
        assert default_plan(named(name)).plan == PRESETS[name].plan
    small = default_plan(named("meta-llama/Llama-3.2-1B"))
    assert (small.plan, small.unmeasured) == (Plan(16, ()), True)


LLAMA = "meta-llama/Llama-3.1-8B"
CACHE = "/home/me/.cache/huggingface/hub"


@pytest.mark.parametrize(
    "name",
    [
        LLAMA,
        "Meta-Llama/llama-3.1-8b-instruct",
        f"{CACHE}/models--meta-llama--Llama-3.1-8B/snapshots/d04e592bb4f6aa9cfee91e2e20afa771667e1d4b",
    ],
)
def test_a_published_preset_runs_on_the_checkpoint_that_it_is_published_for(name):
    chosen = default_plan(shape_of(LLAMA, _name_or_path=name))
    assert (chosen.plan, chosen.unmeasured) == (Plan.last(32, 10), False)
    assert default_plan(shape_of(LLAMA), name).plan == Plan.last(32, 10)


@pytest.mark.parametrize(
    "name",
    [
        None,
        "",
        "someone/Llama-3.1-8B",
        "Llama-3.1-8B",
        "meta-llama/Llama-3.1-8B-tuned",
        "/home/me/meta-llama/Llama-3.1-8B",
        f"{CACHE}/models--someone--Llama-3.1-8B/snapshots/d04e592b",
        f"{CACHE}/models--meta-llama--Llama-3.1-8B/tuned/d04e592b",
        "meta-llama/Llama-3.2-1B",
    ],
)
def test_a_model_of_a_published_shape_runs_all_layers_unless_it_is_that_checkpoint(name):
    chosen = default_plan(shape_of(LLAMA, _name_or_path=name))
    assert (chosen.plan, chosen.unmeasured) == (Plan(32, ()), True)
    assert f"is published for the weights of {LLAMA}, {LLAMA}-Instruct" in chosen.reason
    assert 'plan="third" or plan="preset" prunes' in chosen.advice("Llama")
    assert plan_to_measure(shape_of(LLAMA, _name_or_path=name)).plan == Plan.last(32, 10)


def test_a_checkpoint_with_a_known_name_and_other_weights_runs_all_layers(tmp_path, monkeypatch):
    assert default_plan(named(LLAMA), adapted=True).plan == Plan(32, ())

    def refuse(plan):
        raise ValueError("other weights")

    card = dataclasses.replace(CARD, num_layers=32, omit=(30,), boundary=1, config_hash=config_hash(shape_of(LLAMA)))
    write(tmp_path, Plan(32, (30,)), card)
    monkeypatch.setattr("pop_ext.plans.default.cached_folder", lambda *_: tmp_path / "pop_ext")
    assert default_plan(named(LLAMA)).plan == Plan(32, (30,))
    chosen = default_plan(named(LLAMA), check=refuse)
    assert (chosen.plan, chosen.reason) == (Plan(32, ()), "the plan beside its checkpoint does not run (other weights)")


def test_the_advice_names_a_preset_only_where_there_is_one():
    assert 'that price. plan="third" prunes without knowing' in default_plan(CONFIG).advice("Llama")
    assert "preset" not in default_plan(CONFIG).advice("Llama")
    assert 'plan="third" or plan="preset" prunes' in default_plan(named("Qwen/Qwen3-8B")).advice("Qwen3")


def test_a_measured_plan_goes_before_a_published_preset(tmp_path):
    shape = shape_of("meta-llama/Llama-3.1-8B")
    plan = Plan(32, (30,))
    card = dataclasses.replace(CARD, num_layers=32, omit=(30,), boundary=1, config_hash=config_hash(shape))
    write(tmp_path, plan, card)
    shape._name_or_path = str(tmp_path)
    assert default_plan(shape).plan == plan


def test_words_and_paths_name_plans(tmp_path):
    assert choose_plan("third", CONFIG).plan == Plan(6, (4, 5))
    assert choose_plan("preset", shape_of("meta-llama/Llama-3.2-1B")).plan == Plan.last(16)
    PLAN.save(tmp_path / "plan.json")
    for path in (tmp_path, str(tmp_path), tmp_path / "plan.json", str(tmp_path / "plan.json")):
        assert choose_plan(path, CONFIG).plan == PLAN
    with pytest.raises(ValueError, match=r"plan: expected a model that has a preset .* got llama with 6 layers"):
        choose_plan("preset", CONFIG)
    with pytest.raises(ValueError, match=r'plan: expected a pop_ext\.Plan, "third".* got \'someone/plan\''):
        choose_plan("someone/plan", CONFIG)


def test_a_plan_to_measure_omits_layers_even_if_its_cost_is_unknown(tmp_path):
    third, preset = plan_to_measure(CONFIG), plan_to_measure(shape_of("Qwen/Qwen3-8B"))
    assert (third.plan, third.unmeasured) == (Plan(6, (4, 5)), True)
    assert (preset.plan, preset.unmeasured) == (Plan.last(36), True)
    assert "Qwen/Qwen3-8B" in preset.reason
    assert plan_to_measure(write(tmp_path)).plan == PLAN


def test_enable_takes_the_plan_beside_the_checkpoint_silently(tmp_path, recwarn):
    from model_folder import save_tiny_llama
    from transformers import AutoModelForCausalLM

    save_tiny_llama(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    plan = Plan.last(6, 1)
    hashes = {"config_hash": config_hash(model.config), "weights_hash": weights_hash(model)}
    write(tmp_path, plan, dataclasses.replace(CARD, omit=plan.omit, boundary=1, **hashes))
    pop_ext.enable(model)
    assert pop_ext.explain(model, input_ids=model.dummy_inputs["input_ids"], logits_to_keep=1).plan == plan
    assert not [warning for warning in recwarn if warning.category is pop_ext.NoPlanWarning]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_plan_fitted_on_other_weights_beside_the_checkpoint_does_not_run(tmp_path, backend):
    import torch
    from models import llama
    from pop_ext.plans.projections import FitMismatch

    model = llama(seed=1)
    plan = pop_ext.fit(llama(), Plan(6, (3, 4)), [torch.arange(40)[None]], lambdas=[1.0])
    plan.save_pretrained(tmp_path / "pop_ext", card=PlanCard.of(plan, quality=CARD.quality))
    model.config._name_or_path = str(tmp_path)
    with pytest.warns(pop_ext.NoPlanWarning, match="does not run .*fit on the weights that the model has"):
        pop_ext.enable(model, backend=backend)
    assert pop_ext.explain(model, input_ids=model.dummy_inputs["input_ids"], logits_to_keep=1).plan == Plan(6, ())
    with pytest.raises(FitMismatch):
        pop_ext.enable(model, tmp_path / "pop_ext", backend=backend)
