"""The library torch.ops.pop: handles, weights, threads, the profiler, fake tensors and opcheck."""

from __future__ import annotations

import json

import pop_ext
import pytest
import torch
from against_oracle import GAPS, plan_of
from models import llama, shared, tokens
from op_calls import int32, op_call, run_op
from op_operands import EPS, GEOMETRIES, Caches, random, rope_tables
from pop_ext import Plan
from pop_ext.hf.weight_map import describe
from tolerance import assert_close_fp32
from torch._subclasses.fake_tensor import FakeTensorMode

pop = torch.ops.pop


# Handles


def test_handles_are_never_reused_and_a_freed_one_is_refused():
    model, seen = shared(), set()
    for _ in range(3):
        native = pop_ext.load(model, plan_of(model))
        call = op_call(native, [tokens(model, 3)])
        assert native.handle not in seen
        seen.add(native.handle)
        del native
        with pytest.raises(RuntimeError, match=f"model: expected a handle .* not freed, got {call['model']}"):
            run_op(call)


def test_unload_frees_a_handle_once():
    model = shared()
    description = describe(model)
    weights = [ref.tensor for ref in description.weights]
    plan = plan_of(model)
    handle = pop.load(description.spec.to_json(), plan.to_json(), weights)
    assert pop.stale_weight(handle) == ""
    pop.unload(handle)
    for call in (pop.unload, pop.info, pop.stale_weight):
        with pytest.raises(RuntimeError, match=f"expected a handle .* not freed, got {handle}"):
            call(handle)


def test_info_counts_only_the_folded_weights():
    model = shared()
    for omit, folded in (((), 1), (GAPS, 4), ((5,), 1)):
        native = pop_ext.load(model, plan_of(model, omit))
        info = json.loads(pop.info(native.handle))
        spec = info["spec"]
        one_layer = 2 * spec["num_kv_heads"] * spec["head_dim"] * spec["hidden_size"] * 4
        assert info["extra_bytes"] == native.extra_bytes == folded * one_layer
        assert Plan.from_json(json.dumps(info["plan"])) == native.plan


def test_weights_are_shared_not_copied():
    model = llama()
    native = pop_ext.load(model, plan_of(model))
    ids = tokens(model, 1, 9)
    before = native.prefill(ids).logits
    model.lm_head.weight.data.mul_(2)  # not folded; the head is not part of the operator
    assert_close_fp32(native.prefill(ids).logits, 2 * before, "logits")


# Threads, profiler, fake tensors


