"""Test code that others put around `model.forward` after `enable`: compilers, accelerate, users."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pop_ext
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from enabled_models import OTHER, PLAN, T, assert_enabled_equals_oracle, handle_of, is_alive, multiply_in_place, prefill
from models import llama, tokens
from pop_ext.hf.forward import PrefillForward
from pop_ext.methods.calibration import stock_evaluation
from tolerance import assert_close_fp32
from torch import nn

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)


def compile_forward(model: nn.Module) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def wrap_as_functools_does(model: nn.Module) -> None:
    inside = model.forward

    @functools.wraps(inside, assigned=())
    def forward(*args: Any, **kwargs: Any) -> Any:
        return inside(*args, **kwargs)

    model.forward = forward


def bind_as_a_partial(model: nn.Module) -> None:
    model.forward = functools.partial(model.forward, use_cache=True)


def bind_as_a_method(model: nn.Module) -> None:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return inside(self, *args, **kwargs)

    inside = forward.__wrapped__ = model.forward
    model.forward = forward.__get__(model)


def compile_and_wrap(model: nn.Module) -> None:
    compile_forward(model)
    wrap_as_functools_does(model)


WRAPS = [compile_forward, wrap_as_functools_does, bind_as_a_partial, bind_as_a_method, compile_and_wrap]


@pytest.fixture(params=WRAPS, ids=lambda wrap: wrap.__name__)
def wrapped(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[..., Any]]:
    """Return an enabled model with something around its forward, and that."""
    model = pop_ext.enable(llama(), PLAN, strict=True)
    request.param(model)
    return model, model.forward


@torch.no_grad()
def assert_stock(model: nn.Module, ids: torch.Tensor) -> None:
    expected = llama()(ids, logits_to_keep=1).logits
    assert_close_fp32(model(ids, logits_to_keep=1, use_cache=True).logits, expected, "logits")


def test_calls_of_a_wrapped_forward_are_reported_and_explained(wrapped):
    model, _ = wrapped
    ids = tokens(model, 1, T)
    assert pop_ext.last_call(model) is None
    assert_enabled_equals_oracle(model, ids)
    assert pop_ext.stats(model) == {"prefill": 1}
    with torch.no_grad():
        assert pop_ext.explain(model, ids, logits_to_keep=1) == pop_ext.last_call(model)
        assert pop_ext.explain(model, ids).rule == "logits_to_keep"
        assert pop_ext.explain(model, ids[:, :1]).rule == "decode"
        assert len(pop_ext.score(model, [ids[0, :9]], [ids[0, 9:]])) == 1
    assert pop_ext.stats(model) == {"prefill": 1}


def test_a_wrapped_forward_is_enabled_again_and_disabled_in_place(wrapped):
    model, outer = wrapped
    ids = tokens(model, 1, T)
    prefill(model, ids)
    pop_ext.enable(model, OTHER)
    assert_enabled_equals_oracle(model, ids, OTHER)
    handle = outer_forward(model).backend.native.handle
    assert pop_ext.disable(model) is model
    assert not is_alive(handle)
    assert model.forward is outer
    assert_stock(model, ids)
    with pytest.raises(ValueError, match="expected an enabled model"):
        pop_ext.last_call(model)
    pop_ext.disable(model)
    pop_ext.enable(model, PLAN)
    assert model.forward is outer
    assert_enabled_equals_oracle(model, ids)


def outer_forward(model: nn.Module) -> PrefillForward:
    from pop_ext.hf.forward import find_prefill_forward

    return find_prefill_forward(model)


def test_enabled_restores_what_a_wrapped_forward_did_before(wrapped):
    model, outer = wrapped
    ids = tokens(model, 1, T)
    prefill(model, ids)
    before = pop_ext.last_call(model)
    with pop_ext.enabled(model, OTHER):
        assert_enabled_equals_oracle(model, ids, OTHER)
        assert pop_ext.stats(model) == {"prefill": 1}
    assert model.forward is outer
    assert pop_ext.last_call(model) is before
    assert_enabled_equals_oracle(model, ids)
    pop_ext.disable(model)
    with pop_ext.enabled(model, OTHER):
        assert_enabled_equals_oracle(model, ids, OTHER)
    assert_stock(model, ids)


def test_a_wrapped_forward_measures_importance_with_the_stock_forward(wrapped):
    model, _ = wrapped
    ids = tokens(model, 1, T)
    with stock_evaluation(model), torch.no_grad():
        assert_stock(model, ids)
    assert pop_ext.last_call(model) is None


def test_a_copy_that_still_calls_the_original_is_named():
    model = pop_ext.enable(llama(), PLAN)
    wrap_as_functools_does(model)
    twin = copy.deepcopy(model)  # as of any model, functions are not copied
    for act in (pop_ext.enable, pop_ext.disable):
        with pytest.raises(RuntimeError, match=r"calls the forward of another model.*del model.forward"):
            act(twin)
    del twin.forward
    pop_ext.enable(twin, OTHER)
    assert_enabled_equals_oracle(twin, tokens(twin, 1, T), OTHER)
    assert_enabled_equals_oracle(model, tokens(model, 1, T))


# accelerate


def prepared(model: nn.Module, precision: str) -> tuple[nn.Module, Accelerator]:
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    return accelerator.prepare(model).eval(), accelerator


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_model_unwrapped_by_accelerate_prefills_natively(precision):
    model, accelerator = prepared(pop_ext.enable(llama(), PLAN), precision)
    assert accelerator.unwrap_model(model, keep_fp32_wrapper=False) is model
    ids = tokens(model, 1, T)
    for twin in (copy.deepcopy(model), model):
        assert_enabled_equals_oracle(twin, ids)
        assert pop_ext.explain(twin, ids[:, :1]).rule == "decode"
        assert isinstance(twin.forward, PrefillForward)
        pop_ext.disable(twin)
        assert "forward" not in vars(twin)
        assert_stock(twin, ids)


@pytest.mark.parametrize(
    "act", [pop_ext.disable, lambda model: pop_ext.enable(model, OTHER)], ids=["disable", "enable"]
)
def test_a_model_unwrapped_by_accelerate_is_disabled_or_enabled_before_its_first_call(act):
    model, accelerator = prepared(pop_ext.enable(llama(), PLAN), "bf16")
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    twin, ids = copy.deepcopy(model), tokens(model, 1, T)
    act(model)
    assert_enabled_equals_oracle(twin, ids)
    if act is pop_ext.disable:
        assert_stock(model, ids)
    else:
        assert_enabled_equals_oracle(model, ids, OTHER)


def test_a_copy_of_a_model_unwrapped_by_accelerate_has_its_own_weights():
    model, accelerator = prepared(pop_ext.enable(llama(), PLAN), "bf16")
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    ids, twin = tokens(model, 1, T), copy.deepcopy(model)
    multiply_in_place(twin)
    prefill(model, ids)
    for one in (twin, pickle.loads(pickle.dumps(model)), model):
        assert_enabled_equals_oracle(one, ids)
    assert handle_of(twin) != handle_of(model)


def test_accelerates_autocast_is_part_of_the_explanation():
    model, _ = prepared(pop_ext.enable(llama(), PLAN), "bf16")
    ids = tokens(model, 1, T)
    with torch.no_grad():
        decision = pop_ext.explain(model, ids, logits_to_keep=1)
        assert (decision.rule, decision.declined) == ("autocast", True)
        assert pop_ext.last_call(model) is None
        with pytest.warns(match="autocast"):
            model(ids, logits_to_keep=1)
    assert pop_ext.last_call(model).rule == "autocast"
    assert pop_ext.stats(model) == {"autocast": 1}
    pop_ext.disable(model)
    with torch.no_grad():
        assert torch.isfinite(model(ids, logits_to_keep=1).logits).all()


# torch.export and torch.jit.trace


class Logits(nn.Module):
    """Return the logits of a call without a cache, from inside another module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False, return_dict=False)[0]


