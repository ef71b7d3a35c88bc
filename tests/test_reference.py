"""The oracle against the stock model and against the third form, and the test models and tolerances themselves."""

from __future__ import annotations

import copy
import functools

import models
import pytest
import torch
from models import FAMILIES, ROPE_KINDS, WINDOW, float32_twin, llama, pad, qwen2, tokens
from pop_ext import Plan, reference
from third_form import context_rows, held_back_forward
from tolerance import assert_close_fp32, assert_low_precision, compare_caches, rms, stored_layers
from transformers import DynamicCache, LlamaModel, StaticCache

T = 40
LAYERS = 6
LAST = (4, 5)
OMITS = {"last third": LAST, "gaps": (1, 3, 4), "first": (0,), "all but the last": (0, 1, 2, 3, 4), "middle": (2, 3)}
GAPS = OMITS["gaps"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are tiny: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def shared(family: str, **over):
    """A model that tests only read."""
    return FAMILIES[family](**over)


def plan_of(model, omit, boundary=1):
    return Plan(num_layers=model.config.num_hidden_layers, omit=omit, boundary=boundary)


@torch.no_grad()
def stock(model, ids, **call):
    """Logits of all rows and a cache that holds every position in every layer."""
    output = model(ids, use_cache=True, **{"past_key_values": DynamicCache(), **call})
    return output.logits, output.past_key_values


def assert_equals_third_form(model, ids, omit, boundary=1, past=None, **call):
    """Logits of the boundary rows and K/V of all layers and positions, for sequences without padding."""
    lengths = torch.ones_like(ids)
    expected, expected_cache = held_back_forward(
        model,
        ids,
        omit,
        context_rows(lengths, [boundary] * len(ids)),
        past_key_values=copy.deepcopy(past) if past is not None else DynamicCache(),
        **call,
    )
    logits, cache = reference.prefill(
        model, ids, plan_of(model, omit, boundary), boundary, past_key_values=past, **call
    )
    assert_close_fp32(logits, expected[:, -boundary:], "logits")
    compare_caches(cache, expected_cache)
    return logits, cache


# The test models


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_zeroing_any_one_layer_moves_the_logits_by_more_than_a_tenth(family, tied):
    model = FAMILIES[family](tied=tied, layers=8)
    ids = tokens(model, 1, T)
    logits = model(ids).logits[:, -1]
    for layer in model.model.layers:
        hook = layer.register_forward_hook(lambda _layer, args, _output: args[0])
        moved = model(ids).logits[:, -1]
        hook.remove()
        assert rms(moved - logits) > 0.1 * rms(logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_test_model_is_deterministic_and_has_logits_of_scale_one(family):
    first, second = FAMILIES[family](), FAMILIES[family]()
    ids = tokens(first, 2, T)
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert 0.5 < rms(first(ids).logits) < 2.0


@pytest.mark.parametrize("kind", [kind for kind in ROPE_KINDS if kind != "default"])
@torch.no_grad()
def test_each_rope_scaling_differs_visibly_from_the_default_one(kind):
    ids = tokens(shared("llama"), 1, T)
    default, scaled = (shared("llama")(ids).logits[:, -1], llama(rope=kind)(ids).logits[:, -1])
    assert rms(scaled - default) > 0.1 * rms(default)


# Against the third form


@pytest.mark.parametrize("omit", OMITS.values(), ids=OMITS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_equals_the_third_form(family, omit):
    model = shared(family)
    assert_equals_third_form(model, tokens(model, 2, T), omit, boundary=2)


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
def test_the_oracle_equals_the_third_form_in_every_shape(over):
    model = llama(**over)
    assert_equals_third_form(model, tokens(model, 1, T), GAPS, boundary=3)


@pytest.mark.parametrize("length", [19, T, 70])
@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_the_oracle_equals_the_third_form_under_every_rope_scaling(kind, length):
    model = shared("llama", rope=kind)
    assert_equals_third_form(model, tokens(model, 1, length), GAPS)


def test_mixed_full_and_sliding_layers_equal_the_third_form():
    model = qwen2(use_sliding_window=True)
    assert_equals_third_form(model, tokens(model, 2, T), GAPS, boundary=5)


@pytest.mark.parametrize("boundary", [1, 2, 17, T - 1, T])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_any_boundary_equals_the_third_form(family, boundary):
    model = shared(family)
    assert_equals_third_form(model, tokens(model, 1, T), GAPS, boundary)


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW])
@pytest.mark.parametrize("boundary", [1, 5])
def test_prompts_around_the_sliding_window_equal_the_third_form(length, boundary):
    model = shared("mistral")
    assert_equals_third_form(model, tokens(model, 1, length), LAST, boundary)


@pytest.mark.parametrize("boundary", [WINDOW - 1, WINDOW, WINDOW + 1])
def test_boundaries_around_the_sliding_window_equal_the_third_form(boundary):
    model = shared("mistral")
    assert_equals_third_form(model, tokens(model, 1, T), LAST, boundary)


def test_left_padding_equals_the_third_form_under_the_same_mask():
    model = shared("llama")
    ids, mask = pad([tokens(model, n, seed=n) for n in (T, 19, 2)], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    call = {"attention_mask": mask, "position_ids": positions}
    expected, expected_cache = held_back_forward(model, ids, GAPS, context_rows(mask, [5, 5, 2]), **call)
    logits, cache = reference.prefill(model, ids, plan_of(model, GAPS, 5), 2, attention_mask=mask)
    assert_close_fp32(logits, expected[:, -2:], "logits")
    compare_caches(cache, expected_cache, mask=mask)


def test_explicit_position_ids_equal_the_third_form():
    model = shared("llama")
    positions = torch.arange(T)[None] * 2 + torch.tensor([[3], [50]])
    assert_equals_third_form(model, tokens(model, 2, T), LAST, position_ids=positions)
    assert_equals_third_form(model, tokens(model, 2, T), LAST, position_ids=positions[:1])


# Equalities with the stock model


@pytest.mark.parametrize("omit", [(), (LAYERS - 1,)], ids=["nothing", "last layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_omitting_nothing_or_only_the_last_layer_equals_the_stock_model(family, omit):
    model = shared(family)
    ids = tokens(model, 2, T)
    expected, expected_cache = stock(model, ids)
    logits, cache = reference.prefill(model, ids, plan_of(model, omit), 1)
    assert_close_fp32(logits, expected[:, -1:], "logits")
    compare_caches(cache, expected_cache)


@pytest.mark.parametrize("omit", OMITS.values(), ids=OMITS.keys())
@pytest.mark.parametrize("boundary", [T, T + 1])
def test_a_boundary_of_the_whole_prompt_equals_the_stock_model(omit, boundary):
    model = shared("qwen2")
    ids = tokens(model, 1, T)
    expected, expected_cache = stock(model, ids)
    logits, cache = reference.prefill(model, ids, plan_of(model, omit, boundary))
    assert_close_fp32(logits, expected[:, -1:], "logits")
    compare_caches(cache, expected_cache)


def test_pruning_changes_the_result_where_it_should():
    model = shared("llama")
    ids = tokens(model, 1, T)
    expected, expected_cache = stock(model, ids)
    logits, cache = reference.prefill(model, ids, plan_of(model, LAST))
    assert rms(logits - expected[:, -1:]) > 0.02
    with pytest.raises(AssertionError, match="layer 5 keys"):
        compare_caches(cache, expected_cache)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_rope_follows_the_longest_sequence_of_the_call(kind):
    ids, mask = pad([tokens(shared("llama"), n, seed=n) for n in (70, 19)], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected, expected_cache = stock(llama(rope=kind), ids, attention_mask=mask, position_ids=positions)
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


def test_per_sequence_values_give_packed_logits_and_their_own_boundaries():
    model = shared("llama")
    sequences = [tokens(model, n, seed=n) for n in (T, 19)]
    ids, mask = pad(sequences, "right")
    keep, boundary = [3, 1], torch.tensor([2, 7])
    logits, _ = reference.prefill(model, ids, plan_of(model, LAST), keep, attention_mask=mask, boundary=boundary)
    assert logits.shape == (4, model.config.vocab_size)
    first, _ = reference.prefill(model, sequences[0][None], plan_of(model, LAST), 3, boundary=3)
    second, _ = reference.prefill(model, sequences[1][None], plan_of(model, LAST), 1, boundary=7)
    assert_close_fp32(logits, torch.cat([first[0], second[0]]), "logits")


def test_wanted_logits_widen_the_boundary():
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


def test_embeddings_give_what_their_ids_give():
    model = shared("llama")
    ids = tokens(model, 2, T)
    expected, _ = reference.prefill(model, ids, plan_of(model, LAST))
    logits, _ = reference.prefill(model, plan=plan_of(model, LAST), inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(logits, expected)


# Later turns and decode


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("past", [1, WINDOW - 1, WINDOW, 30])
def test_a_second_turn_equals_the_third_form_over_the_same_cache(family, past):
    model = shared(family)
    _, cache = reference.prefill(model, tokens(model, 2, past, seed=1), plan_of(model, LAST))
    assert_equals_third_form(model, tokens(model, 2, 19), GAPS, boundary=2, past=cache)


@pytest.mark.parametrize("past", [1, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, 30])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2 mixed"])
def test_a_second_turn_reads_any_cache_of_the_stock_model(name, static, past):
    family = name.split()[0]
    model = shared(family, use_sliding_window=True) if "mixed" in name else shared(family)
    config, new = model.config, 19
    given = StaticCache(config=config, max_cache_len=past + new + 3) if static else DynamicCache(config=config)
    first = tokens(model, 2, past, seed=1)
    _, full = stock(model, first)
    stock(model, first, past_key_values=given)
    ids, plan = tokens(model, 2, new), plan_of(model, GAPS, 2)
    expected, expected_cache = reference.prefill(model, ids, plan, 2, past_key_values=full)
    logits, cache = reference.prefill(model, ids, plan, 2, past_key_values=given)
    assert_close_fp32(logits, expected, "logits")
    for a, e in zip(stored_layers(cache), stored_layers(expected_cache), strict=True):
        assert a.length == past + new
        assert_close_fp32(a.keys[:, :, past:], e.keys[:, :, past:], "keys")
        assert_close_fp32(a.values[:, :, past:], e.values[:, :, past:], "values")


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_holes_that_right_padding_left_in_the_past_are_skipped(family):
    model = shared(family)
    turns = [[tokens(model, n, seed=n) for n in lengths] for lengths in ((30, 11), (7, 20))]
    plan = plan_of(model, LAST, 2)
    first, first_mask = pad(turns[0], "right")
    second, second_mask = pad(turns[1], "left")
    mask = torch.cat([first_mask, second_mask], dim=1)
    _, cache = reference.prefill(model, first, plan, attention_mask=first_mask)
    logits, cache = reference.prefill(model, second, plan, attention_mask=mask, past_key_values=cache)
    for i in range(2):
        _, alone_cache = reference.prefill(model, turns[0][i][None], plan)
        alone, alone_cache = reference.prefill(model, turns[1][i][None], plan, past_key_values=alone_cache)
        assert_close_fp32(logits[i], alone[0], f"logits of sequence {i}")
        for a, e in zip(stored_layers(cache), stored_layers(alone_cache), strict=True):
            assert_close_fp32(a.keys[i][:, mask[i].bool()], e.keys[0], "keys")
            assert_close_fp32(a.values[i][:, mask[i].bool()], e.values[0], "values")


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_by_the_stock_model_continues_the_third_form(family):
    model = shared(family)
    ids, steps, boundary = tokens(model, 2, T + 6), 6, 3
    context = context_rows(torch.ones_like(ids), [boundary + steps] * 2)
    expected, expected_cache = held_back_forward(model, ids, GAPS, context)
    _, cache = reference.prefill(model, ids[:, :T], plan_of(model, GAPS, boundary))
    for column in range(T, T + steps):
        logits, cache = stock(model, ids[:, column : column + 1], past_key_values=cache)
        assert_close_fp32(logits[:, 0], expected[:, column], f"logits of column {column}")
    compare_caches(cache, expected_cache)


@pytest.mark.parametrize("side", ["left", "right"])
def test_decode_of_a_padded_batch_equals_decode_alone(side):
    model = shared("llama")
    sequences = [tokens(model, n, seed=n) for n in (T, 19)]
    plan, step = plan_of(model, LAST, 2), tokens(model, 2, 1, seed=9)
    ids, mask = pad(sequences, side)
    _, cache = reference.prefill(model, ids, plan, attention_mask=mask)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    call = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
    logits, _ = stock(model, step, past_key_values=cache, **call)
    for i, sequence in enumerate(sequences):
        _, alone_cache = reference.prefill(model, sequence[None], plan)
        alone, _ = stock(model, step[i : i + 1], past_key_values=alone_cache)
        assert_close_fp32(logits[i], alone[0], f"logits of sequence {i}")


def test_generate_continues_from_the_returned_cache():
    model = shared("mistral")
    ids = tokens(model, 1, T)
    _, cache = reference.prefill(model, ids[:, :-1], plan_of(model, LAST))
    out = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape == (1, T + 5)


# Precision and side effects


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_its_dtype_and_two_attentions_agree_within_the_bounds(dtype):
    model = llama(dtype=dtype)
    ids, plan = tokens(model, 2, T), plan_of(model, LAST)
    truth, truth_cache = reference.prefill(float32_twin(model), ids, plan, 4)
    logits, cache = reference.prefill(model, ids, plan, 4)
    model.set_attn_implementation("eager")
    eager, eager_cache = reference.prefill(model, ids, plan, 4)
    assert logits.dtype == cache.layers[0].keys.dtype == dtype
    assert_low_precision(eager, logits, truth, "logits")
    compare_caches(eager_cache, cache, oracle_fp32=truth_cache)


def test_the_same_call_gives_the_same_bits():
    model = shared("llama")
    ids = tokens(model, 2, T)
    first, second = (reference.prefill(model, ids, plan_of(model, LAST)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    compare_caches(first[1], second[1], atol=0.0)


def test_the_given_cache_and_the_model_stay_as_they_were():
    model = llama()
    _, given = stock(model, tokens(model, 1, 19))
    before, weights = (copy.deepcopy(given), {k: v.clone() for k, v in model.state_dict().items()})
    _, cache = reference.prefill(model, tokens(model, 1, T), plan_of(model, LAST), past_key_values=given)
    assert cache is not given
    compare_caches(given, before, atol=0.0)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_failure_in_the_middle_of_the_layers_leaves_cache_and_model_as_they_were(monkeypatch):
    model = llama()
    _, given = stock(model, tokens(model, 1, 19))
    before = copy.deepcopy(given)
    project, calls = reference.project_kv, iter(range(3))
    monkeypatch.setattr(reference, "project_kv", lambda *args: project(*args) if next(calls) < 2 else 1 / 0)
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


# Planted mutations: the comparison must notice each of them


def without_rope(layer, hidden_states, cos, sin):
    return original_projection(layer, hidden_states, torch.ones_like(cos), torch.zeros_like(sin))


def rope_one_position_late(layer, hidden_states, cos, sin):
    return original_projection(layer, hidden_states, cos.roll(1, dims=1), sin.roll(1, dims=1))


def without_gamma(layer, hidden_states, cos, sin):
    bare = copy.deepcopy(layer)
    bare.input_layernorm.weight.data.fill_(1.0)
    return original_projection(bare, hidden_states, cos, sin)


def gamma_of_the_wrong_norm(layer, hidden_states, cos, sin):
    other = copy.copy(layer)
    other._modules = {**layer._modules, "input_layernorm": layer.post_attention_layernorm}
    return original_projection(other, hidden_states, cos, sin)


def values_from_the_unnormalised_state(layer, hidden_states, cos, sin):
    keys, values = original_projection(layer, hidden_states, cos, sin)
    raw = layer.self_attn.v_proj(hidden_states).view(1, hidden_states.shape[1], -1, values.shape[-1])
    return keys, raw.transpose(1, 2)


original_projection = reference.project_kv
MUTATIONS = [
    without_rope,
    rope_one_position_late,
    without_gamma,
    gamma_of_the_wrong_norm,
    values_from_the_unnormalised_state,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_planted_mistake_in_the_projection_is_noticed(monkeypatch, family, mutation):
    model = shared(family)
    ids = tokens(model, 1, T)
    expected, expected_cache = held_back_forward(model, ids, LAST, context_rows(torch.ones_like(ids), [1]))
    monkeypatch.setattr(reference, "project_kv", mutation)
    monkeypatch.setattr(reference, "check_projection", lambda *_: None)
    logits, cache = reference.prefill(model, ids, plan_of(model, LAST))
    with pytest.raises(AssertionError, match="logits: max error"):
        assert_close_fp32(logits, expected[:, -1:], "logits")
    with pytest.raises(AssertionError, match="layer 4"):
        compare_caches(cache, expected_cache)


@pytest.mark.parametrize(
    "mutation", [without_rope, without_gamma, values_from_the_unnormalised_state], ids=lambda f: f.__name__
)
def test_a_family_that_projects_kv_in_another_way_is_refused(monkeypatch, mutation):
    model = shared("llama")
    monkeypatch.setattr(reference, "project_kv", mutation)
    with pytest.raises(ValueError, match=r"model: expected K = .*LlamaAttention of layer 4"):
        reference.prefill(model, tokens(model, 1, T), plan_of(model, LAST))


def test_missing_boundary_kv_is_noticed():
    model = shared("llama")
    ids = tokens(model, 1, T)
    _, expected_cache = held_back_forward(model, ids, LAST, context_rows(torch.ones_like(ids), [1]))
    _, all_context = held_back_forward(model, ids, LAST, torch.ones_like(ids, dtype=torch.bool))
    with pytest.raises(AssertionError, match=rf"layer 5 keys.*worst at \[0, \d, {T - 1}, "):
        compare_caches(all_context, expected_cache)


def test_low_precision_bounds_reject_three_times_the_rms_error_and_one_wild_element():
    truth = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    oracle = truth.bfloat16()
    assert_low_precision(oracle, oracle, truth, "same")
    with pytest.raises(AssertionError, match="RMS error"):
        assert_low_precision((truth + 3 * (oracle - truth)).half(), oracle.half(), truth, "thrice")
    wild = oracle.clone()
    wild[7] += 0.05
    with pytest.raises(AssertionError, match=r"max error .*worst at \[7\]"):
        assert_low_precision(wild, oracle, truth, "wild")


def test_a_nan_fails_the_comparison():
    values = torch.tensor([1.0, float("nan")])
    with pytest.raises(AssertionError):
        assert_close_fp32(values, torch.ones(2), "nan")
    with pytest.raises(AssertionError):
        assert_low_precision(values.bfloat16(), torch.ones(2).bfloat16(), torch.ones(2), "nan")


# Errors name the argument, what was expected and what came


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
    "not a cache": ({"past_key_values": ()}, "past_key_values: expected a DynamicCache or StaticCache.*tuple"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_argument_is_named(case):
    over, message = BAD_CALLS[case]
    model = shared("llama")
    call = {"input_ids": tokens(model, 2, 8), "plan": plan_of(model, LAST), **over}
    with pytest.raises((ValueError, TypeError), match=message):
        reference.prefill(model, **call)


def test_a_cache_that_does_not_fit_is_named_and_stays_as_it_was():
    model = shared("llama")
    _, given = stock(model, tokens(model, 1, 5))
    before = copy.deepcopy(given)
    with pytest.raises(ValueError, match="past_key_values: expected batch 2, got 1"):
        reference.prefill(model, tokens(model, 2, 8), plan_of(model, LAST), past_key_values=given)
    with pytest.raises(ValueError, match=r"attention_mask: .*5 in the cache and 8 new"):
        reference.prefill(
            model, tokens(model, 1, 8), plan_of(model, LAST), past_key_values=given, attention_mask=torch.ones(1, 8)
        )
    compare_caches(given, before, atol=0.0)
    _, shallow = stock(llama(layers=2), tokens(model, 1, 5))
    with pytest.raises(ValueError, match="past_key_values: expected 6 layers, got 2"):
        reference.prefill(model, tokens(model, 1, 8), plan_of(model, LAST), past_key_values=shallow)


def test_a_sliding_cache_that_dropped_a_position_still_in_reach_is_refused():
    model = shared("mistral")
    first, mask = pad([tokens(model, n, seed=n) for n in (30, 11)], "right")
    given = DynamicCache(config=model.config)  # keeps the last columns, for the second sequence mostly padding
    stock(model, first, attention_mask=mask, past_key_values=given)
    mask = torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], dim=1)
    with pytest.raises(
        ValueError, match=r"past_key_values: expected the last 11 .*sequence 1 .*layer 0 has dropped the first"
    ):
        reference.prefill(model, tokens(model, 2, 8), plan_of(model, LAST), attention_mask=mask, past_key_values=given)


def test_a_model_without_a_head_is_named():
    headless = LlamaModel(models.llama().config)
    with pytest.raises(ValueError, match=r"model: expected .*LlamaModel"):
        reference.prefill(headless, torch.zeros(1, 4, dtype=torch.long), Plan(num_layers=6, omit=(5,)))
