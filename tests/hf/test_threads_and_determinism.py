"""Test determinism: repeated calls give the same bits; batch mates, threads and thread counts change no result."""

from __future__ import annotations

import functools

import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, plan_of, run_oracle
from models import float32_twin, llama, pad, shared, tokens
from op_operands import DTYPES
from pop_ext import reference
from threads import run_threads
from tolerance import assert_close_fp32, assert_low_precision
from transformers import DynamicCache, StaticCache


def parts(out) -> list[torch.Tensor]:
    """Return logits, hidden states, and keys and values of every layer."""
    caches = [x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)]
    return [out.logits, out.hidden_states, *caches]


def assert_same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(a, b), f"part {number} differs"


# The same call


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_call_gives_the_same_bits(dtype, threads):
    torch.set_num_threads(threads)
    model = shared(dtype=dtype, hidden=128, intermediate=384)
    native = pop_ext.load(model, plan_of(model, GAPS, 2))
    ids, mask = pad([tokens(model, n, seed=n) for n in (150, 31)], "left")
    first = parts(native.prefill(ids, attention_mask=mask))
    for _ in range(3):
        assert_same_bits(parts(native.prefill(ids, attention_mask=mask)), first)
    again = pop_ext.load(model, plan_of(model, GAPS, 2))
    assert_same_bits(parts(again.prefill(ids, attention_mask=mask)), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_oracles_result(dtype):
    model = shared(dtype=dtype, hidden=128, intermediate=384)
    ids, plan = tokens(model, 2, 131), plan_of(model, GAPS, 2)
    same, truth = run_oracle(model, plan, ids), run_oracle(float32_twin(model), plan, ids)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        out = pop_ext.load(model, plan).prefill(ids)
        if dtype == torch.float32:
            assert_close_fp32(out.logits, same.logits, f"logits under {threads} threads")
        else:
            assert_low_precision(out.logits, same.logits, truth.logits, f"logits under {threads} threads")


def test_every_cache_kind_gives_the_same_logits():
    model = shared()
    native = pop_ext.load(model, plan_of(model))
    ids = tokens(model, 1, 40)
    expected = native.prefill(ids).logits
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=77)):
        assert torch.equal(native.prefill(ids, past_key_values=cache).logits, expected)


def test_a_call_leaves_no_state_for_the_next():
    # In between: a call of another shape, and one that fails.
    model = shared()
    native = pop_ext.load(model, plan_of(model))
    ids = tokens(model, 2, 40)
    first = parts(native.prefill(ids))
    native.prefill(tokens(model, 1, 300))
    with pytest.raises(ValueError, match="boundary"):
        native.prefill(ids, boundary=1000)
    assert_same_bits(parts(native.prefill(ids)), first)


def test_uninitialised_memory_is_never_read():
    # In its deterministic mode torch fills new memory with NaN.
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        model = shared()
        ids, mask = pad([tokens(model, n, seed=n) for n in (40, 9)], "left")
        out = pop_ext.load(model, plan_of(model, GAPS, 2)).prefill(ids, attention_mask=mask)
        assert all(part.isfinite().all() for part in parts(out))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


# Batch mates


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("mates", [[3], [40, 1], [200, 7, 65]], ids=str)
def test_a_sequence_does_not_depend_on_its_batch_mates(mates, family):
    model = shared(family)
    native = pop_ext.load(model, plan_of(model, GAPS, 2))
    prompt = tokens(model, 40, seed=99)
    alone = native.prefill(prompt[None])
    for place in range(len(mates) + 1):
        sequences = [tokens(model, n, seed=n) for n in mates]
        sequences.insert(place, prompt)
        ids, mask = pad(sequences, "left")
        out = native.prefill(ids, attention_mask=mask)
        assert_close_fp32(out.logits[place], alone.logits[0], "logits", atol=2e-5)
        for ours, theirs in zip(out.past_key_values.layers, alone.past_key_values.layers, strict=True):
            assert_close_fp32(ours.keys[place, :, -40:], theirs.keys[0], "keys", atol=2e-5)
            assert_close_fp32(ours.values[place, :, -40:], theirs.values[0], "values", atol=2e-5)


