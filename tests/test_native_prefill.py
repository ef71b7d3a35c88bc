"""native.prefill against the oracle and against the stock model: logits, hidden states and K/V of every layer."""

from __future__ import annotations

import copy
import functools

import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, OMITS, assert_equals_oracle, plan_of, run_native, run_oracle, run_stock
from models import FAMILIES, ROPE_KINDS, ROPE_LENGTH, WINDOW, llama, mistral, pad, tokens
from pop_ext import Plan
from tolerance import assert_close_fp32, compare_caches, rms
from transformers import DynamicCache

NATIVE = ("llama", "mistral", "qwen2", "qwen3")
LOW = (torch.bfloat16, torch.float16)
T = 40


@functools.cache
def shared(family: str, **over):
    """A model that tests only read."""
    return FAMILIES[family](**over)


# Plans and lengths


@pytest.mark.parametrize("omit", OMITS.values(), ids=OMITS.keys())
@pytest.mark.parametrize("family", NATIVE)
def test_every_omitted_set_equals_the_oracle(family, omit):
    model = shared(family)
    assert_equals_oracle(model, plan_of(model, omit, 2), tokens(model, 2, T))


@pytest.mark.parametrize("omit", [GAPS, OMITS["all but the first"]], ids=["gaps", "all but the first"])
@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_is_as_close_to_the_float32_oracle_as_the_oracle_itself(dtype, family, omit):
    model = shared(family, dtype=dtype)
    assert_equals_oracle(model, plan_of(model, omit, 2), tokens(model, 2, T), logits_to_keep=2)


@pytest.mark.parametrize("length", [1, 2, 19, 111, 129, 500])
@pytest.mark.parametrize("family", NATIVE)
def test_any_prompt_length_equals_the_oracle(family, length):
    model = shared(family)
    assert_equals_oracle(model, plan_of(model), tokens(model, 1, length))


@pytest.mark.parametrize("length", [1, 2, 19, 111, 129, 500])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_any_prompt_length_equals_the_oracle_in_low_precision(dtype, length):
    model = shared("llama", dtype=dtype)
    assert_equals_oracle(model, plan_of(model, GAPS, 3), tokens(model, 2, length))


def test_a_prompt_of_several_chunks_of_the_mlp_and_of_the_projection_equals_the_oracle():
    model = llama(layers=3, heads=2, kv_heads=1, intermediate=32, vocab=64)
    assert_equals_oracle(model, plan_of(model, (1,), 5), tokens(model, 1, 2100))


@pytest.mark.parametrize("boundary", [1, 2, 17, T - 1, T])
@pytest.mark.parametrize("family", NATIVE)
def test_any_boundary_equals_the_oracle(family, boundary):
    model = shared(family)
    assert_equals_oracle(model, plan_of(model, GAPS, boundary), tokens(model, 1, T))


def test_a_boundary_per_sequence_equals_the_oracle():
    model = shared("llama")
    ids, mask = pad([tokens(model, n, seed=n) for n in (T, 19, 7)], "left")
    for boundary in ([1, 17, 7], torch.tensor([T, 1, 2])):
        assert_equals_oracle(model, plan_of(model), ids, mask=mask, boundary=boundary)


def test_a_plan_whose_boundary_exceeds_the_prompt_runs_it_at_full_depth():
    model = shared("llama")
    ids = tokens(model, 1, 7)
    assert_equals_oracle(model, plan_of(model, LAST, 100), ids)
    expected, _ = run_stock(model, ids)
    assert_close_fp32(run_native(model, plan_of(model, LAST, 100), ids).logits, expected[:, -1:], "logits")


# Shapes