@pytest.mark.filterwarnings("error:pop_ext", "ignore:While compiling")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export_traces_the_stock_forward(strict, inside, grad):
    model = pop_ext.enable(llama(layers=2), pop_ext.Plan(2, (1,)), strict=True)
    ids = tokens(model, 1, T)
    with torch.enable_grad() if grad else torch.no_grad():
        if inside:
            exported = torch.export.export(Logits(model), (ids,), strict=strict).module()(ids)
        else:
            call = {"use_cache": False}
            exported = torch.export.export(model, (ids,), call, strict=strict).module()(ids, **call).logits
    with torch.no_grad():
        assert_close_fp32(exported, llama(layers=2)(ids).logits, "logits")
        assert pop_ext.last_call(model) is None
        assert prefill(model, ids).logits.shape[1] == 1


def test_a_model_that_is_freed_during_an_export_is_no_part_of_it():
    loaded = [pop_ext.load(llama(layers=2), pop_ext.Plan(2, (1,)))]

    class Frees(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            loaded.clear()
            return x + 1

    exported = torch.export.export(Frees(), (torch.zeros(2),), strict=False)
    assert "unload" not in str(exported.graph)
    assert torch.equal(exported.module()(torch.zeros(2)), torch.ones(2))


@pytest.mark.filterwarnings("error:pop_ext", "ignore")
@torch.no_grad()
def test_a_trace_records_the_stock_forward():
    model = pop_ext.enable(llama(layers=2), pop_ext.Plan(2, (1,)), strict=True)
    ids = tokens(model, 1, T)
    traced = torch.jit.trace(Logits(model), (ids,), check_trace=False)
    assert_close_fp32(traced(ids), llama(layers=2)(ids).logits, "logits")
    assert pop_ext.last_call(model) is None


def wrap_opaquely(model: nn.Module) -> None:
    inside = model.forward
    model.forward = lambda *args, **kwargs: inside(*args, **kwargs)


@torch.no_grad()
def test_disable_reaches_what_an_opaque_wrapper_calls():
    model = llama()
    ids = tokens(model, 2, T)
    expected = model(ids, logits_to_keep=1).logits
    pop_ext.enable(model, PLAN)
    wrap_opaquely(model)
    pruned = model(ids, logits_to_keep=1).logits
    assert not torch.equal(pruned, expected)
    with pop_ext.enabled(model, OTHER), pytest.warns(UserWarning, match="pop_ext: the stock forward runs"):
        assert torch.equal(model(ids, logits_to_keep=1).logits, expected)
    assert torch.equal(model(ids, logits_to_keep=1).logits, pruned)
    pop_ext.disable(model)
    assert torch.equal(model(ids, logits_to_keep=1).logits, expected)


@torch.no_grad()
def test_a_new_enable_switches_off_what_an_opaque_wrapper_calls():
    model = llama()
    ids = tokens(model, 2, T)
    expected = model(ids, logits_to_keep=1).logits
    pop_ext.enable(model, PLAN)
    wrap_opaquely(model)
    pop_ext.enable(model, OTHER)
    with pytest.warns(UserWarning, match="pop_ext: the stock forward runs"):
        assert torch.equal(model(ids, logits_to_keep=1).logits, expected)


def test_a_deleted_model_leaves_no_trace_of_its_wrapper():
    model = pop_ext.enable(llama(), PLAN)
    handle, weight = handle_of(model), weakref.ref(model.lm_head.weight)
    del model
    gc.collect()
    assert weight() is None
    assert not is_alive(handle)


@torch.no_grad()
def test_a_method_of_the_forward_is_pickled_once_it_is_put_back():
    model = pop_ext.enable(llama(), PLAN)
    model.forward = MethodType(model.forward, model)
    with pytest.raises(AttributeError, match=r"^model.forward: expected .* call pop_ext.last_call\(model\) first"):
        pickle.dumps(model)
    pop_ext.last_call(model)
    twin = pickle.loads(pickle.dumps(model))
    prefill(twin, tokens(twin, 2, T))
