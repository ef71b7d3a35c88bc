"""Calls that begin before the model has been looked at, as on a device that works beside the host: the look decides."""

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
from pop_ext.hf import forward
from pop_ext.hf.compat import with_cache
from pop_ext.hf.forward import PrefillForward
from torch import nn
from transformers import StaticCache


@pytest.fixture(autouse=True)
def device_beside_the_host(monkeypatch):
    monkeypatch.setattr(forward, "works_beside_the_host", lambda device: True)


@pytest.fixture
def steps(monkeypatch):
    """What runs, in its order: "look", "compare" (the look at a model that a call has begun on), "operator", "head"."""
    seen: list[str] = []
    look, compare, operator = PrefillForward._look, PrefillForward._is_as_it_was, torch.ops.pop.prefill
    monkeypatch.setattr(PrefillForward, "_look", lambda self, call: seen.append("look") or look(self, call))
    monkeypatch.setattr(PrefillForward, "_is_as_it_was", lambda self, n: seen.append("compare") or compare(self, n))
    monkeypatch.setattr(torch.ops.pop, "prefill", lambda *args: seen.append("operator") or operator(*args))
    return seen


def enabled_after_a_call(**how) -> nn.Module:
    model = pop_ext.enable(llama(), PLAN, **how)
    prefill(model, tokens(model, 1, 5))
    return model


def test_the_look_comes_between_operator_and_head_from_the_second_call_on(steps):
    model = pop_ext.enable(llama(), PLAN, strict=True)
    model.lm_head.register_forward_pre_hook(lambda *_: steps.append("head"))
    ids = tokens(model, 1, T)
    prefill(model, ids)
    assert steps == ["look", "operator", "head"]
    del steps[:]
    prefill(model, ids)
    assert steps == ["operator", "compare", "head"]


def test_a_call_that_the_look_confirms_equals_the_oracle():
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
    """In a layer whose values nobody samples: only the look sees it, where the operator sees ``multiply_in_place``."""
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.mul_(1.01)


def test_who_changes_weights_again_and_again_pays_for_one_start_in_vain(steps):
    model = enabled_after_a_call(strict=True)
    ran = []
    for change in (True, True, False, False):
        del steps[:]
        if change:
            multiply_a_weight(model)
        prefill(model, tokens(model, 1, T))
        ran.append(list(steps))
    looked_first = ["look", "operator"]
    assert ran == [["operator", "compare", *looked_first], looked_first, looked_first, ["operator", "compare"]]


def test_what_was_loaded_before_is_freed_before_the_weights_are_loaded_again(monkeypatch):
    model = enabled_after_a_call(strict=True)
    handle, alive = handle_of(model), []
    load = forward.NativeModel
    monkeypatch.setattr(forward, "NativeModel", lambda *args: alive.append(is_alive(handle)) or load(*args))
    multiply_a_weight(model)
    prefill(model, tokens(model, 1, T))
    assert alive == [False]


@pytest.mark.parametrize("kind", ["dynamic", "static", "sliding"])
def test_the_stock_forward_finds_the_cache_as_it_was_before_the_start(kind):
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


def test_two_threads_begin_calls_on_a_model_whose_weights_change_between_them():
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
def test_a_call_that_the_look_rejects_runs_as_the_stock_model_does(change, static, steps):
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
    assert steps == ["operator", "compare", "look"]
    with torch.no_grad():
        assert_same_bits(output, plain(ids, logits_to_keep=1, **with_cache(plain, caches[1])))
        assert_same_cache(caches[0], caches[1])
        del steps[:]
        model(ids, logits_to_keep=1)
    assert steps == ["look"]  # it began early once
    assert pop_ext.last_call(model).rule == "hooks"


def test_a_call_of_another_attention_is_declined():
    model = enabled_after_a_call(strict=True)
    name_another_attention(model)
    with torch.no_grad(), pytest.raises(forward.PrefillDeclined, match="attention implementation flex_attention"):
        model(tokens(model, 1, T), logits_to_keep=1)


def test_a_model_moved_to_another_dtype_runs_in_it(steps):
    model = enabled_after_a_call(strict=True).to(torch.bfloat16)
    output = prefill(model, tokens(model, 1, T))
    assert output.logits.dtype == torch.bfloat16
    assert torch.equal(output.logits, pop_ext.load(model, PLAN).prefill(tokens(model, 1, T)).logits)


@pytest.mark.parametrize("what", ["hook", "forward", "class", "module"])
def test_another_code_in_what_runs_before_the_look_runs_as_often_as_in_the_stock_model(what, monkeypatch):
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


def test_a_failure_of_its_own_is_raised_and_leaves_the_cache(monkeypatch):
    model = enabled_after_a_call(strict=True)
    cache = filled_cache(pop_ext.disable(copy.deepcopy(model)))
    before = copy.deepcopy(cache)
    monkeypatch.setattr(torch.ops.pop, "prefill", lambda *args: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(tokens(model, 1, T), logits_to_keep=1, **with_cache(model, cache))
    assert_same_cache(cache, before)


def test_bad_ids_are_named_as_ever():
    model = enabled_after_a_call(strict=True)
    ids = tokens(model, 1, T)
    ids[0, 3] = model.config.vocab_size
    with torch.no_grad(), pytest.raises(ValueError, match="input_ids: expected ids from 0 to"):
        model(ids, logits_to_keep=1)
