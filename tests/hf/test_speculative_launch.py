"""Test speculative launches: a prefill starts before the validation, which then keeps or discards its result."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pop_ext
import pytest
import torch
from enabled_models import (
    PLAN,
    T,
    assert_enabled_equals_oracle,
    assert_same_bits,
    assert_same_cache,
    filled_cache,
    handle_of,
    is_alive,
    prefill,
)
from models import llama, mistral, tokens
from pop_ext import PrefillDeclined
from pop_ext.hf import native_backend, speculative_launch
from pop_ext.hf.compat import with_cache
from pop_ext.hf.speculative_launch import SpeculativeBackend
from torch import nn
from transformers import StaticCache


@pytest.fixture(autouse=True)
def asynchronous_device(monkeypatch):
    monkeypatch.setattr(speculative_launch, "ENABLED", True)
    monkeypatch.setattr(speculative_launch, "is_async", lambda device: True)


@pytest.fixture
def steps(monkeypatch):
    """Record what runs, in order: "validate", "compare" (the validation after a launch), "operator", "head"."""
    seen: list[str] = []
    validate, compare, operator = SpeculativeBackend.validate, SpeculativeBackend.is_current, torch.ops.pop.prefill
    monkeypatch.setattr(
        SpeculativeBackend, "validate", lambda self, *args: seen.append("validate") or validate(self, *args)
    )
    monkeypatch.setattr(
        SpeculativeBackend, "is_current", lambda self, *args: seen.append("compare") or compare(self, *args)
    )
    monkeypatch.setattr(torch.ops.pop, "prefill", lambda *args: seen.append("operator") or operator(*args))
    return seen


def enabled_after_a_call(**how) -> nn.Module:
    model = pop_ext.enable(llama(), PLAN, backend="native", **how)
    prefill(model, tokens(model, 1, 5))
    return model


def test_validation_runs_between_operator_and_head_from_the_second_call(steps):
    model = pop_ext.enable(llama(), PLAN, strict=True)
    model.lm_head.register_forward_pre_hook(lambda *_: steps.append("head"))
    ids = tokens(model, 1, T)
    prefill(model, ids)
    assert steps == ["validate", "operator", "head"]
    del steps[:]
    prefill(model, ids)
    assert steps == ["operator", "compare", "head"]


def test_a_confirmed_launch_equals_the_oracle():
    model = enabled_after_a_call(strict=True)
    assert_enabled_equals_oracle(model, tokens(model, 2, T))


def hook_a_layer(model: nn.Module) -> None:
    model.model.layers[2].register_forward_hook(lambda *_: None)


def replace_a_forward(model: nn.Module) -> None:
    module = model.model.layers[2].mlp
    module.forward = lambda x: 2 * type(module).forward(module, x)


def name_another_attention(model: nn.Module) -> None:
    model.config._attn_implementation = "flex_attention"


def multiply_a_weight(model: nn.Module) -> None:
    """Change a weight whose values are not sampled: only the version counter, and so only the validation, shows it."""
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.mul_(1.01)


def test_repeated_weight_changes_waste_one_launch(steps):
    model = enabled_after_a_call(strict=True)
    ran = []
    for change in (True, True, False, False):
        del steps[:]
        if change:
            multiply_a_weight(model)
        prefill(model, tokens(model, 1, T))
        ran.append(list(steps))
    validated_first = ["validate", "operator"]
    assert ran == [["operator", "compare", *validated_first], validated_first, validated_first, ["operator", "compare"]]


def test_old_weights_are_freed_before_new_ones_are_loaded(monkeypatch):
    model = enabled_after_a_call(strict=True)
    handle, alive = handle_of(model), []
    load = native_backend.NativeModel
    monkeypatch.setattr(native_backend, "NativeModel", lambda *args: alive.append(is_alive(handle)) or load(*args))
    multiply_a_weight(model)
    prefill(model, tokens(model, 1, T))
    assert alive == [False]


@pytest.mark.parametrize("kind", ["dynamic", "static", "sliding"])
def test_the_stock_forward_finds_the_cache_as_before_the_launch(kind):
    model = pop_ext.enable(mistral() if kind == "sliding" else llama(), PLAN)
    plain = pop_ext.disable(copy.deepcopy(model))
    prefill(model, tokens(model, 1, 5))
    cache = filled_cache(plain)
    if kind == "static":
        cache = StaticCache(config=plain.config, max_cache_len=40)
        with torch.no_grad():
            plain(tokens(plain, 1, 7), use_cache=True, logits_to_keep=1, **with_cache(plain, cache))
    before, found = copy.deepcopy(cache), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: found.append(copy.deepcopy(cache)))
    with torch.no_grad(), pytest.warns(UserWarning, match="the stock forward runs"):
        model(tokens(model, 1, T), logits_to_keep=1, **with_cache(model, cache))
    for ours, theirs in zip(found[0].layers, before.layers, strict=True):
        assert vars(ours).keys() == vars(theirs).keys()
        for name, value in vars(theirs).items():
            mine = vars(ours)[name]
            assert torch.equal(mine, value) if isinstance(value, torch.Tensor) else mine == value, name


def test_two_threads_launch_while_weights_change_between_calls():
    model = enabled_after_a_call(strict=True)
    ids = tokens(model, 1, T)
    for _ in range(3):
        multiply_a_weight(model)
        with ThreadPoolExecutor(2) as pool:
            outputs = list(pool.map(lambda _: prefill(model, ids).logits, range(4)))
        expected = pop_ext.load(model, PLAN).prefill(ids).logits
        assert all(torch.equal(output, expected) for output in outputs)


@pytest.mark.parametrize("change", [hook_a_layer, replace_a_forward], ids=lambda change: change.__name__)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_rejected_launch_runs_as_the_stock_model_does(change, static, steps):
    model = enabled_after_a_call()
    plain = pop_ext.disable(copy.deepcopy(model))
    for one in (model, plain):
        change(one)
    ids, caches = tokens(model, 1, T), []
    for one in (model, plain):
        caches.append(StaticCache(config=one.config, max_cache_len=40) if static else filled_cache(plain))
    del steps[:]
    with torch.no_grad(), pytest.warns(UserWarning, match="the stock forward runs"):
        output = model(ids, logits_to_keep=1, **with_cache(model, caches[0]))
    assert steps == ["operator", "compare", "validate"]
    with torch.no_grad():
        assert_same_bits(output, plain(ids, logits_to_keep=1, **with_cache(plain, caches[1])))
        assert_same_cache(caches[0], caches[1])
        del steps[:]
        model(ids, logits_to_keep=1)
    assert steps == ["validate"]  # no second launch is wasted
    assert pop_ext.last_call(model).rule == "hooks"


def test_a_call_of_another_attention_is_declined():
    model = enabled_after_a_call(strict=True)
    name_another_attention(model)
    with torch.no_grad(), pytest.raises(PrefillDeclined, match="attention implementation flex_attention"):
        model(tokens(model, 1, T), logits_to_keep=1)


def test_a_model_moved_to_another_dtype_runs_in_it(steps):
    model = enabled_after_a_call(strict=True).to(torch.bfloat16)
    output = prefill(model, tokens(model, 1, T))
    assert output.logits.dtype == torch.bfloat16
    assert torch.equal(output.logits, pop_ext.load(model, PLAN).prefill(tokens(model, 1, T)).logits)


@pytest.mark.parametrize("what", ["hook", "forward", "class", "module"])
def test_replaced_rotary_code_runs_once_as_in_the_stock_model(what, monkeypatch):
    model, fired = enabled_after_a_call(), []
    rotary = model.model.rotary_emb
    original = type(rotary).forward

    def counting(self, *args, **more):
        fired.append(1)
        return original(self, *args, **more)

    if what == "hook":
        rotary.register_forward_hook(lambda *_: fired.append(1))
    elif what == "forward":
        rotary.forward = lambda *args, **more: counting(rotary, *args, **more)
    elif what == "class":
        monkeypatch.setattr(type(rotary), "forward", counting)
    else:
        model.model.rotary_emb = type("Mine", (type(rotary),), {"forward": counting})(model.config)
    with torch.no_grad(), pytest.warns(UserWarning, match="the stock forward runs"):
        model(tokens(model, 1, T), logits_to_keep=1)
    assert len(fired) == 1


def test_an_operator_failure_is_raised_and_leaves_the_cache(monkeypatch):
    model = enabled_after_a_call(strict=True)
    cache = filled_cache(pop_ext.disable(copy.deepcopy(model)))
    before = copy.deepcopy(cache)
    monkeypatch.setattr(torch.ops.pop, "prefill", lambda *args: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(tokens(model, 1, T), logits_to_keep=1, **with_cache(model, cache))
    assert_same_cache(cache, before)


def test_ids_outside_the_vocabulary_raise_after_a_launch():
    model = enabled_after_a_call(strict=True)
    ids = tokens(model, 1, T)
    ids[0, 3] = model.config.vocab_size
    with torch.no_grad(), pytest.raises(ValueError, match="input_ids: expected ids from 0 to"):
        model(ids, logits_to_keep=1)


def test_speculative_launches_are_off_unless_enabled(monkeypatch):
    monkeypatch.setattr(speculative_launch, "ENABLED", False)
    model = enabled_after_a_call(strict=True)
    assert type(model.forward.backend) is native_backend.NativeBackend
