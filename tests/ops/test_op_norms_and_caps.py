"""Features of Gemma in the operators: offsets of norm weights, norms of outputs, soft caps, two RoPE tables."""

from __future__ import annotations

import math

import pop_ext
import pytest
import torch
from against_oracle import run_native, run_stock
from attention_calls import make_call
from models import gemma2, gemma3, tokens
from op_calls import LAYOUTS, op_call, run_op
from op_operands import (
    DTYPES,
    EPS,
    GEOMETRIES,
    Caches,
    assert_one_rounding,
    random,
    rms_norm,
    rope_tables,
    rotated,
    strided,
)
from tolerance import assert_close_fp32, compare_caches

pop = torch.ops.pop
OFFSET = 1.0


@pytest.mark.parametrize("shape", [(1, 1), (3, 96), (19, 111), (129, 33), (2, 4096)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_adds_the_offset_to_its_weight(dtype, shape):
    x, weight = strided(random(*shape, dtype=dtype)), random(shape[-1], dtype=dtype, seed=1)
    assert_one_rounding(pop.rms_norm(x, weight, EPS, OFFSET), rms_norm(x, weight.double() + OFFSET))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 96), (19, 111), (129, 33), (2, 4096)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_delta_norm_normalises_before_the_residual_add(dtype, shape, with_bias):
    x, delta = random(*shape, dtype=dtype), strided(7 * random(*shape, dtype=dtype, seed=1))
    weight, norm, bias = (random(shape[-1], dtype=dtype, seed=seed) for seed in (2, 3, 4))
    before = x.double()
    out = pop.add_rms_norm(x, delta, weight, EPS, bias if with_bias else None, norm, OFFSET)
    addend = delta.double() + (bias.double() if with_bias else 0)
    assert_one_rounding(x, before + rms_norm(addend, norm.double() + OFFSET), ulps=3)
    assert_one_rounding(out, rms_norm(x, weight.double() + OFFSET))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_kv_adds_the_offset_to_gamma_and_rounds_once(dtype):
    keys, values = [random(6, 33, dtype=dtype)], [random(6, 33, dtype=dtype, seed=1)]
    norm = random(33, dtype=dtype, seed=2)
    expected = torch.cat([keys[0].float() * (norm.float() + OFFSET), values[0].float() * (norm.float() + OFFSET)])
    assert torch.equal(pop.fold_kv(keys, values, [norm], OFFSET), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_kv_without_norms_stacks_the_weights_unchanged(dtype):
    keys = [random(6, 33, dtype=dtype, seed=i) for i in range(2)]
    values = [strided(random(6, 33, dtype=dtype, seed=10 + i)) for i in range(2)]
    assert torch.equal(pop.fold_kv(keys, values, []), torch.cat([keys[0], values[0], keys[1], values[1]]))


@pytest.mark.parametrize("dim", [20, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_cache_write_adds_the_offset_to_its_norms(dtype, dim):
    geometry = GEOMETRIES["batch with past and start"]
    heads, kv_heads, rows = 4, 2, sum(count for count, _, _ in geometry)
    caches = Caches(geometry, kv_heads, dim, dtype, list(LAYOUTS)[2])
    query, key, value = (
        random(rows, h, dim, dtype=dtype, seed=s) for s, h in ((0, heads), (1, kv_heads), (2, kv_heads))
    )
    q_norm, k_norm = random(dim, dtype=dtype, seed=3), random(dim, dtype=dtype, seed=4)
    cos, sin = rope_tables(rows, dim)
    expected_q = rotated(rms_norm(query, q_norm.double() + OFFSET), cos, sin)
    expected_k = rotated(rms_norm(key, k_norm.double() + OFFSET), cos, sin)
    pop.rope_cache_write(
        query,
        key,
        value,
        cos,
        sin,
        *caches.lengths,
        caches.keys[0],
        caches.values[0],
        q_norm,
        k_norm,
        EPS,
        None,
        OFFSET,
    )
    assert_one_rounding(query, expected_q, ulps=4)
    assert_one_rounding(caches.new_rows(caches.keys[0]), expected_k, ulps=4)
    assert torch.equal(caches.new_rows(caches.values[0]), value)
    caches.assert_nothing_else_changed()


@pytest.mark.parametrize("softcap", [0.7, 5.0, 50.0])
@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("shape", [(4, 2, 64), (8, 1, 40), (2, 2, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_caps_its_scores(dtype, shape, window, softcap):
    tokens_of, past = [1, 19, 130], [70, 0, 5]
    call = make_call(shape, tokens_of, past, dtype=dtype, window=window, scale=1.3)
    actual = pop.attention(*call.args(), softcap=softcap).double()
    expected = capped_attention(call, softcap)
    bound = 1e-4 if dtype == torch.float32 else 0.03
    assert (actual - expected).abs().max() < bound
    assert (capped_attention(call, 0.0) - expected).abs().max() > bound


@pytest.mark.parametrize("softcap", [1e3, 1e6, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cap_far_above_the_scores_changes_nothing(dtype, softcap):
    call = make_call((4, 2, 64), [19, 130], [70, 5], dtype=dtype)
    bound = 2e-5 if dtype == torch.float32 else 0.02
    assert (pop.attention(*call.args(), softcap=softcap).double() - call.reference()).abs().max() < bound


@pytest.mark.parametrize("softcap", [-1.0, math.inf, math.nan])
def test_an_invalid_cap_is_refused_by_name(softcap):
    with pytest.raises(RuntimeError, match="softcap: expected a finite number >= 0"):
        pop.attention(*make_call().args(), softcap=softcap)


def capped_attention(call, softcap: float) -> torch.Tensor:
    """Compute attention with a soft cap: [rows, heads, head_dim], float64."""

    def attend(q, k, v, visible):
        scores = (q.double() @ k.double().transpose(1, 2)) * call.scale
        capped = softcap * (scores / softcap).tanh() if softcap else scores
        return capped.masked_fill(~visible, -math.inf).softmax(-1) @ v.double()

    return call.per_sequence(attend)


@pytest.mark.parametrize("build", [gemma2, gemma3])
def test_input_embeddings_are_not_scaled_again(build):
    model = build()
    native = pop_ext.load(model, pop_ext.Plan(6, (3, 4)))
    ids = tokens(model, 2, 19)
    from_ids = native.prefill(ids)
    from_embeds = native.prefill(inputs_embeds=model.get_input_embeddings()(ids).detach())
    torch.testing.assert_close(from_embeds.logits, from_ids.logits)


@pytest.mark.parametrize("build", [gemma2, gemma3])
def test_a_widened_model_keeps_its_rounded_embedding_scale(build):
    model = build(dtype=torch.bfloat16).float()
    ids = tokens(model, 1, 19)
    expected, cache = run_stock(model, ids)
    ours = run_native(model, pop_ext.Plan(6, ()), ids)
    assert_close_fp32(ours.logits, expected[:, -1:], "logits")
    compare_caches(ours.cache, cache)


@pytest.mark.parametrize(
    ("build", "change", "message"),
    [
        (gemma3, lambda call: call.pop("cos_local"), "cos_local: expected a table .*got none"),
        (gemma3, lambda call: call.update(sin_local=call["sin_local"][1:]), "sin_local: expected shape"),
        (gemma2, lambda call: call.update(cos_local=call["cos"]), "cos_local: expected none .*got one"),
    ],
    ids=["missing", "short", "one too many"],
)
def test_unfit_local_rope_tables_are_refused_by_name(build, change, message):
    native = pop_ext.load(build(), pop_ext.Plan(6, (3, 4)))
    call = op_call(native, [tokens(native.model, 9)])
    change(call)
    before = [cache.clone() for cache in call["key_cache"]]
    with pytest.raises(RuntimeError, match=message):
        run_op(call)
    assert all(map(torch.equal, call["key_cache"], before))
