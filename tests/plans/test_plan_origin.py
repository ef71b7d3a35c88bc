"""The origin of a plan: copies and files keep it, equality ignores it, and models of another config refuse it."""

from __future__ import annotations

import copy
import json
import pickle

import pop_ext
import pytest
import torch
from models import FAMILIES, llama, shared, tokens
from pop_ext import Plan, reference
from pop_ext.plans.origin import Origin, config_hash, origin_of, public_name

ORIGIN = Origin("some/model", "0123456789abcdef", "gates, contiguous", 200)


def made_with(model, omit=(4, 5)):
    return Plan(6, omit, origin=origin_of(model, "gates, contiguous", 8))


def test_an_origin_travels_with_its_plan(tmp_path):
    plan = Plan(6, (1, 2), 3, 4, origin=ORIGIN)
    plan.save(tmp_path / "plan.json")
    for twin in (
        Plan.from_json(plan.to_json()),
        Plan.load(tmp_path / "plan.json"),
        pickle.loads(pickle.dumps(plan)),
        copy.deepcopy(plan),
        copy.copy(plan),
    ):
        assert twin == plan
        assert twin.origin == ORIGIN
    members = json.loads(plan.to_json())
    assert members["origin"] == {
        "model": "some/model",
        "config_hash": "0123456789abcdef",
        "method": "gates, contiguous",
        "samples": 200,
    }
    assert "origin" not in json.loads(Plan(6, (1, 2)).to_json())


def test_equality_ignores_the_origin():
    plan = Plan(6, (1, 2), origin=ORIGIN)
    assert plan == Plan(6, (1, 2))
    assert hash(plan) == hash(Plan(6, (1, 2)))
    assert eval(repr(plan)) == plan


def test_replacing_omit_keeps_only_the_model_of_the_origin():
    plan = Plan(6, (1, 2), origin=ORIGIN)
    assert plan.replace(boundary=32).origin == ORIGIN
    assert plan.replace(omit=(2, 3)).origin == Origin("some/model", "0123456789abcdef")
    assert plan.replace(omit=(2, 3), origin=None).origin is None


@pytest.mark.parametrize(
    ("origin", "text"),
    [
        ([], "origin: expected an object, got list"),
        ({"model": 3}, "origin.model: expected str, got int 3"),
        ({"samples": True}, "origin.samples: expected int, got bool True"),
        ({"config_hash": 1.5}, "origin.config_hash: expected str, got float 1.5"),
    ],
)
def test_a_malformed_origin_is_refused_with_its_member(origin, text):
    members = {"num_layers": 6, "omit": [1], "origin": origin}
    with pytest.raises(ValueError, match="origin") as error:
        Plan.from_json(json.dumps(members))
    assert str(error.value) == text


def test_origin_must_have_its_type_and_no_unknown_members():
    with pytest.raises(TypeError, match=r"origin: expected a pop_ext.plans.origin.Origin, got dict"):
        Plan(6, (1,), origin={})
    unknown = {"num_layers": 6, "omit": [1], "origin": {"method": "by hand", "config_hsh": "0" * 16}}
    with pytest.raises(ValueError, match=r"^origin: 'config_hsh': expected no such member, got '0000000000000000'$"):
        Plan.from_json(json.dumps(unknown))


# The config hash


@pytest.mark.parametrize("change", [dict(hidden=64), dict(layers=5), dict(vocab=264), dict(heads=8), dict(kv_heads=1)])
def test_config_hash_depends_on_the_shape(change):
    assert config_hash(llama(**change).config) != config_hash(shared("llama").config)


def test_config_hash_ignores_path_dtype_rope_and_special_tokens():
    config = copy.deepcopy(shared("llama").config)
    config._name_or_path, config.rope_parameters, config.eos_token_id = "elsewhere", {"rope_type": "default"}, 3
    config.dtype = torch.bfloat16
    assert config_hash(config) == config_hash(shared("llama").config)
    assert config_hash(shared("mistral").config) != config_hash(shared("llama").config)


def test_config_hash_fills_in_a_missing_head_dim():
    config = copy.deepcopy(llama(hidden=96, heads=4, head_dim=24).config)
    before = config_hash(config)
    config.head_dim = None
    assert config_hash(config) == before


# Plans of other models


WAYS = {
    "load": lambda model, plan: pop_ext.load(model, plan),
    "enable": lambda model, plan: pop_ext.enable(model, plan),
    "enable, reference": lambda model, plan: pop_ext.enable(model, plan, backend="reference"),
    "the oracle": lambda model, plan: reference.prefill(model, tokens(model, 1, 9), plan),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_of_another_model_is_refused(way):
    model, other = llama(), llama(intermediate=128)
    WAYS[way](model, made_with(model))
    before = dict(other.__dict__)
    with pytest.raises(ValueError, match="plan") as error:
        WAYS[way](other, made_with(model))
    assert str(error.value) == (
        f"plan: expected one made with a model of config hash {config_hash(other.config)}, as this llama has, got "
        f"{config_hash(model.config)}"
    )
    assert other.__dict__ == before


def test_a_plan_without_config_hash_fits_any_model_of_its_depth():
    for family in ("llama", "qwen3"):
        pop_ext.load(shared(family), Plan(6, (4, 5), origin=Origin(method="by hand")))
        pop_ext.load(shared(family), Plan(6, (4, 5)))


def test_a_refusal_names_the_model_of_the_origin():
    plan = Plan(6, (4,), origin=Origin("some/model", "0123456789abcdef"))
    with pytest.raises(ValueError, match=r"got 0123456789abcdef \(made with some/model\)"):
        pop_ext.load(shared("llama"), plan)


def test_families_have_distinct_config_hashes():
    hashes = {config_hash(shared(family).config) for family in FAMILIES}
    assert len(hashes) == len(FAMILIES)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("someone/model", "someone/model"),
        ("gpt2", "gpt2"),
        ("/home/me/models/tuned/", "tuned"),
        ("./out/tuned", "tuned"),
        ("~/tuned", "tuned"),
        ("/cache/hub/models--someone--a-model/snapshots/0123abcd", "someone/a-model"),
        ("/cache/hub/models--gpt2/snapshots/0123abcd", "gpt2"),
    ],
)
def test_an_origin_names_the_hub_id_or_the_folder_and_no_path(given, named):
    model = llama()
    model.config._name_or_path = given
    assert origin_of(model, "by hand").model == named
    plan = Plan(6, (1,), origin=Origin(given, "0" * 16))  # as a file of an earlier version has it
    assert json.loads(plan.to_json())["origin"]["model"] == named


def test_a_relative_folder_that_exists_is_named_by_its_last_part(tmp_path, monkeypatch):
    (tmp_path / "out" / "tuned").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out")
    assert [public_name(name) for name in (".", "tuned", "../out/tuned")] == ["out", "tuned", "tuned"]
    monkeypatch.chdir(tmp_path)
    assert public_name("out/tuned") == "tuned"
