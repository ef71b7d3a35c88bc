"""Test the tests: every planted mistake must fail the comparison with the oracle, in float32 and in bfloat16.

A mistake changes an input of the operator (weights, spec, RoPE tables, lengths) or its output (hidden states, caches).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pop_ext
import pytest
import torch
from against_oracle import Result, plan_of, run_oracle
from models import FAMILIES, WINDOW, float32_twin, tokens
from op_calls import op_call, rope_of, run_op
from other_families import other
from pop_ext import NativeModel, Plan
from pop_ext._core import ModelSpec
from tolerance import assert_close_fp32, assert_low_precision
from torch import Tensor

pop = torch.ops.pop
OMIT = (2, 4, 5)
BOUNDARY = 3
T = 40


@functools.cache
def loaded(family: str, dtype: torch.dtype) -> NativeModel:
    model = FAMILIES[family](dtype=dtype) if family in FAMILIES else other(family, dtype=dtype)
    return pop_ext.load(model, plan_of(model, OMIT, BOUNDARY))


@functools.cache
def oracle(family: str, dtype: torch.dtype, truth: bool) -> Result:
    native = loaded(family, dtype)
    model = float32_twin(native.model) if truth else native.model
    return run_oracle(model, native.plan, tokens(native.model, 1, T), logits_to_keep=2)


@dataclass
class Run:
    """One call of the operator. A mutation changes it before or after `execute`."""

    native: NativeModel
    spec: dict[str, Any]
    plan: Plan
    weights: dict[str, Tensor]
    call: dict[str, Any]
    hidden: Tensor | None = None

    @classmethod
    def of(cls, native: NativeModel) -> Run:
        names = [name for name, _layer, _shape in native.spec.weight_slots()]
        weights = dict(zip(names, [ref.tensor.detach() for ref in native.description.weights], strict=True))
        prompt = tokens(native.model, 1, T)[0]
        call = op_call(native, [prompt], boundary=[BOUNDARY], logits_to_keep=[2])
        return cls(native, json.loads(native.spec.to_json()), native.plan, weights, call)

    def execute(self) -> None:
        handle = pop.load(json.dumps(self.spec), self.plan.to_json(), list(self.weights.values()))
        try:
            self.hidden = run_op({**self.call, "model": handle})
        finally:
            pop.unload(handle)

    def change_caches(self, layer: int, change: Callable[[Tensor], Any]) -> None:
        for name in ("key_cache", "value_cache"):
            change(self.call[name][layer])


def compare(run: Run, family: str, dtype: torch.dtype) -> None:
    """Compare hidden states and K/V of every layer and position with the oracle."""
    same, truth = oracle(family, dtype, False), oracle(family, dtype, True)

    def assert_equal(actual: Tensor, theirs: Tensor, exact: Tensor, name: str) -> None:
        if dtype == torch.float32:
            assert_close_fp32(actual, theirs, name)
        else:
            assert_low_precision(actual, theirs, exact, name)

    assert_equal(run.hidden, same.hidden_states[0], truth.hidden_states[0], "hidden states")
    for index, (layer, exact) in enumerate(zip(same.cache.layers, truth.cache.layers, strict=True)):
        for name, kind in (("key_cache", "keys"), ("value_cache", "values")):
            ours = run.call[name][index][:, :, :T]
            assert_equal(ours, getattr(layer, kind), getattr(exact, kind), f"{kind} of layer {index}")


# Mutations of inputs


def swap(run: Run, one: str, other: str) -> None:
    run.weights[one], run.weights[other] = run.weights[other], run.weights[one]


def rope(run: Run, positions: Tensor) -> None:
    run.call.update(rope_of(run.native, positions))


def swap_gamma_of_two_omitted_layers(run):
    swap(run, "layers.4.input_norm", "layers.5.input_norm")


def forget_gamma_in_the_fold(run):
    run.weights["layers.4.input_norm"] = torch.ones_like(run.weights["layers.4.input_norm"])


def use_the_post_attention_gamma(run):
    swap(run, "layers.2.input_norm", "layers.2.post_norm")


def swap_k_and_v_of_an_omitted_layer(run):
    swap(run, "layers.4.k_proj", "layers.4.v_proj")


def swap_k_and_v_of_a_retained_layer(run):
    swap(run, "layers.1.k_proj", "layers.1.v_proj")


def swap_k_of_two_layers_of_a_run(run):
    swap(run, "layers.4.k_proj", "layers.5.k_proj")


def swap_the_kv_heads(run):
    name = "layers.5.v_proj"
    run.weights[name] = run.weights[name].roll(run.native.spec.head_dim, 0)


def forget_a_bias(run):
    run.weights["layers.4.k_bias"] = torch.zeros_like(run.weights["layers.4.k_bias"])


def swap_gate_and_up(run):
    swap(run, "layers.0.gate_proj", "layers.0.up_proj")


def forget_the_final_gamma(run):
    run.weights["norm"] = torch.ones_like(run.weights["norm"])


def shift_rope_by_one(run):
    rope(run, torch.arange(1, T + 1))


def restart_rope_at_the_boundary(run):
    rope(run, torch.cat([torch.arange(T - BOUNDARY), torch.arange(BOUNDARY)]))


def rotate_rope_backwards(run):
    run.call["sin"] = -run.call["sin"]


def change_the_rope_of_the_last_row_only(run):
    positions = torch.arange(T)
    positions[-1] -= 1
    rope(run, positions)


def move_the_boundary_by_one(run):
    run.call["boundary"] = run.call["boundary"] + 1


def run_everything_at_full_depth(run):
    run.plan = run.plan.replace(omit=())


def omit_one_more_layer(run):
    run.plan = run.plan.replace(omit=(*OMIT, 3))


def omit_one_layer_fewer(run):
    run.plan = run.plan.replace(omit=(2, 5))


def change_the_attention_scale(run):
    run.spec["attention_scale"] *= 1.1


def change_the_epsilon(run):
    run.spec["rms_norm_eps"] *= 5000


def widen_the_window(run):
    assert run.spec["window"] == [WINDOW] * 6
    run.spec["window"] = [WINDOW + 1] * 6


def narrow_the_window(run):
    run.spec["window"] = [WINDOW - 1] * 6


def set_spec(**fields: Any) -> Callable[[Run], None]:
    """Return a mutation that sets fields of the spec. It is named after the fields."""

    def mutate(run: Run) -> None:
        assert all(run.spec[name] != value for name, value in fields.items())
        run.spec.update(fields)

    mutate.__name__ = "_".join(fields)
    return mutate


def swap_the_two_ropes(run):
    run.spec["rope_table"] = [1 - table for table in run.spec["rope_table"]]


def give_an_omitted_layer_the_other_rope(run):
    run.spec["rope_table"][OMIT[0]] = 1 - run.spec["rope_table"][OMIT[0]]


def swap_the_norms_before_and_after_the_mlp(run):
    swap(run, "layers.1.post_norm", "layers.1.mlp_out_norm")


def swap_the_norms_after_attention_and_mlp(run):
    swap(run, "layers.5.attention_out_norm", "layers.5.mlp_out_norm")


def leave_out_the_output_norms(run):
    run.spec["output_norms"] = False
    run.weights = {name: weight for name, weight in run.weights.items() if not name.endswith("_out_norm")}


def forget_the_k_norm_of_an_omitted_layer(run):
    run.weights["layers.4.k_norm"] = torch.ones_like(run.weights["layers.4.k_norm"])


def swap_q_and_k_norm(run):
    swap(run, "layers.1.q_norm", "layers.1.k_norm")


def swap_two_k_norms_of_a_run(run):
    swap(run, "layers.4.k_norm", "layers.5.k_norm")


def roll_a_norm_over_heads(run):
    name = "layers.4.k_norm"
    run.weights[name] = run.weights[name].roll(run.native.spec.head_dim)


def norm_each_head_separately(run):
    run.spec["qk_norm_over_heads"] = False
    for name in run.weights:
        if name.endswith(("q_norm", "k_norm")):
            run.weights[name] = run.weights[name][: run.native.spec.head_dim].contiguous()


def normalise_layer_inputs(run):
    run.spec["input_norms"] = True
    ones = torch.ones_like(run.weights["norm"])
    added = {f"layers.{i}.{name}": ones for i in range(6) for name in ("input_norm", "post_norm")}
    spec = ModelSpec.from_json(json.dumps(run.spec))
    run.weights = {name: {**run.weights, **added}[name] for name, _layer, _shape in spec.weight_slots()}


def forget_the_biases_of_the_routers(run):
    for name in [name for name in run.weights if name.endswith(".router_bias")]:
        run.weights[name] = torch.zeros_like(run.weights[name])


def forget_the_shared_experts(run):
    run.spec["shared_intermediate_size"] = 0
    run.spec["shared_gate"] = False
    run.weights = {name: weight for name, weight in run.weights.items() if ".shared_" not in name}


def forget_the_gates_of_the_shared_experts(run):
    run.spec["shared_gate"] = False
    run.weights = {name: weight for name, weight in run.weights.items() if not name.endswith(".shared_gate")}


def swap_gate_and_up_of_a_shared_expert(run):
    swap(run, "layers.3.shared_gate_proj", "layers.3.shared_up_proj")


def choose_by_probabilities(run):
    run.spec.update(router_scores="softmax", router_bias=False)
    run.weights = {name: weight for name, weight in run.weights.items() if not name.endswith(".router_bias")}


def rotate_half_as_many_channels(run):
    run.spec["rotary_dim"] //= 2
    for name in ("cos", "sin"):
        run.call[name] = run.call[name][:, : run.spec["rotary_dim"] // 2].contiguous()


def swap_two_experts(run):
    for name in ("layers.0.experts_gate_up", "layers.0.experts_down"):
        run.weights[name] = run.weights[name].flip(0)


def swap_gate_and_up_of_experts(run):
    name = "layers.0.experts_gate_up"
    run.weights[name] = run.weights[name].roll(run.spec["moe_intermediate_size"], 1)


def swap_the_routers_of_two_omitted_layers(run):
    swap(run, "layers.4.router", "layers.5.router")


def roll_the_router_of_a_retained_layer(run):
    run.weights["layers.0.router"] = run.weights["layers.0.router"].roll(1, 0)


# Mutations of outputs


def forget_the_boundary_kv(run):
    run.change_caches(4, lambda cache: cache[:, :, T - BOUNDARY : T].zero_())


def leave_the_last_position_unwritten(run):
    run.change_caches(5, lambda cache: cache[:, :, T - 1].zero_())


def write_the_boundary_kv_one_slot_early(run):
    run.change_caches(
        2, lambda cache: cache[:, :, T - BOUNDARY - 1 : T - 1].copy_(cache[:, :, T - BOUNDARY : T].clone())
    )


def project_the_boundary_rows_as_context(run):
    """Replace the K/V of the boundary rows by projections of their state before the run, as for context rows."""
    other = Run.of(run.native)
    other.call["boundary"], other.call["logits_to_keep"] = torch.ones(2, 1, dtype=torch.int32)
    other.execute()
    for name in ("key_cache", "value_cache"):
        rows = slice(T - BOUNDARY, T - 1)
        run.call[name][4][:, :, rows] = other.call[name][4][:, :, rows]


def swap_the_caches_of_two_layers(run):
    keys = run.call["key_cache"]
    keys[4], keys[5] = keys[5], keys[4]


def return_the_rows_in_another_order(run):
    run.hidden = run.hidden.flip(0)


INPUT_MUTATIONS = {
    "llama": [
        swap_gamma_of_two_omitted_layers,
        forget_gamma_in_the_fold,
        use_the_post_attention_gamma,
        swap_k_and_v_of_an_omitted_layer,
        swap_k_and_v_of_a_retained_layer,
        swap_k_of_two_layers_of_a_run,
        swap_the_kv_heads,
        swap_gate_and_up,
        forget_the_final_gamma,
        shift_rope_by_one,
        restart_rope_at_the_boundary,
        rotate_rope_backwards,
        change_the_rope_of_the_last_row_only,
        move_the_boundary_by_one,
        run_everything_at_full_depth,
        omit_one_more_layer,
        omit_one_layer_fewer,
        change_the_attention_scale,
        change_the_epsilon,
    ],
    "qwen2": [forget_a_bias],
    "qwen3": [swap_q_and_k_norm, swap_two_k_norms_of_a_run, forget_the_k_norm_of_an_omitted_layer],
    "phi3": [rotate_half_as_many_channels, swap_gate_and_up, swap_k_and_v_of_an_omitted_layer],
    "gemma2": [set_spec(attention_softcap=0), set_spec(attention_softcap=1.6), leave_out_the_output_norms],
    "gemma3": [
        set_spec(norm_weight_offset=0),
        set_spec(embed_scale=1),
        swap_the_two_ropes,
        give_an_omitted_layer_the_other_rope,
        swap_the_norms_before_and_after_the_mlp,
        swap_the_norms_after_attention_and_mlp,
        leave_out_the_output_norms,
        swap_two_k_norms_of_a_run,
    ],
    "olmo2": [
        roll_a_norm_over_heads,
        norm_each_head_separately,
        normalise_layer_inputs,
        forget_the_k_norm_of_an_omitted_layer,
        swap_two_k_norms_of_a_run,
        swap_the_norms_after_attention_and_mlp,
        leave_out_the_output_norms,
    ],
    "mistral": [widen_the_window, narrow_the_window],
    "mixtral": [set_spec(norm_topk=False), set_spec(experts_per_token=1), set_spec(experts_per_token=3)],
    "qwen3_moe": [
        set_spec(norm_topk=True),
        set_spec(experts_per_token=2),
        swap_two_experts,
        swap_gate_and_up_of_experts,
        swap_the_routers_of_two_omitted_layers,
        roll_the_router_of_a_retained_layer,
        swap_q_and_k_norm,
    ],
    "qwen2_moe": [
        set_spec(norm_topk=True),
        forget_the_shared_experts,
        forget_the_gates_of_the_shared_experts,
        swap_gate_and_up_of_a_shared_expert,
    ],
    "glm4_moe": [
        set_spec(norm_topk=False),
        set_spec(routed_scale=1.0),
        choose_by_probabilities,
        forget_the_biases_of_the_routers,
        forget_the_shared_experts,
        swap_gate_and_up_of_a_shared_expert,
    ],
    "minimax_m2": [
        set_spec(norm_topk=False),
        choose_by_probabilities,
        forget_the_biases_of_the_routers,
        norm_each_head_separately,
        swap_two_k_norms_of_a_run,
    ],
}
OUTPUT_MUTATIONS = [
    forget_the_boundary_kv,
    leave_the_last_position_unwritten,
    write_the_boundary_kv_one_slot_early,
    project_the_boundary_rows_as_context,
    swap_the_caches_of_two_layers,
    return_the_rows_in_another_order,
]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("family", INPUT_MUTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_mistake_the_comparison_passes(dtype, family):
    run = Run.of(loaded(family, dtype))
    run.execute()
    compare(run, family, dtype)


@pytest.mark.parametrize(
    ("family", "mutate"),
    [
        pytest.param(family, mutate, id=mutate.__name__)
        for family, mutations in INPUT_MUTATIONS.items()
        for mutate in mutations
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mistake_in_the_inputs_is_caught(dtype, family, mutate):
    run = Run.of(loaded(family, dtype))
    mutate(run)
    run.execute()
    with pytest.raises(AssertionError, match="worst at"):
        compare(run, family, dtype)


@pytest.mark.parametrize("mutate", OUTPUT_MUTATIONS, ids=[mutate.__name__ for mutate in OUTPUT_MUTATIONS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mistake_in_the_outputs_is_caught(dtype, mutate):
    run = Run.of(loaded("llama", dtype))
    run.execute()
    mutate(run)
    with pytest.raises(AssertionError, match="worst at"):
        compare(run, "llama", dtype)


def test_a_uniform_rope_shift_is_caught_only_by_the_cache():
    # Attention depends only on differences of positions, so a comparison of logits alone would pass.
    run = Run.of(loaded("llama", torch.float32))
    shift_rope_by_one(run)
    run.execute()
    assert_close_fp32(run.hidden, oracle("llama", torch.float32, False).hidden_states[0], "hidden states")
    with pytest.raises(AssertionError, match="keys of layer 0"):
        compare(run, "llama", torch.float32)
