"""ModelSpec: fields, the weight slots of pop::load, refusals and JSON."""

from __future__ import annotations

import ast
import copy
import json
import pickle
from pathlib import Path

import pop_ext
import pytest
from pop_ext._core import ModelSpec

SIZES = dict(
    architecture="llama",
    dtype="bfloat16",
    num_layers=2,
    hidden_size=96,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=200,
    vocab_size=1000,
)


def spec(**changes) -> ModelSpec:
    return ModelSpec(**{**SIZES, **changes})


def test_omitted_fields_take_their_defaults():
    plain = spec()
    assert plain.rotary_dim == 32
    assert plain.attention_scale == 32**-0.5
    assert plain.window == (0, 0)
    assert plain.activation == "silu"
    assert (plain.qkv_bias, plain.o_bias, plain.mlp_bias, plain.qk_norm) == (False,) * 4
    assert (plain.q_dim, plain.kv_dim) == (192, 64)


def test_fields_read_back_as_given():
    given = dict(
        dtype="float16",
        rotary_dim=16,
        rope_interleaved=True,
        rms_norm_eps=1e-5,
        attention_scale=0.25,
        activation="gelu_tanh",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=True,
        qk_norm_after_rope=True,
        norm_weight_offset=1.0,
        output_norms=True,
        residual_scale=0.25,
        embed_scale=9.75,
        scale_inputs=True,
        attention_softcap=50.0,
        attention_sinks=True,
        window=(0, 16),
        rope_table=(1, 0),
        sparse=(0, 1),
        num_experts=8,
        experts_per_token=3,
        moe_intermediate_size=40,
        norm_topk=True,
        norm_topk_eps=1e-20,
        routed_scale=2.5,
        router_scores="sigmoid",
        router_bias=True,
        router_float32=True,
        shared_intermediate_size=72,
        shared_gate=True,
        expert_bias=True,
        experts_transposed=True,
        experts_interleaved=True,
        swiglu_alpha=1.5,
        swiglu_limit=3.0,
    )
    made = spec(**given)
    assert {name: getattr(made, name) for name in given} == given
    assert (made.input_norms, made.qk_norm_over_heads) == (True, False)
    over_heads = spec(qk_norm=True, qk_norm_over_heads=True, input_norms=False)
    assert (over_heads.input_norms, over_heads.qk_norm_over_heads) == (False, True)
    assert not made.query_rope
    assert not made.router_logit_bias
    assert spec(query_rope=True).query_rope
    assert {name: getattr(made, name) for name in SIZES} == {**SIZES, "dtype": "float16"}


def test_plain_weight_slots_have_the_order_of_load():
    assert spec(num_layers=1).weight_slots() == [
        ("embed_tokens", -1, (1000, 96)),
        ("norm", -1, (96,)),
        ("layers.0.input_norm", 0, (96,)),
        ("layers.0.q_proj", 0, (192, 96)),
        ("layers.0.k_proj", 0, (64, 96)),
        ("layers.0.v_proj", 0, (64, 96)),
        ("layers.0.o_proj", 0, (96, 192)),
        ("layers.0.post_norm", 0, (96,)),
        ("layers.0.gate_proj", 0, (200, 96)),
        ("layers.0.up_proj", 0, (200, 96)),
        ("layers.0.down_proj", 0, (96, 200)),
    ]


def test_optional_weight_slots_have_their_places():
    slots = spec(num_layers=1, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True).weight_slots()
    assert [(name.removeprefix("layers.0."), shape) for name, layer, shape in slots if layer == 0] == [
        ("input_norm", (96,)),
        ("q_proj", (192, 96)),
        ("q_bias", (192,)),
        ("k_proj", (64, 96)),
        ("k_bias", (64,)),
        ("v_proj", (64, 96)),
        ("v_bias", (64,)),
        ("q_norm", (32,)),
        ("k_norm", (32,)),
        ("o_proj", (96, 192)),
        ("o_bias", (96,)),
        ("post_norm", (96,)),
        ("gate_proj", (200, 96)),
        ("gate_bias", (200,)),
        ("up_proj", (200, 96)),
        ("up_bias", (200,)),
        ("down_proj", (96, 200)),
        ("down_bias", (96,)),
    ]


