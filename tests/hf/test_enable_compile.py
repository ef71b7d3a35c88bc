"""Test `torch.compile` before and after `enable`: prefills run natively, decode steps run compiled."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pop_ext
import pytest
import torch
from enabled_models import T, generate, prefill
from models import gemma3, llama, mistral, tokens
from pop_ext import Plan
from tolerance import assert_close_fp32
from torch import Tensor, nn
from transformers import CompileConfig, LlamaForCausalLM


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tiny() -> LlamaForCausalLM:
    return llama(layers=2)


TINY_PLAN = Plan(2, (0,))


def prefill_and_decode(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Return the logits of a prefill and of two decode steps."""
    with torch.no_grad():
        output = model(ids, logits_to_keep=1, use_cache=True)
        steps = [output.logits]
        for token in (3, 5):
            ids = torch.full((len(ids), 1), token)
            output = model(ids, logits_to_keep=1, past_key_values=output.past_key_values, use_cache=True)
            steps.append(output.logits)
    return steps


def assert_compiled_prefills_natively(compiled: nn.Module, model: nn.Module) -> None:
    ids = tokens(model, 2, T)
    expected = prefill_and_decode(pop_ext.enable(copy.deepcopy(tiny()), TINY_PLAN), ids)
    for actual, wanted in zip(prefill_and_decode(compiled, ids), expected, strict=True):
        assert_close_fp32(actual, wanted, "logits")
    assert pop_ext.last_call(compiled).native
    assert pop_ext.last_call(compiled).tokens == (T, T)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_compiled_after_enable_prefills_natively(backend):
    model = pop_ext.enable(tiny(), TINY_PLAN, strict=True)
    compiled = torch.compile(model, backend=backend)
    assert_compiled_prefills_natively(compiled, model)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_compiled_and_run_before_enable_prefills_natively():
    model = tiny()
    compiled = torch.compile(model, backend="eager")
    ids = tokens(model, 2, T)
    stock = prefill_and_decode(compiled, ids)
    assert pop_ext.enable(compiled, TINY_PLAN, strict=True) is compiled
    assert_compiled_prefills_natively(compiled, model)
    pop_ext.disable(compiled)
    for actual, wanted in zip(prefill_and_decode(compiled, ids), stock, strict=True):
        assert_close_fp32(actual, wanted, "logits")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("first", ["compile", "enable"])
def test_model_compile_keeps_the_native_prefill(first):
    model = tiny()
    if first == "compile":
        model.compile(backend="eager")
        prefill_and_decode(model, tokens(model, 2, T))
    pop_ext.enable(model, TINY_PLAN, strict=True)
    if first == "enable":
        model.compile(backend="eager")
    assert_compiled_prefills_natively(model, model)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_forward_is_kept_for_decode():
    model = tiny()
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    model.forward = torch.compile(model.forward, backend=backend)
    pop_ext.enable(model, TINY_PLAN, strict=True)
    assert_compiled_prefills_natively(model, model)
    assert compiled


@pytest.mark.usefixtures("fresh_compiler")
def test_a_decode_step_compiles_to_one_graph():
    model = pop_ext.enable(tiny(), TINY_PLAN, strict=True)
    ids = tokens(model, 1, T)
    cache = prefill(model, ids).past_key_values
    step = {"past_key_values": cache, "logits_to_keep": 1, "use_cache": True}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(ids[:, :1], **copy.deepcopy(step)).logits
        assert_close_fp32(compiled(ids[:, :1], **step).logits, expected, "logits")


@pytest.mark.usefixtures("fresh_compiler")
def test_generate_of_a_compiled_model_prefills_natively():
    model = pop_ext.enable(tiny(), TINY_PLAN, strict=True)
    ids = tokens(model, 1, T)
    expected = generate(model, ids, 4)
    model.compile(backend="eager")
    assert torch.equal(generate(model, ids, 4), expected)
    assert torch.equal(generate(torch.compile(model, backend="eager"), ids, 4), expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("build", [llama, mistral, gemma3])
def test_generate_that_compiles_decode_for_a_static_cache_prefills_natively(build):
    model = pop_ext.enable(build(layers=3), Plan(3, (1,)), strict=True)
    ids = tokens(model, 1, T)
    expected = generate(model, ids, 4)
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True  # by default only on accelerators
    output = generate(model, ids, 4, cache_implementation="static", compile_config=config)
    assert torch.equal(output, expected)
    assert pop_ext.last_call(model).tokens == (T,)
    assert hasattr(model, "_compiled_call")


def test_load_unwraps_a_compiled_model():
    model = tiny()
    ids = tokens(model, 2, T)
    native = pop_ext.load(torch.compile(model, backend="eager"), TINY_PLAN)
    assert native.model is model
    assert torch.equal(native.prefill(ids).logits, pop_ext.load(model, TINY_PLAN).prefill(ids).logits)
