"""Plan: accepted and refused arguments, copies, JSON and files, presets."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pop_ext import supported_models
from pop_ext.plans.default import named_plan
from pop_ext.plans.plan import Plan
from pop_ext.plans.presets import PRESETS, preset_or_third


def test_omit_becomes_a_sorted_tuple():
    for omit in ([5, 2, 3], (3, 5, 2), {2, 3, 5}, iter([5, 3, 2]), np.array([5, 2, 3]), torch.tensor([2, 5, 3])):
        assert Plan(8, omit).omit == (2, 3, 5)


def test_runs_are_the_consecutive_layers_of_omit():
    assert Plan(12, [1, 2, 3, 6, 9, 10]).runs == (range(1, 4), range(6, 7), range(9, 11))
    assert Plan(12, []).runs == ()


def test_the_runtime_projects_the_last_layer_whether_omitted_or_not():
    assert Plan(8, []).projected_runs == (range(7, 8),)
    assert Plan(8, [2, 3]).projected_runs == (range(2, 4), range(7, 8))
    assert Plan(8, [2, 5, 6]).projected_runs == (range(2, 3), range(5, 8))
    assert Plan(8, [6, 7]).projected_runs == (range(6, 8),)
    assert Plan(1, []).projected_runs == (range(0, 1),)


def test_numpy_and_torch_integers_are_accepted():
    plan = Plan(np.int64(8), [np.int32(3)], boundary=torch.tensor(2), min_tokens=np.uint8(4))
    assert plan == Plan(8, [3], 2, 4)
    assert type(plan.boundary) is int


def test_defaults_are_one_boundary_row_and_no_minimum():
    assert (Plan(8, []).boundary, Plan(8, []).min_tokens) == (1, 0)


BAD_VALUES = [
    (dict(num_layers=0), "num_layers: expected an integer >= 1, got 0"),
    (dict(num_layers=2**70), "num_layers: expected an integer of 64 bits, got 1180591620717411303424"),
    (dict(omit=[8]), "omit: expected layers in 0...7, got 8"),
    (dict(omit=[-1]), "omit: expected layers in 0...7, got -1"),
    (dict(omit=[3, 1, 3]), "omit: expected each layer once, got 3 twice"),
    (dict(omit=range(8)), "omit: expected at least one layer of 8 retained, got all of them omitted"),
    (dict(boundary=0), "boundary: expected an integer >= 1, got 0"),
    (dict(min_tokens=-1), "min_tokens: expected an integer >= 0, got -1"),
]


@pytest.mark.parametrize(("changes", "text"), BAD_VALUES)
def test_bad_values_raise_value_error_with_the_name(changes, text):
    with pytest.raises(ValueError, match="expected") as error:
        Plan(**{"num_layers": 8, "omit": [1], **changes})
    assert str(error.value) == text


BAD_TYPES = [
    (dict(num_layers=8.0), "num_layers: expected an integer, got 8.0"),
    (dict(num_layers=True), "num_layers: expected an integer, got True"),
    (dict(omit=3), "omit: expected an iterable of integers, got 3"),
    (dict(omit=None), "omit: expected an iterable of integers, got None"),
    (dict(omit="12"), "omit: expected an iterable of integers, got '12'"),
    (dict(omit=[1.0]), "omit: expected an integer, got 1.0"),
    (dict(omit=[True]), "omit: expected an integer, got True"),
    (dict(omit=np.array([True, False])), "omit: expected an integer, got np.True_"),
    (dict(omit=torch.tensor([True])), "omit: expected an integer, got tensor(True)"),
    (dict(omit=["1"]), "omit: expected an integer, got '1'"),
    (dict(boundary=1.5), "boundary: expected an integer, got 1.5"),
    (dict(min_tokens=None), "min_tokens: expected an integer, got None"),
]


@pytest.mark.parametrize(("changes", "text"), BAD_TYPES, ids=[text for _, text in BAD_TYPES])
def test_bad_types_raise_type_error_with_the_name(changes, text):
    with pytest.raises(TypeError) as error:
        Plan(**{"num_layers": 8, "omit": [1], **changes})
    assert str(error.value) == text


def test_last_omits_the_deepest_third_by_default():
    for depth in (1, 2, 3, 16, 32, 36, 48):
        assert Plan.last(depth).omit == tuple(range(depth - depth // 3, depth))


def test_last_takes_a_count_or_a_fraction():
    assert Plan.last(8, 0).omit == ()
    assert Plan.last(8, count=2) == Plan(8, [6, 7])
    assert Plan.last(10, fraction=0.7).omit == tuple(range(3, 10))
    assert Plan.last(8, fraction=0).omit == ()
    assert Plan.last(8, 2, boundary=32, min_tokens=64) == Plan(8, [6, 7], 32, 64)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(count=2, fraction=0.5), "count, fraction: expected one of them, got count=2 and fraction=0.5"),
        (dict(count=8), "count: expected an integer in 0...7, got 8"),
        (dict(count=-1), "count: expected an integer in 0...7, got -1"),
        (dict(fraction=1.0), "fraction: expected a number in [0, 1), got 1.0"),
        (dict(fraction=-0.1), "fraction: expected a number in [0, 1), got -0.1"),
        (dict(fraction=float("nan")), "fraction: expected a number in [0, 1), got nan"),
    ],
)
def test_last_refuses_bad_counts_and_fractions(arguments, text):
    with pytest.raises(ValueError, match="expected") as error:
        Plan.last(8, **arguments)
    assert str(error.value) == text


def test_last_refuses_counts_and_fractions_of_bad_types():
    with pytest.raises(TypeError, match="^count: expected an integer, got 2.0$"):
        Plan.last(8, count=2.0)
    with pytest.raises(TypeError, match="^fraction: expected a number, got '1/3'$"):
        Plan.last(8, fraction="1/3")


def test_plans_are_equal_and_hash_by_value():
    assert Plan(8, [1, 2]) == Plan(8, (2, 1))
    assert len({Plan(8, [1, 2]), Plan(8, (2, 1)), Plan(8, [1, 2], boundary=2)}) == 2
    for other in (Plan(9, [1, 2]), Plan(8, [1]), Plan(8, [1, 2], 2), Plan(8, [1, 2], 1, 1), (8, (1, 2), 1, 0), None):
        assert Plan(8, [1, 2]) != other


def test_a_plan_is_immutable():
    plan = Plan(8, [1, 2])
    for name in ("num_layers", "omit", "boundary", "min_tokens", "runs", "note"):
        with pytest.raises(AttributeError):
            setattr(plan, name, 3)
        with pytest.raises(AttributeError):
            delattr(plan, name)
    assert plan == Plan(8, [1, 2])


def test_replace_returns_a_checked_copy():
    plan = Plan(8, [1, 2], min_tokens=5)
    assert plan.replace(boundary=32) == Plan(8, [1, 2], 32, 5)
    assert plan.boundary == 1
    with pytest.raises(ValueError, match="omit: expected layers in 0...3, got 4"):
        plan.replace(num_layers=4, omit=[4])
    with pytest.raises(TypeError, match="depth"):
        plan.replace(depth=4)


def test_repr_evaluates_to_the_plan():
    plan = Plan(8, [1, 2], 3, 4)
    assert repr(plan) == "Plan(num_layers=8, omit=(1, 2), boundary=3, min_tokens=4)"
    assert eval(repr(plan)) == plan


def test_copies_and_pickles_are_equal_plans():
    plan = Plan(8, [1, 2], 3, 4)
    copies = [copy.copy(plan), copy.deepcopy(plan), copy.deepcopy({"plan": plan})["plan"]]
    copies += [pickle.loads(pickle.dumps(plan, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for other in copies:
        assert type(other) is Plan
        assert other == plan


def test_json_round_trip_keeps_every_argument():
    plan = Plan(8, [1, 2, 6], 3, 4)
    assert json.loads(plan.to_json()) == {"num_layers": 8, "omit": [1, 2, 6], "boundary": 3, "min_tokens": 4}
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(json.dumps({"omit": [], "num_layers": 8})) == Plan(8, [])


def test_an_unknown_json_member_is_refused_with_its_value():
    text = '{"num_layers": 8, "omit": [1], "note": {"a": [null, true, 1.5e3, "\\u00e9\\ud83d\\ude00\\n"]}}'
    with pytest.raises(ValueError, match="expected no such member") as error:
        Plan.from_json(text)
    assert str(error.value) == 'plan: note: expected no such member, got {"a": [null, true, 1500.0, "é😀\\n"]}'
    with pytest.raises(ValueError, match="^plan: boundry: expected no such member, got 4$"):
        Plan.from_json('{"num_layers": 8, "omit": [1], "boundry": 4}')


def test_errors_of_huge_texts_are_short_and_come_soon():
    many = {"num_layers": 8, "omit": [1], **{f"member {i}": i for i in range(200_000)}}
    with pytest.raises(ValueError, match="^plan: member 0: expected no such member, got 0$"):
        Plan.from_json(json.dumps(many))
    long = 'é"' * 1_000_000
    for members in ({"num_layers": long}, {"omit": [long]}, {long: 1}, {"boundary": long}, {"min_tokens": [long]}):
        with pytest.raises(ValueError, match="expected") as error:
            Plan.from_json(json.dumps({"num_layers": 8, "omit": [1], **members}, ensure_ascii=False))
        assert len(str(error.value)) < 600
    with pytest.raises(ValueError, match="^plan: expected a text of at most 16777216 bytes, got 16777217$"):
        Plan.from_json(" " * (2**24 + 1))


@pytest.mark.parametrize("how", [{}, {"count": 4}, {"fraction": 0.5}])
def test_a_wrong_depth_costs_no_memory(how):
    with pytest.raises(ValueError, match="^num_layers: expected an integer <= 100000, got 1000000000000$"):
        Plan.last(10**12, **how)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "plan: not JSON: expected a value at offset 0, got the end of the text"),
        ("{", "plan: not JSON: expected a member name in double quotes at offset 1, got the end of the text"),
        ('{"num_layers": 8,}', "plan: not JSON: expected a member name in double quotes at offset 17, got '}'"),
        ('{"omit": [1 2]}', "plan: not JSON: expected ',' or ']' at offset 12, got '2]}'"),
        ('{"a": 01}', "plan: not JSON: expected ',' or '}' at offset 7, got '1}'"),
        ('{"a": .5}', "plan: not JSON: expected a value at offset 6, got '.5}'"),
        ('{"a": NaN}', "plan: not JSON: expected a value at offset 6, got 'NaN}'"),
        ('{"a": 1e999}', "plan: not JSON: expected a finite number at offset 6, got '1e999}'"),
        ('{"a": 9223372036854775808}', "expected an integer of 64 bits at offset 6"),
        ('{"a": "\\x"}', "plan: not JSON: expected an escape sequence at offset 8, got 'x\"}'"),
        ('{"a": "\\ud800"}', "plan: not JSON: expected a pair of surrogates at offset 13"),
        ('{"a": 1, "a": 2}', 'plan: not JSON: expected each member once, not "a" again at offset 12'),
        ("{} {}", "plan: not JSON: expected the end of the text at offset 3, got '{}'"),
        ("[" * 1000, "plan: not JSON: expected no deeper nesting than 64"),
        ("[]", "plan: expected a JSON object, got []"),
        ('\ufeff{"a": 1}', "plan: not JSON: expected a value at offset 0"),
        ('{"a": 1e-400}', "plan: not JSON: expected a finite number at offset 6, got '1e-400}'"),
        ('{"a": 1}t', "plan: not JSON: expected the end of the text at offset 8, got 't'"),
        ('{"a": 6-}', "plan: not JSON: expected ',' or '}' at offset 7, got '-}'"),
        ('{-"a": 6}', "plan: not JSON: expected a member name in double quotes at offset 1"),
        ('{"a": -}', "plan: not JSON: expected a value at offset 7, got '}'"),
        ('{"a" "\\q": 6}', "plan: not JSON: expected ':' at offset 5"),
        ('{"omit": []}', "plan: num_layers: expected a value, got none"),
        ('{"num_layers": 8}', "plan: omit: expected a value, got none"),
        ('{"num_layers": 8.5, "omit": []}', "plan: num_layers: expected an integer, got 8.5"),
        ('{"num_layers": 8, "omit": [1, "2"]}', 'plan: omit: expected a list of integers, got [1, "2"]'),
        ('{"num_layers": 8, "omit": [8]}', "omit: expected layers in 0...7, got 8"),
    ],
)
def test_bad_json_is_refused_with_its_offset(text, message):
    with pytest.raises(ValueError, match="expected") as error:
        Plan.from_json(text)
    assert message in str(error.value)


def test_load_reads_saved_plans_and_names_bad_files(tmp_path):
    plan = Plan(8, [1, 2], 3, 4)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(str(tmp_path / "plan.json")) == plan
    (tmp_path / "bad.json").write_text("nothing")
    with pytest.raises(ValueError, match=r"bad\.json: plan: not JSON"):
        Plan.load(tmp_path / "bad.json")
    (tmp_path / "other.bin").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"other\.bin: expected UTF-8, got byte 0xff at offset 0"):
        Plan.load(tmp_path / "other.bin")
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none.json")


def test_the_published_plan_of_llama_8b_omits_10_of_32():
    plan = Plan.preset("meta-llama/Llama-3.1-8B-Instruct")
    assert plan == Plan(32, range(22, 32)) == Plan.preset("meta-llama/Llama-3.1-8B")
    assert PRESETS["meta-llama/Llama-3.1-8B"].published
    assert "2602.03295" in PRESETS["meta-llama/Llama-3.1-8B"].source


PUBLISHED = ("meta-llama/Llama-3.1-8B", "google/gemma-3-12b", "Qwen/Qwen3-VL-8B")


def test_supported_models_are_those_with_a_preset():
    supported = supported_models()
    assert supported["meta-llama/Llama-3.1-8B-Instruct"].published
    assert not supported["Qwen/Qwen3-8B"].published
    assert supported["google/gemma-3-12b-it"].plan == Plan(48, range(32, 48))
    assert supported["Qwen/Qwen3-VL-8B-Instruct"].plan == Plan(36, range(24, 36))
    assert set(supported) == set(PRESETS)


def test_every_preset_omits_the_deepest_third_and_says_if_published():
    for name, preset in PRESETS.items():
        depth = preset.config["num_hidden_layers"]
        assert preset.plan == Plan.last(depth), name
        assert preset.published == name.startswith(PUBLISHED), name
        assert preset.source


def test_unknown_presets_are_refused_with_near_names():
    with pytest.raises(ValueError, match=r"preset: expected a name like .*meta-llama/Llama-3\.1-8B.*, got 'llama-3.1'"):
        Plan.preset("llama-3.1")


def test_the_preset_of_a_shape_or_the_deepest_third():
    config = SimpleNamespace(**PRESETS["meta-llama/Llama-3.2-1B"].config, rope_theta=5e5)
    assert preset_or_third(config) is PRESETS["meta-llama/Llama-3.2-1B"].plan
    assert preset_or_third(SimpleNamespace(model_type="other", num_hidden_layers=10)) == Plan(10, [7, 8, 9])
    assert preset_or_third(SimpleNamespace(get_text_config=lambda: config)) == Plan.last(16)


def test_presets_have_distinct_configs():
    presets = {id(preset): preset for preset in PRESETS.values()}.values()
    configs = {tuple(preset.config.items()) for preset in presets}
    assert len(configs) == len(presets)


def test_presets_match_the_configs_of_transformers():
    transformers = pytest.importorskip("transformers")
    for name, preset in {id(preset): (name, preset) for name, preset in PRESETS.items()}.values():
        facts = {key: value for key, value in preset.config.items() if key != "model_type"}
        config = transformers.AutoConfig.for_model(preset.config["model_type"], **facts)
        assert preset_or_third(config) is preset.plan, name


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "omit", [range(10**9), itertools.count(), itertools.repeat(1)], ids=["range", "count", "repeat"]
)
def test_more_layers_than_the_model_has_are_not_read(omit):
    with pytest.raises(ValueError, match=r"^omit: expected (layers in 0\.\.\.3, got 4|each layer once, got 1 twice)$"):
        Plan(4, omit)


LONG = "x" * 10**7


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Plan(4, LONG), "omit"),
        (lambda: Plan(LONG, ()), "num_layers"),
        (lambda: Plan(4, [LONG]), "omit"),
        (lambda: Plan.last(4, fraction=LONG), "fraction"),
        (lambda: Plan.last(4, count=LONG, fraction=LONG), "count"),
        (lambda: Plan.last(4, 10**5000), "count"),
        (lambda: Plan.last(4, fraction=10**5000), "fraction"),
        (lambda: named_plan(LONG, None), "plan"),
        (lambda: named_plan("\0", None), "plan"),
        (lambda: Plan.from_json(json.dumps({"num_layers": 4, "omit": [1], "origin": {"samples": LONG}})), "origin"),
        (lambda: Plan.from_json('"\ud800"'), "plan"),
    ],
)
def test_an_error_names_the_argument_and_is_short(call, name):
    with pytest.raises((TypeError, ValueError), match=f"^{name}[.,: ].*expected") as error:
        call()
    assert len(str(error.value)) < 300
