"""Compare native.prefill with the oracle and the stock model: logits, hidden states and K/V of every layer."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, NATIVE, OMITS, assert_equals_oracle, plan_of, run_native, run_oracle, run_stock
from models import FAMILIES, ROPE_KINDS, ROPE_LENGTH, llama, pad, rope_parameters, shared, tokens
from op_operands import random
from pop_ext import Plan
from tolerance import assert_close_fp32, compare_caches, rms
from transformers import DynamicCache

LOW = (torch.bfloat16, torch.float16)
T = 40


# Plans and lengths


@pytest.mark.parametrize("omit", OMITS.values(), ids=OMITS.keys())
@pytest.mark.parametrize("family", NATIVE)
def test_every_omitted_set_equals_the_oracle(family, omit):
    model = shared(family)
    assert_equals_oracle(model, plan_of(model, omit, 2), tokens(model, 2, T))


@pytest.mark.parametrize("omit", [GAPS, OMITS["all but the first"]], ids=["gaps", "all but the first"])
@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_is_as_close_to_float32_as_the_oracle(dtype, family, omit):
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


def test_a_prompt_of_several_chunks_equals_the_oracle():
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


def test_a_boundary_longer_than_the_prompt_runs_full_depth():
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


LONGROPE = {"phi3": True, "gemma3": False}
"""Families with only "longrope" (Phi-3, whose config has no other scaling) or never with it.