def test_two_threads_give_the_bits_of_one():
    model = llama(hidden=128, intermediate=512)
    native = pop_ext.load(model, plan_of(model, GAPS, 2))
    prompts = [tokens(model, n, seed=n) for n in (131, 40)]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        call = op_call(native, prompts)
        x, weight = random(300, 129), random(129, seed=1)
        results.append(
            [run_op(call), *call["key_cache"], *call["value_cache"], pop.rms_norm(x, weight, EPS), pop.gated_act(x, x)]
        )
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_stages_appear_in_the_profiler():
    native = pop_ext.load(shared(), plan_of(shared()))
    call = op_call(native, [tokens(native.model, 19)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run_op(call)
    counts = {event.key: event.count for event in profile.key_averages()}
    # Six layers, the last two omitted: one projection for both, and all layers for the boundary row.
    expected = {"embed": 1, "kv_project": 1, "qkv": 6, "rope_cache_write": 6, "attention": 6, "o_proj": 6, "mlp": 6}
    assert {name: counts.get(f"pop::{name}", 0) for name in expected} == expected
    assert counts.get("pop::final_norm") == 1
    assert counts.get("pop::prefill") == 1


def opcheck_cases():
    """Return operator name -> arguments, for every operator that takes tensors."""
    geometry = GEOMETRIES["batch with past and start"]
    rows = sum(count for count, _, _ in geometry)
    caches = Caches(geometry, 2, 64, torch.float32, layers=2)
    caches.fill_past()
    cos, sin = rope_tables(rows, 64)
    x, weight = random(5, 8), random(8, seed=1)
    query, key = random(rows, 4, 64), random(rows, 2, 64, seed=1)
    for cache in (*caches.keys, *caches.values):
        cache.nan_to_num_(0.0).clamp_(-1, 1)
    return {
        "linear": ((x, random(6, 8, seed=2)), {}),
        "quantize_rows": ((x,), {}),
        "rms_norm": ((x, weight, EPS), {}),
        "add_rms_norm": ((x, x * 2, weight, EPS, weight), {}),
        "gated_act": ((x, x * 2, "gelu", weight, None), {}),
        "rope_cache_write": ((query, key, key * 2, cos, sin, *caches.lengths, caches.keys[0], caches.values[0]), {}),
        "attention": (
            (query, caches.keys[0], caches.values[0], *caches.lengths, 0.125, 3),
            {"sinks": random(4, seed=2)},
        ),
        "fold_kv": (([random(4, 8)] * 2, [random(4, 8, seed=1)] * 2, [weight] * 2), {}),
        "kv_project": (
            (random(rows, 9), random(2 * 2 * 128, 9), cos, sin, *caches.lengths, EPS, caches.keys, caches.values),
            {},
        ),
    }


@pytest.mark.parametrize("name", opcheck_cases())
def test_an_operator_passes_opcheck(name):
    args, kwargs = opcheck_cases()[name]
    torch.library.opcheck(getattr(pop, name).default, args, kwargs)


def test_prefill_passes_opcheck():
    native = pop_ext.load(shared(), plan_of(shared(), GAPS, 2))
    call = op_call(native, [tokens(native.model, n, seed=n) for n in (9, 4)])
    torch.library.opcheck(pop.prefill.default, (), call)
    call |= {
        "blocks": int32([[0, 2, 7], [1, 0, 2]]),
        "feature_index": torch.arange(13) - 1,
        "features": [random(12, native.spec.hidden_size)],
    }
    torch.library.opcheck(pop.prefill.default, (), call)


# opcheck compares eager and traced results only if they are numbers and tensors, not text. These operators are never
# traced anyway: a traced program holds a model's handle as a constant. The other checks of opcheck run.
TEXT_OPERATORS = (
    "info",
    "stale_weight",
    "cpu_isa",
    "device_missing",
    "foreign_schemas",
    "int8_isa",
    "products_missing",
    "prepack_missing",
)
NUMBER_OPERATORS = ("extra_bytes", "stale_index")
TWINS = tuple(f"{name}_utf8" for name in TEXT_OPERATORS)
WITHOUT_TEXT_COMPARISON = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("name", TEXT_OPERATORS)
def test_an_operator_that_returns_text_passes_what_opcheck_can_compare(name):
    native = pop_ext.load(shared(), plan_of(shared()))
    of_a_model = {"info": (native.handle,), "stale_weight": (native.handle,)}
    spec = native.spec.to_json()
    of_a_spec = {"products_missing": ("int8", spec, random(1)), "prepack_missing": (spec, random(1))}
    args = {**of_a_model, **of_a_spec, "device_missing": (random(1),)}.get(name, ())
    for operator in (getattr(pop, name), getattr(pop, f"{name}_utf8")):
        torch.library.opcheck(operator.default, args, test_utils=WITHOUT_TEXT_COMPARISON)
    assert getattr(pop, name)(*args) == bytes(getattr(pop, f"{name}_utf8")(*args)).decode()


@pytest.mark.parametrize("name", NUMBER_OPERATORS)
def test_an_operator_that_returns_a_number_of_a_model_passes_opcheck(name):
    native = pop_ext.load(shared(), plan_of(shared()))
    operator = getattr(pop, name)
    torch.library.opcheck(operator.default, (native.handle,), test_utils=WITHOUT_TEXT_COMPARISON)
    assert operator(native.handle) == {"extra_bytes": native.extra_bytes, "stale_index": -1}[name]


def test_fp8_linear_passes_what_opcheck_can_compare():
    # Without the check that inputs are unchanged: torch cannot compare e4m3 tensors.
    args = (random(5, 16, dtype=torch.bfloat16), *pop.quantize_rows(random(32, 16, seed=1)))
    without = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(pop.fp8_linear.default, args, test_utils=without)
    before = [tensor.view(torch.uint8).clone() for tensor in args]
    pop.fp8_linear(*args)
    assert all(torch.equal(tensor.view(torch.uint8), old) for tensor, old in zip(args, before, strict=True))


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["int8_linear"])
def test_an_operator_of_int8_passes_opcheck(name):
    weight = random(32, 17, seed=1)
    args = {"int8_linear": (random(5, 17), *pop.quantize_rows(weight, "int8"))}[name]
    torch.library.opcheck(getattr(pop, name).default, args)


def test_load_leaves_weights_unchanged_and_unload_returns_nothing():
    # Each call of `load` returns a new handle, so opcheck would find two calls unequal.
    native = pop_ext.load(shared(), plan_of(shared()))
    weights = [ref.tensor.detach() for ref in native.description.weights]
    args = (native.spec.to_json(), native.plan.to_json(), weights)
    torch.library.opcheck(pop.load.default, args, test_utils=("test_schema", "test_autograd_registration"))
    assert pop.unload(pop.load(*args)) is None


def test_load_refuses_weights_without_memory():
    native = pop_ext.load(shared(), plan_of(shared()))
    weights = [ref.tensor.detach() for ref in native.description.weights]
    args = (native.spec.to_json(), native.plan.to_json())
    with pytest.raises(RuntimeError, match="weight embed_tokens: expected memory .* meta"):
        pop.load(*args, [weight.to("meta") for weight in weights])
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match="weight embed_tokens: expected memory .* fake"):
        pop.load(*args, [mode.from_tensor(weight) for weight in weights])


def test_every_operator_is_checked():
    registered = {name.removeprefix("pop::") for name in torch._C._dispatch_get_all_op_names() if name[:5] == "pop::"}
    checked = {*opcheck_cases(), "fp8_linear", "int8_linear", "prefill", *TEXT_OPERATORS, *TWINS}
    assert registered == {*checked, *NUMBER_OPERATORS, "load", "unload", "set_foreign", "set_interrupt_check", "tune"}
