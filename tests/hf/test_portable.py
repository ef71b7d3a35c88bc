"""Test the portable backend: one forward of the model's own modules equals the oracle for every family and call."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, OMITS, plan_of
from cache_kinds import KINDS, new_cache
from enabled_models import generate
from hook_reference import context_rows, held_back_forward
from models import FAMILIES, WINDOW, float32_twin, hyperclovax, llama, pad, shared, tokens
from other_families import shared_other
from pop_ext import Plan, reference
from pop_ext.hf import portable_backend, restore
from pop_ext.hf.compat import cache_of
from portable_calls import Broken, T, fitted, run_portable
from threads import run_threads
from tolerance import assert_close_fp32, assert_low_precision, compare_caches
from torch import Tensor, nn
from transformers import Cache, StaticCache
from vision_models import BATCHES, VISION, prompt


def assert_equals_oracle(model: nn.Module, plan: Plan, ids: Tensor, past: Cache | None = None, **call: Any) -> None:
    """Compare logits, and K and V of every layer and real position, with the oracle in float32."""
    before = copy.deepcopy(past)
    output = run_portable(model, plan, ids, past, **call)
    logits, cache = reference.prefill(model, ids, plan, past_key_values=before, **call)
    assert_close_fp32(output.logits, logits, "logits")
    filled = cache_of(output)
    mask = call.get("attention_mask")
    if mask is not None:  # the stock forward writes K and V of padding, which nobody reads
        for layer in filled.layers:
            layer.keys = layer.keys * mask[:, None, -layer.keys.shape[2] :, None]
            layer.values = layer.values * mask[:, None, -layer.values.shape[2] :, None]
    compare_caches(filled, cache)


@pytest.mark.parametrize("omit", OMITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_oracle(family, omit):
    model = shared(family)
    assert_equals_oracle(model, plan_of(model, OMITS[omit]), tokens(model, 2, T))


def test_sinks_of_attention_equal_the_oracle():
    """gpt-oss has a native form, but not with packed experts."""
    model = shared_other("gpt_oss")
    assert_equals_oracle(model, plan_of(model, GAPS, 2), tokens(model, 2, T))


@pytest.mark.parametrize("boundary", [2, 17, T - 1, T])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral", "phi3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_boundary_equals_the_oracle(family, boundary, attention):
    model = shared(family, attn_implementation=attention)
    assert_equals_oracle(model, plan_of(model, GAPS, boundary), tokens(model, 2, T))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_close_as_the_oracle(family, dtype):
    model = shared(family, dtype=dtype)
    plan, ids = plan_of(model, GAPS, 2), tokens(model, 2, T)
    output = run_portable(model, plan, ids)
    same, truth = reference.prefill(model, ids, plan), reference.prefill(float32_twin(model), ids, plan)
    assert_low_precision(output.logits, same[0], truth[0], "logits")
    compare_caches(cache_of(output), same[1], oracle_fp32=truth[1])


@pytest.mark.parametrize("omit", [(), (5,)], ids=["nothing", "the last layer"])
@pytest.mark.parametrize("family", [*FAMILIES, "hyperclovax"])
def test_omitting_nothing_that_is_read_equals_the_stock_model(family, omit):
    model = hyperclovax() if family == "hyperclovax" else shared(family)
    ids = tokens(model, 2, T)
    with torch.no_grad():
        expected = model(ids, logits_to_keep=1, use_cache=True)
    output = run_portable(model, plan_of(model, omit), ids)
    assert_close_fp32(output.logits, expected.logits, "logits")
    compare_caches(cache_of(output), cache_of(expected))


@pytest.mark.parametrize("boundary", [1, 4])
@pytest.mark.parametrize("min_tokens", [0, 12])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "olmo2", "mixtral"])
def test_padded_sequences_are_pruned_each_by_itself(family, min_tokens, boundary):
    # With min_tokens the short sequences run at full depth beside a pruned one.
    model = shared(family)
    ids, mask = pad([tokens(model, n, seed=n) for n in (T, 11, 2)], "left")
    plan = plan_of(model, GAPS, boundary).replace(min_tokens=min_tokens)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = run_portable(model, plan, ids, attention_mask=mask, position_ids=positions)
    for i, length in enumerate((T, 11, 2)):
        each = {"boundary": length} if length < min_tokens else {}
        expected, cache = reference.prefill(model, ids[i : i + 1, T - length :], plan, **each)
        assert_close_fp32(output.logits[i : i + 1], expected, f"logits of sequence {i}")
        for ours, theirs in zip(cache_of(output).layers, cache.layers, strict=True):
            stored = min(length, ours.keys.shape[2])
            assert_close_fp32(ours.keys[i, :, -stored:], theirs.keys[0, :, -stored:], "keys")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "phi3"])
def test_later_turns_equal_the_oracle_on_every_cache(family, kind):
    model = shared(family)
    plan, past = plan_of(model, GAPS, 2), new_cache(kind, model)
    first, second = tokens(model, 1, WINDOW + 3, seed=1), tokens(model, 1, 9, seed=2)
    expected = reference.prefill(model, first, plan)[1]
    assert_close_fp32(
        run_portable(model, plan, first, past).logits, reference.prefill(model, first, plan)[0], "logits of turn 1"
    )
    logits, expected = reference.prefill(model, second, plan, past_key_values=expected)
    assert_close_fp32(run_portable(model, plan, second, past).logits, logits, "logits of turn 2")
    compare_caches(past, expected)


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": True}], ids=str
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_generation_gives_the_tokens_of_the_oracle(family, how):
    model = FAMILIES[family](**({"tied": False} if family == "gemma2" else {}))
    ids, mask = pad([tokens(model, n, seed=n) for n in (T, T - 7)], "left")
    texts = []
    for backend in ("portable", "reference"):
        with pop_ext.enabled(model, plan_of(model, LAST), strict=True, backend=backend):
            texts.append(generate(model, ids, 12, attention_mask=mask, **how))
            assert pop_ext.stats(model)["prefill"] == 1
    assert torch.equal(*texts)


def test_a_family_that_the_oracle_refuses_equals_held_back_rows():
    model = hyperclovax()
    ids = tokens(model, 2, T)
    output = run_portable(model, plan_of(model, GAPS, 3), ids)
    logits, cache = held_back_forward(model, ids, GAPS, context_rows(torch.ones_like(ids), [3, 3]))
    assert_close_fp32(output.logits, logits[:, -1:], "logits")
    compare_caches(cache_of(output), cache)


@pytest.mark.parametrize("boundary", [1, 5])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gemma3", "olmo2"])
def test_fitted_projections_equal_the_oracle(family, boundary):
    model = shared(family)
    plan = fitted(family, boundary)
    assert_equals_oracle(model, plan, tokens(model, 2, T, seed=3))
    unfitted = run_portable(model, plan.replace(projections=None), tokens(model, 2, T, seed=3))
    assert (unfitted.logits - run_portable(model, plan, tokens(model, 2, T, seed=3)).logits).abs().max() > 1e-3


def test_a_fit_keeps_to_the_context_rows_of_each_sequence():
    model, plan = shared(), fitted("llama", 2).replace(min_tokens=12)
    ids, mask = pad([tokens(model, n, seed=n) for n in (T, 11)], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = run_portable(model, plan, ids, attention_mask=mask, position_ids=positions)
    for i, length in enumerate((T, 11)):
        each = {"boundary": 11} if length == 11 else {}
        expected = reference.prefill(model, ids[i : i + 1, T - length :], plan, **each)[0]
        assert_close_fp32(output.logits[i : i + 1], expected, f"logits of sequence {i}")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", VISION)
@torch.no_grad()
def test_images_equal_the_oracle(family, batch):
    model = VISION[family]()
    given = prompt(model, *BATCHES[batch])
    plan = Plan(6, GAPS, 2)
    output = run_portable(model, plan, given.ids, **given.call)
    expected = reference.prefill(model, given.ids, plan, **given.call)[0]
    assert_close_fp32(output.logits, expected, "logits")


def test_two_threads_prefill_one_model_at_once():
    model = shared()
    plan = plan_of(model, GAPS, 2)
    prompts = [tokens(model, 1, n, seed=n) for n in (T, T + 11)]
    expected = [run_portable(model, plan, ids).logits for ids in prompts]
    with pop_ext.enabled(model, plan, strict=True, backend="portable"):

        def calls(ids: Tensor) -> list[Tensor]:
            with torch.no_grad():
                return [model(ids, logits_to_keep=1, use_cache=True).logits for _ in range(6)]

        for results, one in zip(
            run_threads(*(functools.partial(calls, ids) for ids in prompts)), expected, strict=True
        ):
            assert all(torch.equal(result, one) for result in results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["a retained layer", "an omitted layer", "the head"])
def test_a_failed_prefill_leaves_cache_and_model_as_they_were(where, kind, monkeypatch):
    model = llama()
    plan, past = plan_of(model, GAPS), new_cache(kind, model)
    run_portable(model, plan, tokens(model, 1, 7), past)
    before = copy.deepcopy(past)
    monkeypatch.setattr(portable_backend, "try_portable", lambda *_: None)
    if where == "the head":
        model.lm_head = Broken()
    else:
        model.model.layers[3 if where == "an omitted layer" else 2].mlp = Broken()
    modules = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(RuntimeError, match="broken"):
        run_portable(model, plan, tokens(model, 1, 9), past)
    compare_caches(past, before)
    assert [dict(vars(module)) for module in model.modules()] == modules


def test_attributes_that_a_forward_sets_arrive_on_the_model():
    model = VISION["qwen3_vl"]()
    given = prompt(model, [7, "image", 5])
    with torch.no_grad():
        model(given.ids, logits_to_keep=1, use_cache=True, **given.call)
        expected = model.model.rope_deltas.clone()
        model.model.rope_deltas = None
        run_portable(model, Plan(6, GAPS), given.ids, **given.call)
    assert torch.equal(model.model.rope_deltas, expected)


@torch.no_grad()
def test_context_rows_pass_no_query_output_or_mlp_of_an_omitted_layer():
    model = llama()
    rows: dict[str, list[int]] = {}
    for name in ("q_proj", "k_proj", "o_proj"):
        module = getattr(model.model.layers[4].self_attn, name)
        original = type(module).forward

        def forward(x: Tensor, module=module, original=original, name=name) -> Tensor:
            rows.setdefault(name, []).append(x.shape[1])
            return original(module, x)

        module.forward = forward
    decoder = pop_ext.portable.find_decoder(model)
    given = {"input_ids": tokens(model, 1, T), "use_cache": True, "logits_to_keep": 1}
    for _ in range(2):  # the first call also tries whether the attention takes narrow queries
        rows.clear()
        pop_ext.portable.run_forward(
            model,
            decoder,
            Plan(6, (3, 4)),
            pop_ext.portable.Rows(2, 1),
            given,
        )
    assert rows == {"q_proj": [2], "k_proj": [T, 2], "o_proj": [2]}


def test_the_decoder_of_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="expected a decoder with a list of layers, got Linear"):
        pop_ext.enable(_named_config(nn.Linear(2, 2)), Plan(6, (3,)), backend="portable")


def _named_config(module: nn.Module) -> nn.Module:
    module.config = llama().config
    return module


@torch.no_grad()
def test_a_static_cache_is_saved_as_far_as_a_call_writes(monkeypatch):
    model = pop_ext.enable(hyperclovax(layers=4), Plan(4, (1, 2)), strict=True)
    cache = StaticCache(config=model.config, max_cache_len=4096)
    model(tokens(model, 1, 9), past_key_values=cache, logits_to_keep=1)
    saved = []
    save = restore.save

    def record(tensors):
        saved.extend(tensors)
        return save(tensors)

    monkeypatch.setattr(restore, "save", record)
    model(tokens(model, 1, 5), past_key_values=cache, logits_to_keep=1)
    kept = [tensor.shape[2] for tensor in saved if tensor.ndim == 4]
    assert kept == [5] * 8
