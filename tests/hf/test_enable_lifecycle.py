"""Test the life of an enabled model: enabled again, copied, saved, deleted, used by two threads."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import json
import pickle
import warnings
import weakref
from pathlib import Path
from typing import Any

import pop_ext
import pytest
import torch
from enabled_models import (
    LAYERS,
    OTHER,
    PLAN,
    T,
    assert_enabled_equals_oracle,
    generate,
    handle_of,
    is_alive,
    multiply_in_place,
    prefill,
)
from models import llama, mistral, qwen2, tokens
from pop_ext import Plan
from pop_ext.hf.forward import PrefillForward
from threads import run_threads
from tolerance import assert_close_fp32
from transformers import LlamaForCausalLM

# enable, disable, enabled


def test_enable_returns_the_same_object():
    model = llama()
    assert pop_ext.enable(model, PLAN) is model
    assert pop_ext.disable(model) is model


def test_enabling_again_replaces_plan_strict_and_backend():
    model = llama()
    ids = tokens(model, 1, T)
    pop_ext.enable(model, PLAN)
    assert_enabled_equals_oracle(model, ids, PLAN)
    pop_ext.enable(model, OTHER, strict=True)
    assert_enabled_equals_oracle(model, ids, OTHER)
    with pytest.raises(pop_ext.PrefillDeclined), torch.no_grad():
        model(ids)
    pop_ext.enable(model, PLAN, backend="reference")
    with torch.no_grad():
        model(ids, logits_to_keep=1)
    assert pop_ext.last_call(model).backend == "reference"


def test_disable_restores_the_model_exactly():
    model = llama()
    ids = tokens(model, 1, T)
    before, expected = dict(model.__dict__), generate(model, ids)
    pop_ext.enable(model, PLAN)
    pop_ext.enable(model, OTHER)
    pop_ext.disable(model)
    assert model.__dict__ == before
    assert model.forward.__func__ is LlamaForCausalLM.forward
    assert torch.equal(generate(model, ids), expected)
    with pytest.raises(ValueError, match="not"):
        pop_ext.explain(model, ids)


def test_disabling_a_model_that_is_not_enabled_changes_nothing():
    model = llama()
    before = dict(model.__dict__)
    pop_ext.disable(model)
    assert model.__dict__ == before


def test_a_forward_replaced_before_enable_runs_and_is_restored():
    model = llama()
    ids = tokens(model, 1, T)
    original = model.forward
    seen = []

    def mine(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return original(*args, **kwargs)

    mine.__signature__ = inspect.signature(original)
    model.forward = mine
    pop_ext.enable(model, PLAN)
    with pytest.warns(match="replaced forward"), torch.no_grad():
        model(ids, logits_to_keep=1)
    assert seen
    pop_ext.disable(model)
    assert model.__dict__["forward"] is mine


def test_enabled_restores_a_stock_model():
    model = llama()
    before = dict(model.__dict__)
    with pop_ext.enabled(model, PLAN) as same:
        assert same is model
        assert_enabled_equals_oracle(model, tokens(model, 1, T))
    assert model.__dict__ == before


def test_enabled_restores_the_model_after_an_exception():
    model = llama()
    before = dict(model.__dict__)
    with pytest.raises(KeyError), pop_ext.enabled(model, PLAN):
        raise KeyError
    assert model.__dict__ == before


def test_enabled_blocks_nest():
    model = llama()
    ids = tokens(model, 1, T)
    pop_ext.enable(model, PLAN)
    outermost = model.forward
    with pop_ext.enabled(model, OTHER):
        middle = model.forward
        with pop_ext.enabled(model, PLAN.replace(boundary=3), strict=True):
            prefill(model, ids)
            assert pop_ext.last_call(model).boundary == (3,)
            pop_ext.disable(model)
        assert model.forward is middle
        assert_enabled_equals_oracle(model, ids, OTHER)
    assert model.forward is outermost
    assert_enabled_equals_oracle(model, ids, PLAN)


def test_a_plan_may_be_named_by_a_word():
    model = pop_ext.enable(llama(), "third")
    prefill(model, tokens(model, 1, T))
    assert pop_ext.last_call(model).plan == Plan(LAYERS, (4, 5))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_without_a_plan_every_layer_runs_and_one_warning_says_so(backend):
    model = llama()
    ids = tokens(model, 2, T)
    with torch.no_grad():
        expected = model(ids, logits_to_keep=1).logits
    with pytest.warns(pop_ext.NoPlanWarning, match=r"runs at full depth.*calibrate.*third\" prunes") as caught:
        pop_ext.enable(model, strict=True, backend=backend)
    assert [warning.filename for warning in caught] == [__file__]
    with torch.no_grad():
        assert_close_fp32(model(ids, logits_to_keep=1).logits, expected, "logits")
    call = pop_ext.last_call(model)
    assert (call.backend, call.plan.omit) == (backend, ())
    assert str(call) == (
        f"{backend} prefill: the plan omits no layer; 2 sequence(s), {2 * T} new tokens, all of them run all 6 layers"
    )


def test_the_missing_plan_is_reported_once_for_each_model():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        models = [llama(), llama()]
        for model in models:
            pop_ext.enable(model)
            pop_ext.enable(model)
            pop_ext.load(pop_ext.disable(model))
            with torch.no_grad():
                pop_ext.reference.prefill(model, tokens(model, 1, 3))
    assert [warning.category for warning in caught] == [pop_ext.NoPlanWarning] * 2


def test_a_warning_that_is_an_error_is_raised_by_every_call():
    model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(pop_ext.NoPlanWarning):
                pop_ext.enable(model)
        pop_ext.enable(model, "third")
        for _ in range(2):
            with pytest.raises(UserWarning, match="the stock forward runs"):
                model(tokens(model, 1, T), labels=tokens(model, 1, T))
    with pytest.warns(pop_ext.NoPlanWarning):
        pop_ext.enable(model)


def test_a_model_that_cannot_run_gets_an_error_and_no_advice():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(pop_ext.UnsupportedModelError):
            pop_ext.enable(llama(hidden_act="relu"), backend="native")


def test_inference_mode_gives_the_same_bits():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 2, T)
    expected = prefill(model, ids).logits
    with torch.inference_mode():
        output = model(ids, logits_to_keep=1)
        assert torch.equal(output.logits, expected)
        more = model(ids, past_key_values=output.past_key_values, logits_to_keep=1)
    assert pop_ext.last_call(model).native
    assert more.past_key_values.get_seq_length() == 2 * T


# Copies and files


def test_a_deepcopy_is_an_independent_enabled_model():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 1, T)
    expected = prefill(model, ids).logits
    twin = copy.deepcopy(model)
    assert twin.forward.model is twin
    assert twin.forward.strict
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    assert_enabled_equals_oracle(twin, ids)
    assert torch.equal(prefill(model, ids).logits, expected)
    assert handle_of(twin) != handle_of(model)
    pop_ext.disable(model)
    assert_enabled_equals_oracle(twin, ids)


def test_a_deepcopy_outlives_the_original():
    model = pop_ext.enable(llama(), PLAN)
    twin = copy.deepcopy(model)
    gone = weakref.ref(model)
    del model
    assert gone() is None
    assert_enabled_equals_oracle(twin, tokens(twin, 1, T))


def test_a_shallow_copy_shares_weights_and_prefills_as_the_original():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 1, T)
    twin = copy.copy(model)
    multiply_in_place(model)
    assert_enabled_equals_oracle(twin, ids)
    assert_enabled_equals_oracle(model, ids)


def test_disabling_or_enabling_a_shallow_copy_leaves_the_original_alone():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids, before = tokens(model, 1, T), model.forward
    twin = copy.copy(model)
    pop_ext.enable(twin, OTHER)
    assert_enabled_equals_oracle(twin, ids, OTHER)
    assert_enabled_equals_oracle(model, ids, PLAN)
    pop_ext.disable(twin)
    with pytest.raises(ValueError, match="expected an enabled model"):
        pop_ext.last_call(twin)
    assert model.forward is before
    assert_enabled_equals_oracle(model, ids, PLAN)


def test_disabling_the_original_leaves_a_shallow_copy_enabled():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    twin = copy.copy(model)
    pop_ext.disable(model)
    assert_enabled_equals_oracle(twin, tokens(model, 1, T))


THROUGH = [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]


@pytest.mark.parametrize("through", THROUGH, ids=["itself", "deepcopy", "pickle"])
def test_a_shallow_copy_outlives_the_original(through):
    model = through(pop_ext.enable(llama(), PLAN, strict=True))
    gone = weakref.ref(model)
    twin = copy.copy(model)
    del model
    assert gone() is None
    ids = tokens(twin, 1, T)
    assert_enabled_equals_oracle(twin, ids)
    assert generate(twin, ids, 12).shape == (1, T + 12)
    again = through(twin)
    del twin
    multiply_in_place(again)
    assert_enabled_equals_oracle(again, ids)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickled_model_comes_back_enabled(how):
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 1, T)
    expected = prefill(model, ids).logits
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert isinstance(twin.forward, PrefillForward)
    assert (twin.forward.plan, twin.forward.strict, twin.forward.backend.name) == (PLAN, True, "native")
    assert torch.equal(prefill(twin, ids).logits, expected)
    del model
    assert_enabled_equals_oracle(twin, ids)


def test_an_enabled_model_saves_the_files_of_the_stock_model(tmp_path: Path):
    model = llama()
    model.save_pretrained(tmp_path / "stock")
    pop_ext.enable(model, PLAN)
    prefill(model, tokens(model, 1, T))
    model.save_pretrained(tmp_path / "enabled")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert sorted(path.name for path in (tmp_path / "enabled").iterdir()) == names
    for name in names:
        assert (tmp_path / "enabled" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "enabled")
    assert "forward" not in loaded.__dict__


def test_the_state_dict_is_unchanged():
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.named_modules())
    pop_ext.enable(model, PLAN)
    prefill(model, tokens(model, 1, T))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert list(model.named_modules()) == modules


# Freeing


def test_disable_frees_the_native_handle():
    model = pop_ext.enable(llama(), PLAN)
    handle = handle_of(model)
    assert json.loads(torch.ops.pop.info(handle))
    pop_ext.disable(model)
    assert not is_alive(handle)


def test_enabling_again_frees_the_native_handle():
    model = pop_ext.enable(llama(), PLAN)
    handle = handle_of(model)
    pop_ext.enable(model, OTHER)
    assert not is_alive(handle)
    assert is_alive(handle_of(model))


@pytest.mark.filterwarnings("ignore:pop_ext")
def test_stats_count_calls_of_all_threads_by_rule_since_enable():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    assert pop_ext.stats(model) == {}
    ids = tokens(model, 1, T)
    generate(model, ids, 3)  # a prefill and decode steps
    prefill(model, ids)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(pop_ext.PrefillDeclined):
            model(ids)  # logits of all rows
    pop_ext.explain(model, ids)
    assert list(pop_ext.stats(model).items()) == [("logits_to_keep", 2), ("prefill", 2)]
    run_threads(*[lambda: [prefill(model, ids) for _ in range(5)]] * 2)
    assert list(pop_ext.stats(model).items()) == [("prefill", 12), ("logits_to_keep", 2)]
    pop_ext.stats(model).clear()
    assert pop_ext.stats(copy.deepcopy(model)) == {}
    assert pop_ext.stats(model)["prefill"] == 12
    assert pop_ext.stats(pop_ext.enable(model, OTHER)) == {}
    with pytest.raises(ValueError, match="model: expected an enabled model"):
        pop_ext.stats(pop_ext.disable(model))


@pytest.mark.parametrize("declined", [False, True], ids=["a prefill", "a declined call"])
def test_a_deleted_model_is_freed_at_once(declined):
    gc.disable()
    try:
        model = pop_ext.enable(llama(), PLAN)
        output = prefill(model, tokens(model, 1, T))
        if declined:
            with torch.no_grad():
                output = model(tokens(model, 1, T))  # logits of all rows
            assert pop_ext.last_call(model).rule == "logits_to_keep"
        handle, gone = handle_of(model), weakref.ref(model)
        weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
        del model, output
        assert gone() is None
        assert weight() is None
        assert not is_alive(handle)
    finally:
        gc.enable()


def test_a_forward_outlives_its_model_as_a_bound_method_does():
    model = pop_ext.enable(llama(), PLAN)
    ids = tokens(model, 1, T)
    expected = prefill(model, ids).logits
    forward = model.forward
    del model
    with torch.no_grad():
        assert torch.equal(forward(ids, logits_to_keep=1).logits, expected)


# Several models and threads


def test_two_enabled_models_do_not_disturb_each_other():
    one, two = pop_ext.enable(llama(), PLAN), pop_ext.enable(qwen2(), OTHER)
    ids = tokens(one, 1, T)
    for _ in range(2):
        assert_enabled_equals_oracle(one, ids, PLAN)
        assert_enabled_equals_oracle(two, ids, OTHER)
    pop_ext.disable(one)
    assert_enabled_equals_oracle(two, ids, OTHER)


@pytest.mark.parametrize("build", [llama, mistral])
def test_two_threads_generate_at_once_on_one_model(build):
    model = pop_ext.enable(build(), PLAN, strict=True)
    prompts = [tokens(model, 1, n, seed=n) for n in (T, 33)]
    expected = [generate(model, prompt) for prompt in prompts]
    actual = run_threads(*(lambda prompt=prompt: [generate(model, prompt) for _ in range(4)] for prompt in prompts))
    for outputs, wanted in zip(actual, expected, strict=True):
        assert all(torch.equal(output, wanted) for output in outputs)


def test_two_threads_may_make_the_first_call_of_a_copy():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 1, T)
    expected = prefill(model, ids).logits
    for _ in range(3):
        twin = copy.deepcopy(model)
        for output in run_threads(*[lambda twin=twin: prefill(twin, ids).logits] * 2):
            assert torch.equal(output, expected)


def test_the_oracle_does_not_disable_native_prefill_in_another_thread():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    with model.forward.stock_inside():
        assert run_threads(lambda: prefill(model, tokens(model, 1, T)).logits)


def test_an_enabled_model_emits_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = pop_ext.enable(llama(), PLAN)
        generate(model, tokens(model, 1, T), 3)
        pop_ext.disable(model)