@pytest.mark.parametrize(
    ("flag", "names"),
    [
        ("qkv_bias", {"q_bias", "k_bias", "v_bias"}),
        ("o_bias", {"o_bias"}),
        ("mlp_bias", {"gate_bias", "up_bias", "down_bias"}),
        ("output_norms", {"attention_out_norm", "mlp_out_norm"}),
        ("qk_norm", {"q_norm", "k_norm"}),
        ("attention_sinks", {"sinks"}),
    ],
)
def test_a_flag_adds_only_its_own_slots(flag, names):
    added = [slot for slot in spec(**{flag: True}).weight_slots() if slot not in spec().weight_slots()]
    assert {name for name, _, _ in added} == {f"layers.{layer}.{name}" for layer in (0, 1) for name in names}


def test_a_sparse_layer_has_a_router_and_experts():
    slots = spec(sparse=(0, 1), num_experts=8, experts_per_token=3, moe_intermediate_size=40).weight_slots()
    mlp = {name: shape for name, _, shape in slots if "experts" in name or "router" in name or "gate" in name}
    assert mlp == {
        "layers.0.gate_proj": (200, 96),
        "layers.1.router": (8, 96),
        "layers.1.experts_gate_up": (8, 80, 96),
        "layers.1.experts_down": (8, 96, 40),
    }


SHARED = {"shared_gate_proj": (72, 96), "shared_up_proj": (72, 96), "shared_down_proj": (96, 72)}


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        (dict(router_scores="sigmoid", router_bias=True), {"router_bias": (8,)}),
        (dict(shared_intermediate_size=72), SHARED),
        (dict(shared_intermediate_size=72, shared_gate=True), {**SHARED, "shared_gate": (1, 96)}),
        (dict(norm_topk_eps=1e-20, routed_scale=2.5, router_float32=True), {}),
    ],
)
def test_a_router_bias_and_a_shared_expert_add_only_their_own_slots(changes, added):
    plain = dict(sparse=(0, 1), num_experts=8, experts_per_token=3, moe_intermediate_size=40)
    before, slots = spec(**plain).weight_slots(), spec(**plain, **changes).weight_slots()
    assert [slot for slot in slots if slot in before] == before
    expected = {f"layers.1.{name}": shape for name, shape in added.items()}
    assert {name: shape for name, _, shape in slots if name in expected} == expected
    assert len(slots) == len(before) + len(expected)


def test_transposed_experts_with_biases_have_their_shapes():
    flags = dict.fromkeys(("router_logit_bias", "expert_bias", "experts_transposed", "experts_interleaved"), True)
    slots = spec(
        num_layers=1, sparse=[1], num_experts=8, experts_per_token=3, moe_intermediate_size=40, **flags
    ).weight_slots()
    assert [
        (name.removeprefix("layers.0."), shape) for name, _, shape in slots if "expert" in name or "route" in name
    ] == [
        ("router", (8, 96)),
        ("router_logit_bias", (8,)),
        ("experts_gate_up", (8, 96, 80)),
        ("experts_gate_up_bias", (8, 80)),
        ("experts_down", (8, 40, 96)),
        ("experts_down_bias", (8, 96)),
    ]


def test_sinks_have_a_value_for_each_head():
    assert ("layers.1.sinks", 1, (6,)) in spec(attention_sinks=True).weight_slots()


def test_a_model_without_input_norms_has_no_slots_for_them():
    bare = [name for name, _, _ in spec(input_norms=False, output_norms=True).weight_slots()]
    assert not any(name.endswith((".input_norm", ".post_norm")) for name in bare)
    assert set(bare) < {name for name, _, _ in spec(output_norms=True).weight_slots()}


