"""Test native.prefill into every kind of Hugging Face cache, and decode by the stock model afterwards."""

from __future__ import annotations

import copy
import functools

import pop_ext
import pytest
import torch
from against_oracle import GAPS, assert_equals_oracle, plan_of, run_native, run_oracle, run_stock
from cache_kinds import KINDS, decode, new_cache
from models import FAMILIES, WINDOW, offloaded_cache, pad, tokens
from pop_ext.hf.kv_cache import CacheTransaction
from tolerance import assert_close_fp32, compare_caches
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

MODELS = ("llama", "mistral", "qwen2 mixed")


@functools.cache
def shared(name: str):
    """Return a cached model that tests must not change."""
    family, _, mixed = name.partition(" ")
    return FAMILIES[family](use_sliding_window=True) if mixed else FAMILIES[family]()


def fill(cache, value: float):
    """Overwrite all slots of an initialised cache, also those beyond its length."""
    for layer in cache.layers:
        layer.keys.fill_(value)
        layer.values.fill_(value)


def assert_decode_equals_the_oracles(model, cache, oracle_cache, mask=None):
    """Compare decode of four fixed tokens by the stock model over both caches."""
    ids = tokens(model, cache.layers[0].keys.shape[0], 4, seed=9)
    assert_close_fp32(decode(model, cache, ids, mask), decode(model, oracle_cache, ids, mask), "decode logits")


# Each kind of cache


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 40])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_filling_an_empty_cache_and_decoding_equal_the_oracle(name, kind, length):
    model, given = shared(name), new_cache(kind, shared(name))
    plan, ids = plan_of(model, GAPS, 2), tokens(model, 2, length)
    ours = run_native(model, plan, ids, past_key_values=given)
    theirs = run_oracle(model, plan, ids)
    assert ours.cache is given
    assert_close_fp32(ours.logits, theirs.logits, "logits")
    compare_caches(given, theirs.cache)
    assert_decode_equals_the_oracles(model, given, theirs.cache)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_left_padding_leaves_exact_zeros_in_any_cache(name, kind):
    model, given = shared(name), new_cache(kind, shared(name))
    plan = plan_of(model, GAPS, 2)
    ids, mask = pad([tokens(model, n, seed=n) for n in (30, 11, 1)], "left")
    run_native(model, plan, ids, past_key_values=given, attention_mask=mask)
    theirs = run_oracle(model, plan, ids, attention_mask=mask)
    compare_caches(given, theirs.cache, mask=mask)
    assert_decode_equals_the_oracles(model, given, theirs.cache, mask)


@pytest.mark.parametrize("past", [3, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, 30])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_second_turn_over_what_the_stock_model_filled_equals_the_oracle(name, kind, past):
    model, plan = shared(name), plan_of(shared(name), GAPS, 2)
    given = new_cache(kind, model)
    run_stock(model, tokens(model, 2, past, seed=1), past_key_values=given)
    _, full = run_stock(model, tokens(model, 2, past, seed=1))
    ids = tokens(model, 2, 19)
    ours = run_native(model, plan, ids, past_key_values=given)
    theirs = run_oracle(model, plan, ids, past_key_values=full)
    assert_close_fp32(ours.logits, theirs.logits, "logits")
    compare_caches(given, theirs.cache)
    assert_decode_equals_the_oracles(model, given, theirs.cache)


