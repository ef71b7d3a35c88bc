"""A measured plan beside a checkpoint runs on the weights that were measured, and everybody agrees on that."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import pop_ext
import pytest
import torch
from model_folder import save_tiny_llama
from models import llama, tokens
from pop_ext import Plan, PlanCard
from pop_ext.cli.app import app
from pop_ext.hf.choice import plan_for
from pop_ext.plans.card import CardQuality
from pop_ext.plans.origin import origin_of, weights_hash
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

FULL, OMIT = (), (3, 4)
QUALITY = (CardQuality("loss", 0.01, 0.002, "nats a token", 48),)


def loaded(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with a tokenizer and a measured plan beside it."""
    save_tiny_llama(tmp_path)
    publish(tmp_path, Plan(6, OMIT, origin=origin_of(loaded(tmp_path), "by hand")))
    return tmp_path


def publish(folder, plan, **figures):
    model = loaded(folder)
    card = PlanCard.of(plan, **{"weights_hash": weights_hash(model), "quality": QUALITY, **figures})
    plan.save_pretrained(folder / "pop_ext", card=card)


def train(folder):
    """Change the weights of the checkpoint in ``folder`` a little, as training does; its plan stays."""
    model = loaded(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(folder)


# Which weights are the same


def test_a_checkpoint_has_one_hash_in_every_dtype():
    model = llama()
    expected = weights_hash(model)
    assert weights_hash(llama().to(torch.bfloat16)) == expected
    half = llama().to(torch.bfloat16)
    with torch.no_grad():
        half.model.norm.weight[0] = 1e-6  # rounds to 9.5e-7 in float16
    small = weights_hash(half)
    assert weights_hash(half.to(torch.float32)) == small
    assert weights_hash(half.to(torch.float16)) == small


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight"])
def test_other_values_names_and_shapes_are_other_weights(name):
    model = llama()
    expected = weights_hash(model)
    with torch.no_grad():
        model.get_parameter(name).mul_(1.02)
    assert weights_hash(model) != expected
    assert weights_hash(llama(vocab_size=264)) != expected


def test_a_hash_reads_compiled_models_alike(folder):
    assert plan_for(torch.compile(loaded(folder))).plan.omit == OMIT


# Who agrees


def command(*arguments):
    def omitted(folder):
        found = CliRunner().invoke(app, [str(word) for word in (*arguments, "--model", folder, "--json")])
        assert found.exit_code == 0, found.output
        report = json.loads(found.stdout)
        choice = report.get("model", report) if isinstance(report.get("model"), dict) else report
        if choice["plan_choice"]["unmeasured"]:
            warnings.warn(choice["plan_choice"]["reason"], pop_ext.NoPlanWarning, stacklevel=1)
            return FULL
        return tuple(choice["plan"]["omit"])

    return omitted


def generate(folder):
    (folder / "prompt.txt").write_text("def square(x):\n    return x * x\n" * 3)
    more = ("--continuation", 8, "--max-new-tokens", 2, "--repeats", 3)
    return command("generate", "--prompt-file", folder / "prompt.txt", *more)(folder)


def enabled(backend):
    def omitted(folder):
        model = pop_ext.enable(loaded(folder), backend=backend)
        return pop_ext.explain(model, input_ids=tokens(model, 1, 9), logits_to_keep=1).plan.omit

    return omitted


def oracle(folder):
    model = loaded(folder)
    ids = tokens(model, 1, 30)
    default, _ = pop_ext.reference.prefill(model, ids)
    full, _ = pop_ext.reference.prefill(model, ids, Plan(6, ()))
    return FULL if torch.equal(default, full) else OMIT


def harness(folder):
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    from pop_ext.lm_eval import PopLM

    return PopLM(str(folder)).plan.omit


WAYS: dict[str, Callable[[Any], tuple[int, ...]]] = {
    "enable": enabled("native"),
    "enable, reference": enabled("reference"),
    "load": lambda folder: pop_ext.load(loaded(folder)).plan.omit,
    "the oracle": oracle,
    "pop-ext info": command("info"),
    "pop-ext generate": generate,
    "PopLM": harness,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_runs_a_plan_measured_on_these_weights(folder, way, recwarn):
    assert WAYS[way](folder) == OMIT
    assert not [warning for warning in recwarn if warning.category is pop_ext.NoPlanWarning]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_runs_all_layers_of_weights_that_were_trained_further(folder, way):
    train(folder)
    with pytest.warns(pop_ext.NoPlanWarning, match="card: .*weights_hash .*got those of other weights") as caught:
        assert WAYS[way](folder) == FULL
    assert len(caught) == 1


@pytest.mark.parametrize("way", WAYS)
def test_every_way_runs_all_layers_beside_a_fit_on_other_weights(folder, way):
    other = llama(seed=1)
    other.config._name_or_path = str(folder)
    publish(folder, pop_ext.fit(other, Plan(6, OMIT), [torch.arange(40)[None]], lambdas=[1.0]))
    with pytest.warns(pop_ext.NoPlanWarning, match="expected a fit on the weights that the model has"):
        assert WAYS[way](folder) == FULL


@pytest.mark.parametrize("way", WAYS)
def test_every_way_runs_all_layers_beside_the_card_of_another_fit(folder, way):
    fits = [pop_ext.fit(loaded(folder), Plan(6, OMIT), [torch.arange(40)[None]], lambdas=[one]) for one in (1.0, 2.0)]
    publish(folder, fits[0])
    assert WAYS[way](folder) == OMIT
    fits[1].save(folder / "pop_ext" / "plan.json")
    with pytest.warns(pop_ext.NoPlanWarning, match="does not run .*got those of another fit"):
        assert WAYS[way](folder) == FULL


def test_eval_measures_the_preset_or_a_third_beside_a_plan_of_other_weights(folder):
    from pop_ext.cli import evaluate

    assert evaluate._plans(loaded(folder), [], None, None)[0].omit == OMIT
    train(folder)
    assert evaluate._plans(loaded(folder), [], None, None)[0].omit == (4, 5)


def test_a_measured_plan_runs_in_another_dtype(folder):
    assert plan_for(loaded(folder, torch.bfloat16)).plan.omit == OMIT


def test_a_card_that_knows_no_weights_is_no_permission(folder):
    publish(folder, Plan(6, OMIT, origin=origin_of(loaded(folder), "by hand")), weights_hash=None)
    chosen = plan_for(loaded(folder))
    assert (chosen.plan.omit, chosen.unmeasured) == (FULL, True)
    assert "got those of unknown weights" in chosen.reason


def test_offloaded_weights_are_no_known_weights(folder):
    model = loaded(folder)
    model.model.layers[0].to("meta")
    assert "got offloaded ones" in plan_for(model).reason


def test_a_plan_that_is_named_runs_on_any_weights(folder):
    train(folder)
    assert pop_ext.load(loaded(folder), folder / "pop_ext").plan.omit == OMIT