def test_norms_over_all_heads_are_as_wide_as_the_projections():
    slots = spec(num_layers=1, qk_norm=True, qk_norm_over_heads=True, input_norms=False).weight_slots()
    assert {name: shape for name, _, shape in slots if name.endswith(("q_norm", "k_norm"))} == {
        "layers.0.q_norm": (192,),
        "layers.0.k_norm": (64,),
    }


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        *[
            ({name: 0}, f"{name}: expected an integer >= 1, got 0")
            for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "rotary_dim")
        ],
        (dict(intermediate_size=-3), "intermediate_size: expected an integer >= 1, got -3"),
        (dict(vocab_size=0), "vocab_size: expected an integer >= 1, got 0"),
        (dict(rms_norm_eps=0.0), "rms_norm_eps: expected a finite number > 0, got 0"),
        (dict(attention_scale=float("nan")), "attention_scale: expected a finite number > 0, got nan"),
        (dict(num_kv_heads=4), "num_kv_heads: expected a divisor of num_heads (6), got 4"),
        (dict(rotary_dim=15), "rotary_dim: expected an even number <= head_dim (32), got 15"),
        (dict(rotary_dim=34), "rotary_dim: expected an even number <= head_dim (32), got 34"),
        *[
            (
                dict(qk_norm_over_heads=True, **changes),
                "qk_norm_over_heads: expected qk_norm and no qkv_bias, got another combination",
            )
            for changes in (
                {},
                dict(input_norms=False),
                dict(qk_norm=True, qkv_bias=True),
                dict(qk_norm=True, input_norms=False, qkv_bias=True),
            )
        ],
        *[
            (
                dict(qk_norm_after_rope=True, **changes),
                "qk_norm_after_rope: expected qk_norm without qk_norm_over_heads, got another combination",
            )
            for changes in ({}, dict(qk_norm=True, qk_norm_over_heads=True, input_norms=False))
        ],
        *[
            (
                dict(query_rope=True, **changes),
                "query_rope: expected rotary_dim = head_dim and rope_table 0 in every layer, got another combination",
            )
            for changes in (dict(rotary_dim=16), dict(rope_table=[0, 1]))
        ],
        (dict(residual_scale=0.0), "residual_scale: expected a finite number > 0, got 0"),
        (dict(window=[0]), "window: expected an entry for each of 2 layers, got 1"),
        (dict(window=[0, -1]), "window: expected sizes >= 0 (0: no window), got -1"),
        (dict(sparse=[0]), "sparse: expected an entry for each of 2 layers, got 1"),
        (dict(sparse=[0, 2]), "sparse: expected 0 (dense) and 1 (experts), got 2"),
        *[
            (dict(dict(sparse=[0, 1], num_experts=8, experts_per_token=3, moe_intermediate_size=40), **changes), text)
            for changes, text in (
                (dict(num_experts=0), "num_experts: expected an integer >= 1, got 0"),
                (dict(num_experts=5000), "num_experts: expected at most 4096, got 5000"),
                (dict(moe_intermediate_size=0), "moe_intermediate_size: expected an integer >= 1, got 0"),
                (dict(experts_per_token=9), "experts_per_token: expected 1 to num_experts (8), got 9"),
                (dict(router_bias=True), "router_bias: expected router_scores sigmoid, got softmax"),
                (
                    dict(router_logit_bias=True, router_scores="sigmoid"),
                    "router_logit_bias: expected router_scores softmax, got sigmoid",
                ),
                (dict(shared_gate=True), "shared_gate: expected shared_intermediate_size > 0, got 0"),
                (
                    dict(shared_intermediate_size=-1),
                    "shared_intermediate_size: expected an integer >= 0, got -1",
                ),
                (dict(routed_scale=0.0), "routed_scale: expected a finite number > 0, got 0"),
                (dict(norm_topk_eps=-1.0), "norm_topk_eps: expected a finite number >= 0, got -1"),
                (dict(router_scores="top"), "router_scores: expected one of softmax, sigmoid, got top"),
            )
        ],
        (dict(dtype="int8"), "dtype: expected one of float32, bfloat16, float16, got int8"),
        (dict(activation="relu"), "activation: expected one of silu, gelu_tanh, gelu, clamped_swiglu, got relu"),
        (dict(swiglu_alpha=0.0), "swiglu_alpha: expected a finite number > 0, got 0"),
        (dict(swiglu_limit=float("inf")), "swiglu_limit: expected a finite number > 0, got inf"),
    ],
)
def test_bad_fields_raise_value_error_with_the_name(changes, text):
    with pytest.raises(ValueError, match="expected") as error:
        spec(**changes)
    assert str(error.value) == text


def test_json_round_trip_is_exact():
    made = spec(rms_norm_eps=1.0000001e-5, attention_scale=1 / 3, window=[0, 4096], qk_norm=True)
    again = ModelSpec.from_json(made.to_json())
    assert again == made
    assert again.attention_scale == 1 / 3
    assert json.loads(made.to_json())["rms_norm_eps"] == 1.0000001e-5