def test_a_bfloat16_sequence_in_a_batch_stays_within_tolerance():
    model = shared(dtype=torch.bfloat16)
    plan, prompt = plan_of(model, GAPS, 2), tokens(model, 40, seed=99)
    ids, mask = pad([tokens(model, 200), prompt, tokens(model, 3)], "left")
    out = pop_ext.load(model, plan).prefill(ids, attention_mask=mask)
    same = run_oracle(model, plan, prompt[None])
    truth = run_oracle(float32_twin(model), plan, prompt[None])
    assert_low_precision(out.logits[1:2], same.logits, truth.logits, "logits")


def test_a_nan_in_one_sequence_stays_there():
    model = shared()
    native = pop_ext.load(model, plan_of(model))
    embeds = model.model.embed_tokens(tokens(model, 2, 40)).detach()
    expected = native.prefill(inputs_embeds=embeds)
    poisoned = embeds.clone()
    poisoned[0, 7] = float("nan")
    out = native.prefill(inputs_embeds=poisoned)
    assert out.logits[0].isnan().all()
    assert_close_fp32(out.logits[1], expected.logits[1], "logits", atol=2e-5)


# Threads of the caller


def repeated(native, ids, times: int = 6):
    return lambda: [parts(native.prefill(ids)) for _ in range(times)]


def test_two_threads_prefilling_one_model_give_the_serial_results():
    model = shared(hidden=128, intermediate=384)
    native = pop_ext.load(model, plan_of(model, GAPS, 2))
    prompts = [tokens(model, 2, 130, seed=1), tokens(model, 1, 190, seed=2)]
    serial = [parts(native.prefill(ids)) for ids in prompts]
    for results, expected in zip(run_threads(*(repeated(native, ids) for ids in prompts)), serial, strict=True):
        for result in results:
            assert_same_bits(result, expected)


def test_two_threads_prefilling_two_models_give_the_serial_results():
    models = [shared("llama"), shared("qwen2")]
    natives = [pop_ext.load(model, plan_of(model, omit, 2)) for model, omit in zip(models, (GAPS, LAST), strict=True)]
    prompts = [tokens(models[0], 2, 130, seed=1), tokens(models[1], 1, 190, seed=2)]
    serial = [parts(native.prefill(ids)) for native, ids in zip(natives, prompts, strict=True)]
    jobs = [repeated(native, ids) for native, ids in zip(natives, prompts, strict=True)]
    for results, expected in zip(run_threads(*jobs), serial, strict=True):
        for result in results:
            assert_same_bits(result, expected)


def test_two_threads_run_the_oracle_of_one_model_at_once():
    model = shared()
    prompts = [tokens(model, 1, 30, seed=seed) for seed in (1, 2)]

    def run_oracle_repeatedly(ids):
        return [reference.prefill(model, ids, plan_of(model, GAPS, 2))[0] for _ in range(4)]

    serial = [run_oracle_repeatedly(ids)[0] for ids in prompts]
    for results, expected in zip(
        run_threads(*(functools.partial(run_oracle_repeatedly, ids) for ids in prompts)), serial, strict=True
    ):
        assert all(torch.equal(result, expected) for result in results)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_loading_and_freeing_models_does_not_disturb_a_prefill():
    model = llama(layers=3)
    native = pop_ext.load(model, pop_ext.Plan.last(3))
    ids = tokens(model, 1, 150)
    expected = parts(native.prefill(ids))

    def load_and_free():
        return [pop_ext.load(model, pop_ext.Plan.last(3)).handle for _ in range(20)]

    results, handles = run_threads(repeated(native, ids, 10), load_and_free)
    assert len(set(handles)) == 20
    for result in results:
        assert_same_bits(result, expected)


def test_refresh_does_not_disturb_a_prefill_in_another_thread():
    model = llama(layers=3)
    native = pop_ext.load(model, pop_ext.Plan.last(3))
    ids = tokens(model, 1, 150)
    expected = parts(native.prefill(ids))
    results, _ = run_threads(repeated(native, ids, 10), lambda: [native.refresh() for _ in range(30)])
    for result in results:
        assert_same_bits(result, expected)