Transformers 5.17 fails with "longrope" where RoPE tables differ by layer, as in Gemma 3.
"""

SCALED = [
    (family, kind)
    for family in NATIVE
    for kind in ROPE_KINDS
    if kind != "default" and LONGROPE.get(family, kind == "longrope") == (kind == "longrope")
]
"""RoPE scalings of each family. All other tests run the default."""


def scaled(family: str, kind: str) -> torch.nn.Module:
    over = {"layers": 3, "rope": kind}
    if family == "phi3":  # its config derives the number of factors from hidden size and heads
        half = {**rope_parameters(kind, 32), "partial_rotary_factor": 0.5}
        over = {"layers": 3, "hidden": 256, "rope_parameters": half}
    elif kind == "dynamic":
        over["max_position_embeddings"] = ROPE_LENGTH
    return FAMILIES[family](**over)


@pytest.mark.parametrize(("family", "kind"), SCALED)
def test_every_rope_scaling_equals_the_oracle_around_its_length(family, kind):
    for length in (ROPE_LENGTH, *((ROPE_LENGTH - 3, ROPE_LENGTH + 1) if family == "llama" else ()), 3 * ROPE_LENGTH):
        # "dynamic" remembers the longest prompt, so the native path and the oracle get a model each.
        model, oracle = scaled(family, kind), scaled(family, kind)
        ids, plan = tokens(model, 1, length), Plan(num_layers=3, omit=(1,), boundary=2)
        ours, theirs = run_native(model, plan, ids), run_oracle(oracle, plan, ids)
        assert_close_fp32(ours.logits, theirs.logits, "logits")
        compare_caches(ours.cache, theirs.cache)
    if kind != "dynamic" or length > ROPE_LENGTH:
        default = run_native(FAMILIES[family](layers=3, **({"hidden": 256} if family == "phi3" else {})), plan, ids)
        assert rms(ours.logits - default.logits) > 0.05 * rms(default.logits), "the scaling changes nothing"


def test_weights_with_gaps_between_rows_equal_the_oracle():
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
                rows, columns = linear.weight.shape
                with_gaps = torch.full((rows, columns + 5), float("nan"))
                with_gaps[:, :columns] = linear.weight
                linear.weight = torch.nn.Parameter(with_gaps[:, :columns])
                assert not linear.weight.is_contiguous()
    for length in (3, 111):  # few and many rows take different matrix products
        assert_equals_oracle(model, plan_of(model, GAPS, 2), tokens(model, 1, length))


def test_a_massive_activation_does_not_overflow_the_projection_in_float16():
    model = llama(dtype=torch.float16)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] = 6e4
    ids = tokens(model, 1, T)
    result = assert_equals_oracle(model, plan_of(model, LAST, 2), ids)
    assert result.logits.isfinite().all()


def test_a_nan_in_a_weight_reaches_the_output():
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
def test_omitting_nothing_or_the_last_layer_equals_the_stock_model(family, omit):
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


def test_keeping_all_rows_equals_the_stock_model():
    model = shared("llama")
    ids = tokens(model, 2, T)
    expected, expected_cache = run_stock(model, ids)
    ours = run_native(model, plan_of(model), ids, logits_to_keep=T)
    assert_close_fp32(ours.logits, expected, "logits")
    compare_caches(ours.cache, expected_cache)


def test_pruning_changes_the_logits_and_the_cache():
    model = shared("llama")
    ids = tokens(model, 1, T)
    expected, expected_cache = run_stock(model, ids)
    ours = run_native(model, plan_of(model), ids)
    assert rms(ours.logits - expected[:, -1:]) > 0.02
    with pytest.raises(AssertionError, match="layer 5 keys"):
        compare_caches(ours.cache, expected_cache)


# logits_to_keep


@pytest.mark.parametrize("keep", [1, 3, T])
@pytest.mark.parametrize("family", NATIVE)
def test_any_logits_to_keep_equals_the_oracle(family, keep):
    model = shared(family)
    result = assert_equals_oracle(model, plan_of(model, GAPS), tokens(model, 2, T), logits_to_keep=keep)
    assert result.logits.shape == (2, keep, model.config.vocab_size)


def test_packed_logits_per_sequence_equal_the_oracle():
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


def test_a_single_logits_to_keep_gives_no_row_offsets():
    model = shared("llama")
    assert pop_ext.load(model, plan_of(model)).prefill(tokens(model, 1, 5)).cu_rows is None


def test_the_logits_are_the_head_of_the_hidden_states():
    model = shared("llama")
    out = pop_ext.load(model, plan_of(model)).prefill(tokens(model, 2, 9), logits_to_keep=2)
    assert_close_fp32(out.logits, model.lm_head(out.hidden_states), "logits", 1e-5)
    assert not out.logits.requires_grad


# Inputs


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_embeddings_equal_the_oracle(dtype):
    model = shared("llama", dtype=dtype)
    embeds = random(2, T, 96, dtype=dtype, seed=3)
    assert_equals_oracle(model, plan_of(model, GAPS, 2), inputs_embeds=embeds)


def test_embeddings_give_the_same_bits_as_their_ids():
    model = shared("llama")
    ids = tokens(model, 2, T)
    native = pop_ext.load(model, plan_of(model))
    by_ids = native.prefill(ids)
    by_embeds = native.prefill(inputs_embeds=model.model.embed_tokens(ids).detach())
    assert torch.equal(by_ids.logits, by_embeds.logits)
    compare_caches(by_embeds.past_key_values, by_ids.past_key_values, atol=0.0)


def test_strided_and_int32_inputs_give_the_same_bits():
    model = shared("llama")
    ids, mask = pad([tokens(model, n, seed=n) for n in (T, 19)], "left")
    native = pop_ext.load(model, plan_of(model))
    expected = native.prefill(ids, attention_mask=mask)
    embeds = model.model.embed_tokens(ids).detach()
    with_gaps = torch.zeros(2, T, 2, 96)
    with_gaps[:, :, 1] = embeds
    for call in (
        {"input_ids": ids.t().contiguous().t(), "attention_mask": mask.t().contiguous().t()},
        {"input_ids": torch.stack([ids, -ids], dim=-1)[..., 0], "attention_mask": mask.bool()},
        {"input_ids": ids.int(), "attention_mask": mask.float()},
        {"inputs_embeds": with_gaps[:, :, 1], "attention_mask": mask.int()},
    ):
        out = native.prefill(**call)
        assert torch.equal(out.logits, expected.logits)
        compare_caches(out.past_key_values, expected.past_key_values, atol=0.0)
    # Without a mask the packed rows are a view of the caller's tensor.
    unpadded = native.prefill(ids)
    assert torch.equal(native.prefill(inputs_embeds=with_gaps[:, :, 1]).logits, unpadded.logits)


def test_explicit_position_ids_equal_the_oracle():
    model = shared("llama")
    ids = tokens(model, 2, T)
    positions = torch.arange(T)[None] * 2 + torch.tensor([[3], [50]])
    assert_equals_oracle(model, plan_of(model), ids, position_ids=positions)
    assert_equals_oracle(model, plan_of(model), ids, position_ids=positions[:1])
    assert_equals_oracle(model, plan_of(model), ids, position_ids=positions.int())