def test_architecture_names_may_hold_any_character():
    for name in ('a "quoted" \\ name', "tab\there\x01", "é ü 中 😀"):
        assert json.loads(spec(architecture=name).to_json())["architecture"] == name
        assert ModelSpec.from_json(json.dumps(json.loads(spec(architecture=name).to_json()))).architecture == name


def test_json_with_missing_or_unknown_fields_is_refused():
    fields = json.loads(spec().to_json())
    for name in fields:
        rest = {key: value for key, value in fields.items() if key != name}
        with pytest.raises(ValueError, match=f"^model spec: {name}: expected a value, got none$"):
            ModelSpec.from_json(json.dumps(rest))
    with pytest.raises(ValueError, match="^model spec: logit_softcap: expected no such member, got 30.0$"):
        ModelSpec.from_json(json.dumps({**fields, "logit_softcap": 30.0}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(num_layers="2"), 'model spec: num_layers: expected an integer, got "2"'),
        (dict(qk_norm=1), "model spec: qk_norm: expected true or false, got 1"),
        (dict(rms_norm_eps=None), "model spec: rms_norm_eps: expected a number, got null"),
        (dict(architecture=3), "model spec: architecture: expected a string, got 3"),
        (dict(window=0), "model spec: window: expected a list of integers, got 0"),
        (dict(num_kv_heads=4), "num_kv_heads: expected a divisor of num_heads (6), got 4"),
    ],
)
def test_json_with_fields_of_other_types_is_refused(changes, text):
    with pytest.raises(ValueError, match="expected") as error:
        ModelSpec.from_json(json.dumps({**json.loads(spec().to_json()), **changes}))
    assert str(error.value) == text


def test_the_stub_lists_the_fields_of_the_binding():
    stub = Path(pop_ext.__file__).with_name("_core.pyi")
    [fields] = [node for node in ast.parse(stub.read_text()).body if getattr(node, "name", "") == "ModelSpec"]
    stated = {node.target.id: node.value for node in fields.body if isinstance(node, ast.AnnAssign)}
    assert list(stated) == list(json.loads(spec().to_json()))
    assert {name for name, default in stated.items() if default is None} == set(SIZES)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(num_layers="2"), "num_layers: expected an integer, got '2'"),
        (dict(num_layers=2.0), "num_layers: expected an integer, got 2.0"),
        (dict(num_layers=None), "num_layers: expected an integer, got None"),
        (dict(embed_scale="1"), "embed_scale: expected a number, got '1'"),
        (dict(qk_norm="yes"), "qk_norm: expected a bool, got 'yes'"),
        (dict(window=[0, 1.5]), "window: expected a sequence of integers, got [0, 1.5]"),
        (dict(dtype=16), "dtype: expected a str, got 16"),
        (dict(logit_softcap=30.0), "ModelSpec: expected the name of a field, got logit_softcap"),
    ],
)
def test_an_argument_of_another_type_or_name_is_a_type_error(changes, text):
    with pytest.raises(TypeError) as error:
        spec(**changes)
    assert str(error.value) == text


def test_a_field_without_a_default_is_required():
    for name in SIZES:
        with pytest.raises(TypeError, match=f"^ModelSpec: {name}: expected a value, got none$"):
            ModelSpec(**{key: value for key, value in SIZES.items() if key != name})


def test_none_stands_for_a_derived_default():
    assert spec(rotary_dim=None, attention_scale=None, window=None, rope_table=None, sparse=None) == spec()


def test_200000_unknown_members_are_refused():
    """Reading is n log n in the number of members: this takes a fraction of a second."""
    fields = json.loads(spec().to_json()) | {f"x{i:06}": i for i in range(200_000)}
    with pytest.raises(ValueError, match="^model spec: x000000: expected no such member, got 0$"):
        ModelSpec.from_json(json.dumps(fields))


def test_specs_are_values():
    made = spec(window=[0, 16])
    assert made == spec(window=[0, 16])
    assert hash(made) == hash(spec(window=[0, 16]))
    assert made != spec()
    assert made != "spec"
    assert copy.deepcopy(made) == made == pickle.loads(pickle.dumps(made))
    with pytest.raises(AttributeError):
        made.num_layers = 3