@pytest.mark.parametrize("chunks", [(20, 1, 9), (1, 1, 30), (WINDOW, WINDOW, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_chunked_prefill_into_any_cache_equals_the_oracle(name, kind, chunks):
    model, plan = shared(name), plan_of(shared(name), GAPS, 2)
    given, oracle_cache = new_cache(kind, model), None
    ids = tokens(model, 1, sum(chunks))
    for chunk in ids.split(chunks, dim=1):
        ours = run_native(model, plan, chunk, past_key_values=given)
        theirs = run_oracle(model, plan, chunk, past_key_values=oracle_cache)
        oracle_cache = theirs.cache
        assert_close_fp32(ours.logits, theirs.logits, "logits")
        compare_caches(given, oracle_cache)
    assert_decode_equals_the_oracles(model, given, oracle_cache)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_alternating_prefill_and_decode_on_one_cache_equal_the_oracle(name, kind):
    model, plan = shared(name), plan_of(shared(name), GAPS, 2)
    given, oracle_cache = new_cache(kind, model), None
    for turn in range(3):
        ids = tokens(model, 1, 9, seed=turn)
        run_native(model, plan, ids, past_key_values=given)
        oracle_cache = run_oracle(model, plan, ids, past_key_values=oracle_cache).cache
        assert_decode_equals_the_oracles(model, given, oracle_cache)
    compare_caches(given, oracle_cache)


def test_without_a_cache_the_stock_cache_class_is_created():
    for name in MODELS:
        model = shared(name)
        ours = run_native(model, plan_of(model), tokens(model, 1, 20)).cache
        with torch.no_grad():
            theirs = model(tokens(model, 1, 20), use_cache=True).past_key_values
        assert type(ours) is type(theirs)
        assert [type(layer) for layer in ours.layers] == [type(layer) for layer in theirs.layers]


# Static caches


@pytest.mark.parametrize("name", MODELS)
def test_a_reset_static_cache_is_reused_in_place(name):
    model, plan = shared(name), plan_of(shared(name), GAPS, 2)
    given = new_cache("StaticCache", model)
    run_native(model, plan, tokens(model, 2, 33, seed=4), past_key_values=given)
    addresses = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in given.layers]
    given.reset()
    ids, mask = pad([tokens(model, n, seed=n) for n in (21, 5)], "left")
    run_native(model, plan, ids, past_key_values=given, attention_mask=mask)
    theirs = run_oracle(model, plan, ids, attention_mask=mask)
    compare_caches(given, theirs.cache, mask=mask)
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in given.layers] == addresses
    assert_decode_equals_the_oracles(model, given, theirs.cache, mask)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_masked_slots_of_a_reused_static_cache_become_zero(name, side):
    model, plan = shared(name), plan_of(shared(name), GAPS, 2)
    given = new_cache("StaticCache", model)
    run_native(model, plan, tokens(model, 2, 33, seed=4), past_key_values=given)
    given.reset()
    fill(given, 7.0)
    ids, mask = pad([tokens(model, n, seed=n) for n in (21, 5)], side)
    run_native(model, plan, ids, past_key_values=given, attention_mask=mask)
    compare_caches(given, run_oracle(model, plan, ids, attention_mask=mask).cache, mask=mask)


def test_static_slots_after_the_new_tokens_are_not_written():
    model = shared("llama")
    given = new_cache("StaticCache", model)
    run_native(model, plan_of(model), tokens(model, 2, 8), past_key_values=given)
    given.reset()
    fill(given, 7.0)
    run_native(model, plan_of(model), tokens(model, 2, 8), past_key_values=given)
    for layer in given.layers:
        for cache in (layer.keys, layer.values):
            assert (cache[:, :, 8:] == 7.0).all()
            assert not (cache[:, :, :8] == 7.0).any()


def test_holes_from_right_padding_in_a_static_cache_are_skipped():
    model, plan = shared("llama"), plan_of(shared("llama"), GAPS, 2)
    given, oracle_cache, mask = new_cache("StaticCache", model), None, torch.zeros(2, 0, dtype=torch.long)
    for turn, lengths in enumerate([(13, 5), (2, 9), (6, 6)]):
        ids, new_mask = pad([tokens(model, n, seed=10 * turn + n) for n in lengths], "right")
        mask = torch.cat([mask, new_mask], dim=1)
        ours = run_native(model, plan, ids, past_key_values=given, attention_mask=mask)
        theirs = run_oracle(model, plan, ids, past_key_values=oracle_cache, attention_mask=mask)
        oracle_cache = theirs.cache
        assert_close_fp32(ours.logits, theirs.logits, "logits")
        compare_caches(given, oracle_cache, mask=mask)
    assert_decode_equals_the_oracles(model, given, oracle_cache, mask)


@pytest.mark.parametrize("kind", ["DynamicCache(config)", "StaticCache"])
def test_holes_in_a_windowed_cache_are_refused(kind):
    model = shared("mistral")
    native, given = pop_ext.load(model, plan_of(model)), new_cache(kind, model)
    ids, mask = pad([tokens(model, n, seed=n) for n in (13, 5)], "right")
    native.prefill(ids, attention_mask=mask, past_key_values=given)
    before = copy.deepcopy(given)
    mask = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], dim=1)
    with pytest.raises(ValueError, match="attention_mask: expected consecutive real tokens .* sliding-window cache"):
        native.prefill(tokens(model, 2, 4), attention_mask=mask, past_key_values=given)
    compare_caches(given, before, atol=0.0)


