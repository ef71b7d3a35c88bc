"""The oracle against the stock model and the hook reference; batches, side effects and refusals."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from against_oracle import GAPS, LAST, plan_of, run_stock
from hook_reference import assert_equals_hook_reference, context_rows, held_back_forward
from models import FAMILIES, ROPE_KINDS, WINDOW, float32_twin, llama, pad, qwen2, shared, tokens
from pop_ext import Plan, reference
from pop_ext.reference import projection
from tolerance import assert_close_fp32, assert_low_precision, compare_caches, rms, stored_layers
from transformers import DynamicCache, LlamaModel

T = 40
LAYERS = 6
OMITS = {"last third": LAST, "gaps": (1, 3, 4), "first": (0,), "all but the last": (0, 1, 2, 3, 4), "middle": (2, 3)}


# Against the hook reference


@pytest.mark.parametrize("omit", OMITS.values(), ids=OMITS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_equals_the_hook_reference(family, omit):
    model = shared(family)
    assert_equals_hook_reference(model, tokens(model, 2, T), omit, boundary=2)


@pytest.mark.parametrize(
    "over",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"tied": True},
        {"attn_implementation": "eager"},
        {"head_dim": 80, "heads": 2, "kv_heads": 2},
        {"head_dim": 128, "heads": 8, "kv_heads": 1},
        {"head_dim": 256, "heads": 2, "kv_heads": 1, "hidden": 64},
    ],
    ids=str,
)
def test_the_oracle_equals_the_hook_reference_in_every_shape(over):
    model = llama(**over)
    assert_equals_hook_reference(model, tokens(model, 1, T), GAPS, boundary=3)


@pytest.mark.parametrize("length", [19, T, 70])
@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_the_oracle_equals_the_hook_reference_under_every_rope_scaling(kind, length):
    model = shared("llama", rope=kind)
    assert_equals_hook_reference(model, tokens(model, 1, length), GAPS)


def test_mixed_full_and_sliding_layers_equal_the_hook_reference():
    model = qwen2(use_sliding_window=True)
    assert_equals_hook_reference(model, tokens(model, 2, T), GAPS, boundary=5)


@pytest.mark.parametrize("boundary", [1, 2, 17, T - 1, T])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_any_boundary_equals_the_hook_reference(family, boundary):
    model = shared(family)
    assert_equals_hook_reference(model, tokens(model, 1, T), GAPS, boundary)


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW])
@pytest.mark.parametrize("boundary", [1, 5])
def test_prompts_around_the_sliding_window_equal_the_hook_reference(length, boundary):
    model = shared("mistral")
    assert_equals_hook_reference(model, tokens(model, 1, length), LAST, boundary)


@pytest.mark.parametrize("boundary", [WINDOW - 1, WINDOW, WINDOW + 1])
def test_boundaries_around_the_sliding_window_equal_the_hook_reference(boundary):
    model = shared("mistral")
    assert_equals_hook_reference(model, tokens(model, 1, T), LAST, boundary)


def test_left_padding_equals_the_hook_reference():
    model = shared("llama")
    ids, mask = pad([tokens(model, n, seed=n) for n in (T, 19, 2)], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    call = {"attention_mask": mask, "position_ids": positions}
    expected, expected_cache = held_back_forward(model, ids, GAPS, context_rows(mask, [5, 5, 2]), **call)
    logits, cache = reference.prefill(model, ids, plan_of(model, GAPS, 5), 2, attention_mask=mask)
    assert_close_fp32(logits, expected[:, -2:], "logits")
    compare_caches(cache, expected_cache, mask=mask)


def test_explicit_position_ids_equal_the_hook_reference():
    model = shared("llama")
    positions = torch.arange(T)[None] * 2 + torch.tensor([[3], [50]])
    assert_equals_hook_reference(model, tokens(model, 2, T), LAST, position_ids=positions)
    assert_equals_hook_reference(model, tokens(model, 2, T), LAST, position_ids=positions[:1])


# Equalities with the stock model


@pytest.mark.parametrize("omit", [(), (LAYERS - 1,)], ids=["nothing", "last layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_omitting_nothing_or_only_the_last_layer_equals_the_stock_model(family, omit):
    model = shared(family)
    ids = tokens(model, 2, T)
    expected, expected_cache = run_stock(model, ids)
    logits, cache = reference.prefill(model, ids, plan_of(model, omit), 1)
    assert_close_fp32(logits, expected[:, -1:], "logits")
    compare_caches(cache, expected_cache)


@pytest.mark.parametrize("omit", OMITS.values(), ids=OMITS.keys())
@pytest.mark.parametrize("boundary", [T, T + 1])
def test_a_boundary_of_the_whole_prompt_equals_the_stock_model(omit, boundary):
    model = shared("qwen2")
    ids = tokens(model, 1, T)
    expected, expected_cache = run_stock(model, ids)
    logits, cache = reference.prefill(model, ids, plan_of(model, omit, boundary))
    assert_close_fp32(logits, expected[:, -1:], "logits")
    compare_caches(cache, expected_cache)


def test_pruning_changes_results_where_it_should():
    model = shared("llama")
    ids = tokens(model, 1, T)
    expected, expected_cache = run_stock(model, ids)
    logits, cache = reference.prefill(model, ids, plan_of(model, LAST))
    assert rms(logits - expected[:, -1:]) > 0.02
    with pytest.raises(AssertionError, match="layer 5 keys"):
        compare_caches(cache, expected_cache)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_dynamic_rope_follows_the_longest_sequence(kind):
    ids, mask = pad([tokens(shared("llama"), n, seed=n) for n in (70, 19)], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected, expected_cache = run_stock(llama(rope=kind), ids, attention_mask=mask, position_ids=positions)
    model = llama(rope=kind)
    logits, cache = reference.prefill(model, ids, plan_of(model, ()), attention_mask=mask)
    assert_close_fp32(logits, expected[:, -1:], "logits")
    compare_caches(cache, expected_cache, mask=mask)


# Batches


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_padded_batch_equals_its_sequences_alone(family, side):
    model = shared(family)
    sequences = [tokens(model, n, seed=n) for n in (T, 19, 1)]
    ids, mask = pad(sequences, side, fill=-1)
    logits, cache = reference.prefill(model, ids, plan_of(model, GAPS, 3), attention_mask=mask)
    for i, sequence in enumerate(sequences):
        alone, alone_cache = reference.prefill(model, sequence[None], plan_of(model, GAPS, 3))
        assert_close_fp32(logits[i], alone[0], f"logits of sequence {i}")
        for a, e in zip(stored_layers(cache), stored_layers(alone_cache), strict=True):
            assert_close_fp32(a.keys[i][:, mask[i].bool()], e.keys[0], "keys")
            assert_close_fp32(a.values[i][:, mask[i].bool()], e.values[0], "values")
            assert not a.keys[i][:, ~mask[i].bool()].any()
            assert not a.values[i][:, ~mask[i].bool()].any()


def test_per_sequence_values_give_packed_logits():
    model = shared("llama")
    sequences = [tokens(model, n, seed=n) for n in (T, 19)]
    ids, mask = pad(sequences, "right")
    keep, boundary = [3, 1], torch.tensor([2, 7])
    logits, _ = reference.prefill(model, ids, plan_of(model, LAST), keep, attention_mask=mask, boundary=boundary)
    assert logits.shape == (4, model.config.vocab_size)
    first, _ = reference.prefill(model, sequences[0][None], plan_of(model, LAST), 3, boundary=3)
    second, _ = reference.prefill(model, sequences[1][None], plan_of(model, LAST), 1, boundary=7)
    assert_close_fp32(logits, torch.cat([first[0], second[0]]), "logits")


def test_logits_to_keep_widens_the_boundary():
    model = shared("llama")
    ids = tokens(model, 1, T)
    wide, wide_cache = reference.prefill(model, ids, plan_of(model, LAST), 4, boundary=4)
    widened, widened_cache = reference.prefill(model, ids, plan_of(model, LAST, 2), 4)
    assert torch.equal(wide, widened)
    compare_caches(widened_cache, wide_cache, atol=0.0)


def test_an_explicit_boundary_overrides_the_plan():
    model = shared("llama")
    ids = tokens(model, 1, T)
    expected, _ = reference.prefill(model, ids, plan_of(model, LAST, 1))
    logits, _ = reference.prefill(model, ids, plan_of(model, LAST, 17), boundary=1)
    assert torch.equal(logits, expected)


def test_embeddings_equal_their_ids():
    model = shared("llama")
    ids = tokens(model, 2, T)
    expected, _ = reference.prefill(model, ids, plan_of(model, LAST))
    logits, _ = reference.prefill(model, plan=plan_of(model, LAST), inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(logits, expected)


# Precision and side effects


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_attentions_agree_within_the_bounds(dtype):
    model = llama(dtype=dtype)
    ids, plan = tokens(model, 2, T), plan_of(model, LAST)
    truth, truth_cache = reference.prefill(float32_twin(model), ids, plan, 4)
    logits, cache = reference.prefill(model, ids, plan, 4)
    model.set_attn_implementation("eager")
    eager, eager_cache = reference.prefill(model, ids, plan, 4)
    assert logits.dtype == cache.layers[0].keys.dtype == dtype
    assert_low_precision(eager, logits, truth, "logits")
    compare_caches(eager_cache, cache, oracle_fp32=truth_cache)


def test_repeated_calls_are_bit_identical():
    model = shared("llama")
    ids = tokens(model, 2, T)
    first, second = (reference.prefill(model, ids, plan_of(model, LAST)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    compare_caches(first[1], second[1], atol=0.0)


def test_cache_and_model_stay_unchanged():
    model = llama()
    _, given = run_stock(model, tokens(model, 1, 19))
    before, weights = (copy.deepcopy(given), {k: v.clone() for k, v in model.state_dict().items()})
    _, cache = reference.prefill(model, tokens(model, 1, T), plan_of(model, LAST), past_key_values=given)
    assert cache is not given
    compare_caches(given, before, atol=0.0)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_failing_layer_leaves_cache_and_model_unchanged(monkeypatch):
    model = llama()
    _, given = run_stock(model, tokens(model, 1, 19))
    before = copy.deepcopy(given)
    project, calls = reference.project_kv, iter(range(3))
    monkeypatch.setattr(projection, "project_kv", lambda *args: project(*args) if next(calls) < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reference.prefill(model, tokens(model, 1, T), plan_of(model, LAST), past_key_values=given)
    compare_caches(given, before, atol=0.0)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_replaced_forward_of_the_instance_is_not_called(monkeypatch):
    model = llama()
    ids = tokens(model, 1, T)
    expected, _ = reference.prefill(model, ids, plan_of(model, LAST))
    monkeypatch.setattr(model, "forward", lambda *_, **__: 1 / 0)
    logits, _ = reference.prefill(model, ids, plan_of(model, LAST))
    assert torch.equal(logits, expected)


# Refusals: each text names the argument, what was expected and what came


def holes():
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 3] = 0
    return mask


BAD_CALLS = {
    "plan of another depth": ({"plan": Plan(num_layers=8, omit=(7,))}, "plan: expected num_layers 6, .*got 8"),
    "boundary 0": ({"boundary": 0}, r"boundary: expected 1\.\.8.*sequence 0, got 0"),
    "boundary beyond the prompt": ({"boundary": 9}, r"boundary: expected 1\.\.8.*got 9"),
    "one boundary beyond its sequence": ({"boundary": [8, 9]}, "boundary: .*sequence 1, got 9"),
    "boundary for another batch": ({"boundary": [1, 1, 1]}, "boundary: expected one value for each of 2.*got 3"),
    "boundary of a float": ({"boundary": 1.5}, "boundary: expected an int.*float 1.5"),
    "boundary of a 0-d tensor": ({"boundary": torch.tensor(1)}, "boundary: expected an int.*int64 tensor of shape"),
    "boundary of bools": ({"boundary": [True, True]}, "boundary: expected an int.*True"),
    "boundary without data": ({"boundary": torch.ones(2, dtype=int, device="meta")}, "boundary: .*with data, .*meta"),
    "logits of a bool tensor": (
        {"logits_to_keep": torch.tensor([True, True])},
        "logits_to_keep: expected an int.*torch.bool tensor",
    ),
    "no logits": ({"logits_to_keep": 0}, r"logits_to_keep: expected 1\.\.8.*got 0"),
    "too many logits": ({"logits_to_keep": 9}, r"logits_to_keep: expected 1\.\.8.*got 9"),
    "empty prompt": ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"input_ids: .*got \[2, 0\]"),
    "one dimension": ({"input_ids": torch.zeros(8, dtype=torch.long)}, r"input_ids: .*got \[8\]"),
    "float ids": ({"input_ids": torch.zeros(2, 8)}, "input_ids: expected an int64.*float32"),
    "id outside the vocabulary": ({"input_ids": torch.full((2, 8), 263)}, r"input_ids: expected 0\.\.262, got 263"),
    "negative id": ({"input_ids": torch.full((2, 8), -1)}, r"input_ids: expected 0\.\.262, got -1"),
    "no input": ({"input_ids": None}, "input_ids, inputs_embeds: .*neither"),
    "both inputs": ({"inputs_embeds": torch.zeros(2, 8, 96)}, "input_ids, inputs_embeds: .*both"),
    "embeddings of another width": (
        {"input_ids": None, "inputs_embeds": torch.zeros(2, 8, 95)},
        r"inputs_embeds: expected \[batch, T, 96\].*got \[2, 8, 95\]",
    ),
    "embeddings of another dtype": (
        {"input_ids": None, "inputs_embeds": torch.zeros(2, 8, 96).half()},
        "inputs_embeds: expected a torch.float32.*float16",
    ),
    "mask of another width": (
        {"attention_mask": torch.ones(2, 9)},
        r"attention_mask: expected .*\[2, 8\].*got \[2, 9\]",
    ),
    "mask without data": ({"attention_mask": torch.ones(2, 8, device="meta")}, "attention_mask: .*with data, .*meta"),
    "mask with holes": ({"attention_mask": holes()}, "attention_mask: expected no holes.*sequence 1"),
    "mask without a token": ({"attention_mask": torch.zeros(2, 8)}, "attention_mask: .*got none in sequence 0"),
    "additive mask": ({"attention_mask": torch.full((2, 8), -1e9)}, "attention_mask: expected only 0 and 1"),
    "positions of another width": (
        {"position_ids": torch.arange(9)[None]},
        r"position_ids: expected \[2, 8\] or \[1, 8\], got \[1, 9\]",
    ),
    "positions of floats": ({"position_ids": torch.arange(8.0)[None]}, "position_ids: expected an int64.*float32"),
    "positions without data": (
        {"position_ids": torch.arange(8, device="meta")[None]},
        "position_ids: expected a tensor with data, got one on the meta device",
    ),
    "ids without data": (
        {"input_ids": torch.zeros(2, 8, dtype=torch.long, device="meta")},
        "input_ids: expected a tensor with data, got one on the meta device",
    ),
    "not a cache": ({"past_key_values": ()}, "past_key_values: expected a DynamicCache, .*QuantizedCache.*tuple"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_refused_by_name(case):
    over, message = BAD_CALLS[case]
    model = shared("llama")
    call = {"input_ids": tokens(model, 2, 8), "plan": plan_of(model, LAST), **over}
    with pytest.raises((ValueError, TypeError), match=message):
        reference.prefill(model, **call)


def test_an_unfit_cache_is_refused_and_unchanged():
    model = shared("llama")
    _, given = run_stock(model, tokens(model, 1, 5))
    before = copy.deepcopy(given)
    with pytest.raises(ValueError, match="past_key_values: expected batch 2, got 1"):
        reference.prefill(model, tokens(model, 2, 8), plan_of(model, LAST), past_key_values=given)
    with pytest.raises(ValueError, match=r"attention_mask: .*5 in the cache and 8 new"):
        reference.prefill(
            model, tokens(model, 1, 8), plan_of(model, LAST), past_key_values=given, attention_mask=torch.ones(1, 8)
        )
    compare_caches(given, before, atol=0.0)
    _, shallow = run_stock(llama(layers=2), tokens(model, 1, 5))
    with pytest.raises(ValueError, match="past_key_values: expected 6 layers, got 2"):
        reference.prefill(model, tokens(model, 1, 8), plan_of(model, LAST), past_key_values=shallow)


def test_a_cache_that_dropped_needed_positions_is_refused():
    model = shared("mistral")
    first, mask = pad([tokens(model, n, seed=n) for n in (30, 11)], "right")
    # A sliding layer keeps the last columns, which are mostly padding for the second sequence.
    given = DynamicCache(config=model.config)
    run_stock(model, first, attention_mask=mask, past_key_values=given)
    mask = torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], dim=1)
    with pytest.raises(
        ValueError, match=r"past_key_values: expected the last 11 .*sequence 1 .*layer 0 has dropped the first"
    ):
        reference.prefill(model, tokens(model, 2, 8), plan_of(model, LAST), attention_mask=mask, past_key_values=given)


def test_a_model_without_head_is_refused_by_name():
    headless = LlamaModel(models.llama().config)
    with pytest.raises(ValueError, match=r"model: expected .*LlamaModel"):
        reference.prefill(headless, torch.zeros(1, 4, dtype=torch.long), Plan(num_layers=6, omit=(5,)))


@pytest.mark.cpu
def test_the_oracle_does_not_take_a_failed_allocation_for_another_projection(monkeypatch):
    def fails(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("pop_ext.reference.projection.project_kv", fails)
    model = llama()
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        reference.prefill(model, tokens(model, 1, 9), Plan(6, (2, 4)))
