"""Test calls of an enabled model that are no prefill, harmless hooks, and what `explain` and `last_call` report."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pop_ext
import pytest
import torch
from enabled_models import (
    LAYERS,
    PLAN,
    T,
    assert_same_bits,
    assert_same_cache,
    enabled_twin,
    filled_cache,
    generate,
    offload_with_accelerate,
    recorded,
)
from models import llama, mistral, offloaded_cache, pad, qwen2, tokens
from pop_ext import reference
from pop_ext.hf.compat import with_cache
from pop_ext.hf.patches import InnerModules
from tolerance import assert_close_fp32, compare_caches
from torch import nn
from transformers import DynamicCache, StaticCache

# Calls that are no prefill


def assert_silent_stock(model: nn.Module, rule: str, ids: torch.Tensor, **call: Any) -> None:
    """Assert that the call gives the bits of the stock model without a warning, strict or not."""
    expected = model(ids, **copy.deepcopy(call))
    for strict in (False, True):
        twin = enabled_twin(model, strict=strict)
        decision = pop_ext.explain(twin, ids, **call)
        assert (decision.backend, decision.rule, decision.declined) == ("stock", rule, False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            actual = twin(ids, **copy.deepcopy(call))
        assert_same_bits(actual, expected)
        assert pop_ext.last_call(twin) is None


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("past", [0, 7])
def test_a_decode_step_never_warns_or_raises(keep, grad, past):
    model = llama()
    cache = filled_cache(model, past) if past else DynamicCache()
    with torch.set_grad_enabled(grad):
        call = {**with_cache(model, cache), "logits_to_keep": keep, "output_hidden_states": True}
        assert_silent_stock(model, "decode", tokens(model, 1, 1), **call)


@torch.no_grad()
def test_a_decode_step_by_embeddings_never_warns_or_raises():
    model = llama()
    embeds = model.get_input_embeddings()(tokens(model, 1, 1))
    expected = model(inputs_embeds=embeds, **with_cache(model, filled_cache(model)), use_cache=False)
    twin = enabled_twin(model, strict=True)
    assert_same_bits(twin(inputs_embeds=embeds, **with_cache(model, filled_cache(model)), use_cache=False), expected)


@pytest.mark.parametrize("other", [{}, {"output_hidden_states": True}], ids=str)
@pytest.mark.parametrize("keep", [0, 4, 9])
@torch.no_grad()
def test_verifying_candidates_never_warns_or_raises(keep, other):
    model = llama()
    call = {**with_cache(model, filled_cache(model)), "logits_to_keep": keep, **other}
    assert_silent_stock(model, "verification", tokens(model, 1, 4), **call)


@torch.no_grad()
def test_verifying_candidates_in_a_static_cache_never_warns_or_raises():
    model = llama()
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(tokens(model, 1, 7), past_key_values=cache, logits_to_keep=1)
    assert_silent_stock(model, "verification", tokens(model, 1, 4), **with_cache(model, cache), logits_to_keep=4)


@pytest.mark.parametrize("backend", ["native", "reference"])
@torch.no_grad()
def test_an_offloaded_cache_is_left_to_the_stock_forward(backend):
    model = pop_ext.enable(llama(), PLAN, backend=backend)
    # Not run: on a CPU transformers has no stream to offload with.
    decision = pop_ext.explain(model, tokens(model, 1, T), past_key_values=offloaded_cache(model), logits_to_keep=1)
    assert (decision.backend, decision.rule, decision.declined) == ("stock", "cache", True)
    assert "an offloaded one" in decision.reason


def test_a_chunk_that_is_all_padding_for_a_sequence_runs_the_stock_forward():
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T)], "left")
    outputs = []
    for backend in ("native", "reference"):
        twin = enabled_twin(model, backend=backend)
        decisions = recorded(twin)
        with pytest.warns(match="expected at least one new token for sequence 0"):
            outputs.append(generate(twin, ids, 12, attention_mask=mask, prefill_chunk_size=7))
        assert [(d.backend, d.rule) for d in decisions] == [
            ("stock", "mask"),
            ("stock", "mask"),
            (backend, "prefill"),
        ]
    assert torch.equal(*outputs)


@torch.no_grad()
def test_an_early_exit_call_never_warns_or_raises():
    model = llama()
    model.config.num_hidden_layers = 3  # as generate sets it to draft by early exit
    expected = model(tokens(model, 1, T), logits_to_keep=1)
    model.config.num_hidden_layers = LAYERS
    twin = enabled_twin(model, strict=True)
    twin.config.num_hidden_layers = 3
    assert pop_ext.explain(twin, tokens(model, 1, T), logits_to_keep=1).rule == "early_exit"
    assert_same_bits(twin(tokens(model, 1, T), logits_to_keep=1), expected)
    assert pop_ext.last_call(twin) is None


# Hooks and other changes that keep a prefill native


@torch.no_grad()
def test_transformers_own_recording_hooks_are_harmless():
    model = pop_ext.enable(llama(), PLAN)
    ids = tokens(model, 1, T)
    with pytest.warns(UserWarning, match="output_hidden_states"):
        recorded = model(ids, logits_to_keep=1, output_hidden_states=True)
    assert len(recorded.hidden_states) == LAYERS + 1
    assert any(layer._forward_hooks for layer in model.model.layers)
    model(ids, logits_to_keep=1)
    assert pop_ext.last_call(model).native


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_the_hook_that_gradient_checkpointing_leaves_on_the_embedding_is_harmless(inference, backend):
    model = llama()
    ids = tokens(model, 1, T)
    # Renamed in transformers 5.23.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.eval()
    assert model.model.embed_tokens._forward_hooks
    pop_ext.enable(model, PLAN, strict=True, backend=backend)
    with inference():
        output = model(ids, logits_to_keep=1)
        assert pop_ext.last_call(model).rule == "prefill"
        assert not output.logits.requires_grad
        expected, cache = reference.prefill(llama(), ids, PLAN)
        assert_close_fp32(output.logits, expected, "logits")
        compare_caches(output.past_key_values, cache)
    assert len(generate(model, ids, 3)[0]) == T + 3


def test_a_users_hook_named_like_that_of_gradient_checkpointing_is_declined():
    def make_inputs_require_grads(module: Any, input: Any, output: Any) -> Any:
        return output * 2

    model = llama()
    model.enable_input_require_grads()
    theirs = next(iter(model.model.embed_tokens._forward_hooks.values()))
    make_inputs_require_grads.__module__, make_inputs_require_grads.__qualname__ = (
        theirs.__module__,
        theirs.__qualname__,
    )
    model.model.embed_tokens.register_forward_hook(make_inputs_require_grads)
    pop_ext.enable(model, PLAN)
    with torch.no_grad():
        assert pop_ext.explain(model, tokens(model, 1, T), logits_to_keep=1).rule == "hooks"


@torch.no_grad()
def test_remains_of_removed_accelerate_hooks_are_harmless():
    from accelerate.hooks import remove_hook_from_submodules

    model = llama()
    offload_with_accelerate(model)
    remove_hook_from_submodules(model)
    assert "forward" in model.model.layers[0].__dict__
    pop_ext.enable(model, PLAN, strict=True)
    model(tokens(model, 1, T), logits_to_keep=1)
    assert pop_ext.last_call(model).native


@torch.no_grad()
def test_hooks_on_the_model_and_its_head_fire_as_before():
    model = llama()
    ids, seen = tokens(model, 2, T), []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits.shape))
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(ids, logits_to_keep=2)
    expected, seen[:] = list(seen), []
    pop_ext.enable(model, PLAN, strict=True)
    model(ids, logits_to_keep=2)
    assert seen == expected


@pytest.mark.parametrize("build", [llama, mistral, qwen2])
def test_a_fresh_model_carries_no_foreign_code(build):
    assert InnerModules(build()).find_patch() is None


def test_inner_modules_are_all_modules_below_the_decoder():
    model = llama()
    assert {id(m) for _, m in InnerModules(model).named} == {id(m) for m in model.model.modules()}
    assert dict(InnerModules(model).named) == dict(model.model.named_modules(prefix="model"))


def add_a_submodule(model):
    model.model.layers[1].mlp.add_module("adapter", nn.Identity())


def replace_a_module_by_an_equal_one(model):
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[1].mlp)


def replace_a_parameter_by_an_equal_one(model):
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().clone())


def add_a_bias(model):
    linear = model.model.layers[1].mlp.up_proj
    linear.bias = nn.Parameter(torch.zeros(len(linear.weight)))


def swap_two_layers(model):
    layers = model.model.layers
    layers[1], layers[2] = layers[2], layers[1]


def replace_the_decoder_by_a_copy(model):
    model.model = copy.copy(model.model)


CHANGES = (
    add_a_submodule,
    replace_a_module_by_an_equal_one,
    replace_a_parameter_by_an_equal_one,
    add_a_bias,
    swap_two_layers,
    replace_the_decoder_by_a_copy,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_inner_modules_detect_a_replaced_module_or_parameter(change):
    model = llama()
    inner = InnerModules(model)
    assert inner.matches(model)
    change(model)
    assert not inner.matches(model)


def test_the_signature_of_forward_stays_visible():
    model = llama()
    expected = inspect.signature(model.forward)
    pop_ext.enable(model, PLAN)
    assert inspect.signature(model.forward) == expected
    assert "logits_to_keep" in inspect.signature(model.forward).parameters


# min_tokens, batch mates, last_call, explain


@torch.no_grad()
def test_min_tokens_applies_to_each_sequence():
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (9, T, 10)], "left")
    twin = enabled_twin(model, PLAN.replace(min_tokens=10), strict=True)
    actual = twin(ids, attention_mask=mask, logits_to_keep=1)
    assert pop_ext.last_call(twin).tokens == (9, T, 10)
    assert pop_ext.last_call(twin).boundary == (9, 1, 1)
    expected, cache = reference.prefill(
        model, ids, PLAN, attention_mask=mask, position_ids=torch.arange(T)[None], boundary=[9, 1, 1]
    )
    assert_close_fp32(actual.logits, expected, "logits")
    compare_caches(actual.past_key_values, cache, mask=mask)


@torch.no_grad()
def test_a_prompt_below_min_tokens_equals_the_stock_model():
    model = llama()
    ids = tokens(model, 1, T)
    twin = enabled_twin(model, PLAN.replace(min_tokens=T + 1), strict=True)
    expected = model(ids, logits_to_keep=1)
    assert_close_fp32(twin(ids, logits_to_keep=1).logits, expected.logits, "logits")
    assert "full depth" in pop_ext.last_call(twin).reason


@torch.no_grad()
def test_batch_mates_do_not_change_a_result():
    model = llama()
    sequences = [tokens(model, n, seed=n) for n in (4, T, 12, 1)]
    ids, mask = pad(sequences, "left")
    twin = enabled_twin(model, PLAN.replace(min_tokens=5), strict=True)
    together = twin(ids, attention_mask=mask, logits_to_keep=1, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for i, sequence in enumerate(sequences[:3]):
        alone = twin(sequence[None], logits_to_keep=1)
        assert_close_fp32(together.logits[i : i + 1], alone.logits, f"sequence {i}")


@torch.no_grad()
def test_rows_with_requested_logits_run_at_full_depth():
    model = llama()
    ids = tokens(model, 1, T)
    twin = enabled_twin(model, strict=True)
    actual = twin(ids, logits_to_keep=4)
    assert pop_ext.last_call(twin).boundary == (4,)
    expected, _ = reference.prefill(model, ids, PLAN, logits_to_keep=4)
    assert_close_fp32(actual.logits, expected, "logits")


@torch.no_grad()
def test_last_call_is_the_latest_prefill_and_ignores_decode():
    model = pop_ext.enable(llama(), PLAN)
    assert pop_ext.last_call(model) is None
    output = model(tokens(model, 2, T), logits_to_keep=1)
    prefill = pop_ext.last_call(model)
    assert (prefill.backend, prefill.tokens, prefill.boundary, prefill.plan) == ("native", (T, T), (1, 1), PLAN)
    model(tokens(model, 2, 1), past_key_values=output.past_key_values, logits_to_keep=1)
    assert pop_ext.last_call(model) is prefill
    with pytest.warns(match="logits_to_keep=0"):
        model(tokens(model, 1, T))
    assert pop_ext.last_call(model).rule == "logits_to_keep"


@torch.no_grad()
def test_explain_describes_a_prefill_without_touching_the_cache():
    model = pop_ext.enable(llama(), PLAN)
    cache = filled_cache(model)
    before = copy.deepcopy(cache)
    decision = pop_ext.explain(model, tokens(model, 1, T), past_key_values=cache, logits_to_keep=1)
    assert decision.native
    assert (
        str(decision) == f"native prefill: a prefill; 1 sequence(s), {T} new tokens, {T - 1} of them omit 3 of 6 layers"
    )
    assert_same_cache(cache, before)


def test_explain_of_a_model_that_is_not_enabled_raises():
    with pytest.raises(ValueError, match="expected an enabled model"):
        pop_ext.explain(llama(), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="expected an enabled model"):
        pop_ext.last_call(llama())