def test_a_static_cache_of_exactly_the_needed_length_is_enough():
    model = shared("llama")
    given = new_cache("StaticCache", model, capacity=19)
    run_native(model, plan_of(model), tokens(model, 1, 11), past_key_values=given)
    run_native(model, plan_of(model), tokens(model, 1, 8, seed=2), past_key_values=given)
    assert int(given.get_seq_length()) == 19


@pytest.mark.parametrize("name", MODELS)
def test_a_too_small_static_cache_is_refused_and_unchanged(name):
    model = shared(name)
    given = new_cache("StaticCache", model, capacity=12)
    native = pop_ext.load(model, plan_of(model))
    with pytest.raises(ValueError, match=r"past_key_values: .*expected room for 13 positions.*got .* 12"):
        native.prefill(tokens(model, 1, 13), past_key_values=given)
    assert not any(layer.is_initialized for layer in given.layers)
    native.prefill(tokens(model, 1, 9), past_key_values=given)
    before = copy.deepcopy(given)
    with pytest.raises(ValueError, match=r"past_key_values: .*expected room for 13 positions.*got .* 12"):
        native.prefill(tokens(model, 1, 4), past_key_values=given)
    compare_caches(given, before, atol=0.0)


def test_a_cache_window_that_drops_visible_positions_is_refused():
    model, other = shared("mistral"), FAMILIES["mistral"](sliding_window=WINDOW // 2)
    native = pop_ext.load(model, plan_of(model))
    native.prefill(tokens(model, 1, WINDOW // 2 - 1), past_key_values=DynamicCache(config=other.config))
    with pytest.raises(ValueError, match=rf"past_key_values: layer 0: .*a window of at least {WINDOW}.*got .* 8"):
        native.prefill(tokens(model, 1, WINDOW // 2), past_key_values=DynamicCache(config=other.config))
    full = shared("llama")
    with pytest.raises(ValueError, match="past_key_values: layer 0: expected all positions.*got a window of 16"):
        pop_ext.load(full, plan_of(full)).prefill(
            tokens(full, 1, 20), past_key_values=DynamicCache(config=model.config)
        )


# Copies, prefixes, beams


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_deep_copy_of_a_filled_cache_is_independent(name, kind):
    model, plan = shared(name), plan_of(shared(name), GAPS, 2)
    given = new_cache(kind, model)
    run_native(model, plan, tokens(model, 1, 21), past_key_values=given)
    duplicate = copy.deepcopy(given)
    run_native(model, plan, tokens(model, 1, 9, seed=3), past_key_values=duplicate)
    full = run_oracle(model, plan, tokens(model, 1, 21)).cache
    compare_caches(given, full)
    theirs = run_oracle(model, plan, tokens(model, 1, 9, seed=3), past_key_values=full).cache
    compare_caches(duplicate, theirs)
    assert_decode_equals_the_oracles(model, duplicate, theirs)


def test_a_prefix_is_reused_by_cropping():
    model, plan = shared("llama"), plan_of(shared("llama"), GAPS, 2)
    prefix = tokens(model, 1, 12, seed=1)
    given = run_native(model, plan, prefix).cache
    oracle_prefix = run_oracle(model, plan, prefix).cache
    for turn, length in enumerate((9, 5)):
        ids = tokens(model, 1, length, seed=turn)
        ours = run_native(model, plan, ids, past_key_values=given)
        theirs = run_oracle(model, plan, ids, past_key_values=oracle_prefix)
        assert_close_fp32(ours.logits, theirs.logits, "logits")
        compare_caches(given, theirs.cache)
        given.crop(-length)
    compare_caches(given, oracle_prefix)


def test_a_sliding_cache_that_records_its_past_can_be_cropped():
    model, plan = shared("mistral"), plan_of(shared("mistral"), GAPS, 2)
    given = DynamicCache(config=model.config)
    for layer in given.layers:
        layer.activate_past_recording()
    prefix, ids = tokens(model, 1, 30, seed=1), tokens(model, 1, 9)
    run_native(model, plan, prefix, past_key_values=given)
    given.crop(0)
    for _ in range(2):
        assert_equals_oracle(model, plan, ids, past=given, oracle_past=run_oracle(model, plan, prefix).cache)
        run_native(model, plan, ids, past_key_values=given)
        given.crop(-9)


def test_a_second_turn_over_a_reordered_cache_equals_the_oracle():
    model, plan = shared("llama"), plan_of(shared("llama"), GAPS, 2)
    first, ids = tokens(model, 2, 12, seed=1), tokens(model, 2, 9)
    given = run_native(model, plan, first).cache
    given.reorder_cache(torch.tensor([1, 0]))
    oracle_cache = run_oracle(model, plan, first.flip(0)).cache
    assert_equals_oracle(model, plan, ids, past=given, oracle_past=oracle_cache)


def test_a_second_turn_over_strided_keys_equals_the_oracle():
    model, plan = shared("llama"), plan_of(shared("llama"), GAPS, 2)
    given = run_oracle(model, plan, tokens(model, 2, 12, seed=1)).cache
    strided = copy.deepcopy(given)
    for layer in strided.layers:
        layer.keys = layer.keys.transpose(1, 2).contiguous().transpose(1, 2)
        layer.values = layer.values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert_equals_oracle(model, plan, tokens(model, 2, 9), past=strided, oracle_past=given)


def test_grad_mode_leaves_no_graph_in_the_cache():
    model = shared("llama")
    with torch.enable_grad():
        cache = run_native(model, plan_of(model), tokens(model, 1, 9)).cache
    assert not any(layer.keys.requires_grad or layer.values.requires_grad for layer in cache.layers)


# Refused caches


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: EncoderDecoderCache(DynamicCache(), DynamicCache()), "past_key_values: expected"),
        (offloaded_cache, "past_key_values: .* offloaded"),
        (lambda model: Cache(layers=[DynamicLayer()]), "past_key_values: expected 6 layers like the model, got 1"),
        (lambda model: [(torch.zeros(1, 2, 3, 64),) * 2], "past_key_values: expected a transformers Cache, got list"),
    ],
    ids=["encoder-decoder", "offloaded", "too few layers", "a list of tensors"],
)
def test_an_unsupported_cache_is_named(make, message):
    model = shared("llama")
    with pytest.raises((ValueError, TypeError), match=message):
        run_native(model, plan_of(model), tokens(model, 1, 5), past_key_values=make(model))


# CacheTransaction


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("past", [0, 9])
def test_an_aborted_transaction_leaves_the_cache_unchanged(kind, past):
    model = shared("qwen2 mixed")
    given = new_cache(kind, model)
    if past:
        run_stock(model, tokens(model, 2, past), past_key_values=given)
    states = [{**layer.__dict__} for layer in given.layers]
    copies = copy.deepcopy(given)
    like = torch.empty(0, 2, 0, 64)
    transaction = CacheTransaction(given, like, 6, 2, past, 5, None)
    assert all(key.shape[:2] == (2, 2) and key.shape[2] >= past + 5 for key in transaction.key_cache)
    transaction.abort()
    assert [list(layer.__dict__) for layer in given.layers] == [list(state) for state in states]
    for layer, state in zip(given.layers, states, strict=False):
        assert all(layer.__dict__[name] is value for name, value in state.items() if isinstance(value, torch.Tensor))
    if past:
        compare_caches(given, copies, atol=0.0)


# A failure after the operator


@pytest.mark.parametrize("filled", [0, 12, 40])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_failing_head_leaves_the_cache_unchanged(name, kind, filled):
    model = copy.deepcopy(shared(name))
    native, cache = pop_ext.load(model, "third"), new_cache(kind, model)
    if filled:
        native.prefill(tokens(model, 1, filled), past_key_values=cache)
    before = copy.deepcopy(cache)

    def refuse(*_):
        raise RuntimeError("planted")

    hook = model.lm_head.register_forward_hook(refuse)
    with pytest.raises(RuntimeError, match="planted"):
        native.prefill(tokens(model, 1, 20, seed=3), past_key_values=cache)
    hook.remove()
    assert int(cache.get_seq_length()) == filled
    assert len(cache.layers) == len(before.layers)
    for layer, kept in zip(cache.layers, before.layers, strict=True):
        assert layer.is_initialized == kept.is_initialized
        if filled:
            assert torch.equal(layer.keys, kept.keys)
            assert torch.equal(layer.values, kept.values)
    ours = native.prefill(tokens(model, 1, 20, seed=3), past_key_values=cache)
    again = native.prefill(tokens(model, 1, 20, seed=3), past_key_values=before)
    assert torch.equal(ours.logits, again.logits)