@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads"),
    [(64, 1, 1), (64, 8, 1), (64, 6, 2), (80, 2, 2), (80, 4, 1), (128, 8, 1), (128, 4, 2), (256, 2, 2), (256, 4, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_head_shape_equals_the_oracle(dtype, head_dim, heads, kv_heads):
    model = llama(head_dim=head_dim, heads=heads, kv_heads=kv_heads, layers=4, dtype=dtype)
    assert_equals_oracle(model, plan_of(model, (1, 3), 3), tokens(model, 2, 45))


@pytest.mark.parametrize(
    "over",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"attention_bias": True, "mlp_bias": True, "dtype": torch.bfloat16},
        {"attention_bias": True, "mlp_bias": True, "dtype": torch.float16},
        {"tied": True},
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden": 200, "heads": 2, "kv_heads": 1},
        {"hidden": 33, "heads": 3, "kv_heads": 1, "intermediate": 47, "vocab": 17},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_every_model_variant_equals_the_oracle(over):
    model = llama(**over)
    assert_equals_oracle(model, plan_of(model, GAPS, 2), tokens(model, 2, T))


@pytest.mark.parametrize("length", [ROPE_LENGTH - 3, ROPE_LENGTH, ROPE_LENGTH + 1, 3 * ROPE_LENGTH])
@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_every_rope_scaling_equals_the_oracle_on_both_sides_of_its_length(kind, length):
    # "dynamic" remembers the longest prompt it saw: each side gets a model of its own.
    model, oracle = llama(rope=kind, layers=3), llama(rope=kind, layers=3)
    ids, plan = tokens(model, 1, length), Plan(num_layers=3, omit=(1,), boundary=2)
    ours, theirs = run_native(model, plan, ids), run_oracle(oracle, plan, ids)
    assert_close_fp32(ours.logits, theirs.logits, "logits")
    compare_caches(ours.cache, theirs.cache)


def test_weights_that_are_views_of_a_wider_matrix_equal_the_oracle():
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
                rows, columns = linear.weight.shape
                wide = torch.full((rows, columns + 5), float("nan"))
                wide[:, :columns] = linear.weight
                linear.weight = torch.nn.Parameter(wide[:, :columns])
                assert not linear.weight.is_contiguous()
    for length in (3, 111):  # few rows and many go through different matrix products
        assert_equals_oracle(model, plan_of(model, GAPS, 2), tokens(model, 1, length))


def test_a_massive_activation_does_not_overflow_the_projection_in_float16():
    model = llama(dtype=torch.float16)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] = 6e4
    ids = tokens(model, 1, T)
    result = assert_equals_oracle(model, plan_of(model, LAST, 2), ids)
    assert result.logits.isfinite().all()


def test_a_nan_in_a_weight_is_passed_on():
    model = llama()
    with torch.no_grad():
        model.model.layers[4].self_attn.v_proj.weight[0, 0] = float("nan")
    ours = run_native(model, plan_of(model, LAST), tokens(model, 1, T))
    for index, layer in enumerate(ours.cache.layers):
        assert layer.values[0, 0, :, 0].isnan().all() == (index == 4)
        assert not layer.keys[:, :, : T - 1].isnan().any()
    assert ours.logits.isnan().all()


# Against the stock model


@pytest.mark.parametrize("omit", [(), (5,)], ids=["nothing", "last layer"])
@pytest.mark.parametrize("family", NATIVE)
def test_omitting_nothing_or_only_the_last_layer_equals_the_stock_model(family, omit):
    model = shared(family)
    ids = tokens(model, 2, T)
    expected, expected_cache = run_stock(model, ids)
    ours = run_native(model, plan_of(model, omit), ids, past_key_values=DynamicCache())
    assert_close_fp32(ours.logits, expected[:, -1:], "logits")
    compare_caches(ours.cache, expected_cache)


@pytest.mark.parametrize("omit", OMITS.values(), ids=OMITS.keys())
@pytest.mark.parametrize("boundary", [T, T + 1])
def test_a_boundary_of_the_whole_prompt_equals_the_stock_model(omit, boundary):
    model = shared("qwen2")
    ids = tokens(model, 1, T)
    expected, expected_cache = run_stock(model, ids)
    ours = run_native(model, plan_of(model, omit, boundary), ids)
    assert_close_fp32(ours.logits, expected[:, -1:], "logits")
    compare_caches(ours.cache, expected_cache)


def test_wanting_all_rows_equals_the_stock_model():
    model = shared("llama")
    ids = tokens(model, 2, T)
    expected, expected_cache = run_stock(model, ids)
    ours = run_native(model, plan_of(model), ids, logits_to_keep=T)
    assert_close_fp32(ours.logits, expected, "logits")
    compare_caches(ours.cache, expected_cache)


def test_pruning_changes_the_result_where_it_should():
    model = shared("llama")
    ids = tokens(model, 1, T)
    expected, expected_cache = run_stock(model, ids)
    ours = run_native(model, plan_of(model), ids)
    assert rms(ours.logits - expected[:, -1:]) > 0.02
    with pytest.raises(AssertionError, match="layer 5 keys"):
        compare_caches(ours.cache, expected_cache)


# Wanted rows


@pytest.mark.parametrize("keep", [1, 3, T])
@pytest.mark.parametrize("family", NATIVE)
def test_any_number_of_wanted_rows_equals_the_oracle(family, keep):
    model = shared(family)
    result = assert_equals_oracle(model, plan_of(model, GAPS), tokens(model, 2, T), logits_to_keep=keep)
    assert result.logits.shape == (2, keep, model.config.vocab_size)


def test_wanted_rows_per_sequence_are_packed_and_equal_the_oracle():
    model = shared("llama")
    ids, mask = pad([tokens(model, n, seed=n) for n in (T, 19, 3)], "left")
    keep = [2, 5, 3]
    call = {"mask": mask, "logits_to_keep": keep, "boundary": [7, 1, 1]}
    assert_equals_oracle(model, plan_of(model), ids, **call)
    out = pop_ext.load(model, plan_of(model)).prefill(ids, attention_mask=mask, logits_to_keep=torch.tensor(keep))
    assert out.logits.shape == (10, model.config.vocab_size)
    assert out.hidden_states.shape == (10, model.config.hidden_size)
    assert out.cu_rows.dtype == torch.int32
    assert out.cu_rows.tolist() == [0, 2, 7, 10]


def test_one_number_of_wanted_rows_gives_no_row_offsets():
    model = shared("llama")
    assert pop_ext.load(model, plan_of(model)).prefill(tokens(model, 1, 5)).cu_rows is None


def test_the_logits_are_the_head_of_the_hidden_states():
    model = shared("llama")
    out = pop_ext.load(model, plan_of(model)).prefill(tokens(model, 2, 9), logits_to_keep=2)
    assert torch.equal(out.logits, model.lm_head(out.hidden_states))
    assert not out.logits.requires_grad


# Inputs


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_embeddings_equal_the_oracle(dtype):
    model = shared("llama", dtype=dtype)
    embeds = torch.randn(2, T, 96, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert_equals_oracle(model, plan_of(model, GAPS, 2), inputs_embeds=embeds)


def test_embeddings_of_ids_give_what_the_ids_give():
    model = shared("llama")
    ids = tokens(model, 2, T)
    native = pop_ext.load(model, plan_of(model))
    by_ids = native.prefill(ids)
    by_embeds = native.prefill(inputs_embeds=model.model.embed_tokens(ids).detach())
    assert torch.equal(by_ids.logits, by_embeds.logits)
    compare_caches(by_embeds.past_key_values, by_ids.past_key_values, atol=0.0)


def test_strided_and_int32_inputs_give_what_contiguous_int64_ones_give():
    model = shared("llama")
    ids, mask = pad([tokens(model, n, seed=n) for n in (T, 19)], "left")
    native = pop_ext.load(model, plan_of(model))
    expected = native.prefill(ids, attention_mask=mask)
    embeds = model.model.embed_tokens(ids).detach()
    wide = torch.zeros(2, T, 2, 96)
    wide[:, :, 1] = embeds
    for call in (
        {"input_ids": ids.t().contiguous().t(), "attention_mask": mask.t().contiguous().t()},
        {"input_ids": torch.stack([ids, -ids], dim=-1)[..., 0], "attention_mask": mask.bool()},
        {"input_ids": ids.int(), "attention_mask": mask.float()},
        {"inputs_embeds": wide[:, :, 1], "attention_mask": mask.int()},
    ):
        out = native.prefill(**call)
        assert torch.equal(out.logits, expected.logits)
        compare_caches(out.past_key_values, expected.past_key_values, atol=0.0)
    # Without a mask the packed rows are a view of the caller's tensor.
    unpadded = native.prefill(ids)
    assert torch.equal(native.prefill(inputs_embeds=wide[:, :, 1]).logits, unpadded.logits)


def test_explicit_position_ids_equal_the_oracle():
    model = shared("llama")
    ids = tokens(model, 2, T)
    positions = torch.arange(T)[None] * 2 + torch.tensor([[3], [50]])
    assert_equals_oracle(model, plan_of(model), ids, position_ids=positions)
    assert_equals_oracle(model, plan_of(model), ids, position_ids=positions[:1])
    assert_equals_oracle(model, plan_of(model), ids, position_ids=positions.int())


# Batches


def mixed_padding(model):
    """Sequences of 23, 11 and 1 tokens: at the right, at the left, in the middle of 30 columns."""
    ids, mask = torch.zeros(3, 30, dtype=torch.long), torch.zeros(3, 30, dtype=torch.long)
    for i, (start, length) in enumerate([(7, 23), (0, 11), (14, 1)]):
        ids[i, start : start + length], mask[i, start : start + length] = tokens(model, length, seed=i), 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_padded_batch_equals_the_oracle_and_its_masked_slots_are_zero(dtype, family, side):
    model = shared(family, dtype=dtype)
    if side == "mixed":
        ids, mask = mixed_padding(model)
    else:
        ids, mask = pad([tokens(model, n, seed=n) for n in (T, 19, 1)], side)
    assert_equals_oracle(model, plan_of(model, GAPS, 3), ids, mask=mask)


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
def test_a_padded_batch_of_a_windowed_model_equals_the_oracle(side):
    model = shared("mistral")
    if side == "mixed":
        ids, mask = mixed_padding(model)
    else:
        ids, mask = pad([tokens(model, n, seed=n) for n in (T, 19, 1)], side)
    assert_equals_oracle(model, plan_of(model, GAPS, 3), ids, mask=mask, past=DynamicCache())


def test_padding_may_hold_any_id():
    model = shared("llama")
    ids, mask = pad([tokens(model, n, seed=n) for n in (9, 4)], "left", fill=-100)
    assert_equals_oracle(model, plan_of(model), ids, mask=mask)


# Later turns


@pytest.mark.parametrize("past", [1, 2, 19, 65])
@pytest.mark.parametrize("family", NATIVE)
def test_a_second_turn_equals_the_oracle(family, past):
    model = shared(family)
    cache = run_oracle(model, plan_of(model), tokens(model, 2, past, seed=1)).cache
    assert_equals_oracle(model, plan_of(model, GAPS, 2), tokens(model, 2, 19), past=cache)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_second_turn_equals_the_oracle_in_low_precision(dtype):
    model = shared("llama", dtype=dtype)
    cache = run_oracle(model, plan_of(model), tokens(model, 2, 23, seed=1)).cache
    assert_equals_oracle(model, plan_of(model, GAPS, 2), tokens(model, 2, 19), past=cache)


@pytest.mark.parametrize("sides", [("left", "left"), ("left", "right"), ("right", "left"), ("right", "right")], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_second_turn_over_padding_equals_the_oracle(family, sides):
    model = shared(family)
    first, first_mask = pad([tokens(model, n, seed=n) for n in (30, 11, 3)], sides[0])
    second, second_mask = pad([tokens(model, n, seed=n) for n in (7, 20, 1)], sides[1])
    plan = plan_of(model, GAPS, 2)
    cache = run_native(model, plan, first, attention_mask=first_mask, past_key_values=DynamicCache()).cache
    mask = torch.cat([first_mask, second_mask], dim=1)
    assert_equals_oracle(model, plan, second, past=cache, mask=mask)


def test_a_third_turn_over_two_holes_equals_the_oracle():
    model = shared("llama")
    plan, cache, mask = plan_of(model, LAST, 2), DynamicCache(), torch.zeros(2, 0, dtype=torch.long)
    for turn, lengths in enumerate([(13, 5), (2, 9), (6, 6)]):
        ids, new_mask = pad([tokens(model, n, seed=10 * turn + n) for n in lengths], "right")
        mask = torch.cat([mask, new_mask], dim=1)
        cache = assert_equals_oracle(model, plan, ids, past=cache, mask=mask).cache


def test_slots_that_the_caller_masks_in_the_past_are_not_attended():
    model = shared("llama")
    _, cache = run_stock(model, tokens(model, 1, 12, seed=1))
    mask = torch.ones(1, 12 + 9, dtype=torch.long)
    mask[0, 3:6] = 0
    ours = run_native(model, plan_of(model), tokens(model, 1, 9), past_key_values=cache, attention_mask=mask)
    _, cache = run_stock(model, tokens(model, 1, 12, seed=1))
    theirs = run_oracle(model, plan_of(model), tokens(model, 1, 9), past_key_values=cache, attention_mask=mask)
    assert_close_fp32(ours.logits, theirs.logits, "logits")
    new = [layer.keys[:, :, 12:] for layer in ours.cache.layers]
    for a, e in zip(new, [layer.keys[:, :, 12:] for layer in theirs.cache.layers], strict=True):
        assert_close_fp32(a, e, "keys of the new tokens")


@pytest.mark.parametrize("family", NATIVE)
def test_a_chunked_prefill_equals_the_oracle_chunk_by_chunk(family):
    model = shared(family)
    ids, plan, cache = tokens(model, 2, 51), plan_of(model, GAPS, 3), None
    for begin, end in [(0, 20), (20, 21), (21, 45), (45, 51)]:
        cache = assert_equals_oracle(model, plan, ids[:, begin:end], past=cache, oracle_past=cache).cache


def test_a_chunked_prefill_that_omits_nothing_equals_one_call():
    model = shared("llama")
    ids, plan, cache = tokens(model, 1, 50), plan_of(model, ()), None
    for begin, end in [(0, 17), (17, 18), (18, 50)]:
        result = run_native(model, plan, ids[:, begin:end], past_key_values=cache)
        cache = result.cache
    whole = run_native(model, plan, ids)
    assert_close_fp32(result.logits, whole.logits, "logits")
    compare_caches(cache, whole.cache)


# Sliding windows


@pytest.mark.parametrize("given", ["DynamicCache(config)", "DynamicCache()"])
@pytest.mark.parametrize("boundary", [1, 5, WINDOW + 1])
@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_prompts_around_the_sliding_window_equal_the_oracle(family, length, boundary, given):
    model = shared(family, use_sliding_window=True) if family == "qwen2" else shared(family)
    cache = DynamicCache(config=model.config) if "config" in given else DynamicCache()
    plan = plan_of(model, GAPS, min(boundary, length))
    result = assert_equals_oracle(model, plan, tokens(model, 2, length), past=cache, oracle_past=DynamicCache())
    windowed = {1, 3, 5} if family == "qwen2" else set(range(6))
    for index, layer in enumerate(result.cache.layers):
        kept = min(length, WINDOW - 1) if "config" in given and index in windowed else length
        assert layer.keys.shape[2] == kept


@pytest.mark.parametrize("window", [1, 2])
def test_the_smallest_windows_equal_the_oracle(window):
    model = mistral(sliding_window=window)
    assert_equals_oracle(model, plan_of(model, GAPS, 3), tokens(model, 1, 19), past=DynamicCache())


# Decode


@torch.no_grad()
def decode(model, cache, ids, mask=None):
    """Logits [batch, steps, vocab] of the stock model fed `ids` [batch, steps] one by one."""
    logits = []
    for step in range(ids.shape[1]):
        call = {}
        if mask is not None:
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], dim=1)
            call = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        logits.append(model(ids[:, step : step + 1], past_key_values=cache, use_cache=True, **call).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("family", NATIVE)
def test_decode_over_the_native_cache_equals_decode_over_the_oracles(family, side):
    model, plan = shared(family), plan_of(shared(family), GAPS, 2)
    ids, mask = tokens(model, 2, T), None
    if side is not None:
        ids, mask = pad([tokens(model, n, seed=n) for n in (T, 9)], side)
    ours = run_native(model, plan, ids, attention_mask=mask)
    theirs = run_oracle(model, plan, ids, attention_mask=mask)
    following = tokens(model, 2, 6, seed=5)
    assert_close_fp32(
        decode(model, ours.cache, following, mask), decode(model, theirs.cache, following, mask), "decode logits"
    )


@pytest.mark.parametrize("family", NATIVE)
def test_greedy_generation_is_the_oracles_token_by_token(family):
    ids = tokens(shared(family), 2, 33, seed=1)
    generated = {}
    for backend in ("native", "reference"):
        model = copy.deepcopy(shared(family))
        pop_ext.enable(model, plan_of(model, LAST), strict=True, backend=backend)
        mask = torch.ones_like(ids)
        generated[backend] = model.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False)[:, 33:]
        assert pop_ext.last_call(model).backend == backend
    for row in generated["native"]:
        assert len(row) == 64
        assert len(set(row.tolist())) >= 16
    assert torch.equal(generated["native"], generated["reference"])
