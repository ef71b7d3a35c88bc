"""The operators of torch.ops.pop equal plain torch, on odd sizes and strides, in every dtype."""

from __future__ import annotations

import functools

import pytest
import torch
from op_calls import LAYOUTS, SENTINEL, int32, offsets
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
from tolerance import assert_close_fp32, assert_low_precision
from torch import Tensor
from torch.nn import functional as F

pop = torch.ops.pop


# rms_norm, add_rms_norm, gated_act


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1), (3, 96), (19, 111), (2, 5, 129), (500, 33)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_equals_its_formula(dtype, shape):
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    expected = rms_norm(x, weight)
    assert_one_rounding(pop.rms_norm(x, weight, EPS), expected)
    if len(shape) > 1:
        assert_one_rounding(pop.rms_norm(strided(x), weight, EPS), expected)
        assert_one_rounding(
            pop.rms_norm(x.t().contiguous().t() if x.ndim == 2 else x.mT.contiguous().mT, weight, EPS), expected
        )


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 96), (19, 111), (129, 33)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_updates_the_residual_and_normalises_it(dtype, shape, with_bias):
    x, delta = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    weight, bias = random(shape[1], dtype=dtype, seed=2), random(shape[1], dtype=dtype, seed=3)
    total = x.double() + delta.double() + (bias.double() if with_bias else 0)
    residual = strided(x)
    out = pop.add_rms_norm(residual, strided(delta), weight, EPS, bias if with_bias else None)
    assert_one_rounding(residual, total)
    assert_one_rounding(out, rms_norm(residual, weight))


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (19, 111), (2, 3, 129)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_act_equals_its_formula_and_leaves_its_inputs(dtype, activation, shape, with_bias):
    gate, up = 3 * random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    biases = [random(shape[-1], dtype=dtype, seed=seed) for seed in (2, 3)] if with_bias else [None, None]
    g, u = (x.double() + (0 if b is None else b.double()) for x, b in zip((gate, up), biases, strict=True))
    before = gate.clone(), up.clone()
    out = pop.gated_act(gate, up, activation, *biases)
    assert_one_rounding(out, ACTIVATIONS[activation](g) * u, ulps=4)
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])
    assert torch.equal(pop.gated_act(strided(gate), strided(up), activation, *biases), out)


def test_gated_act_is_silu_by_default():
    gate, up = random(3, 8), random(3, 8, seed=1)
    assert torch.equal(pop.gated_act(gate, up), pop.gated_act(gate, up, "silu"))


# rope_cache_write


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("scattered", [False, True], ids=["consecutive", "slot table"])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 80), (128, 32), (20, 6)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_cache_write_writes_only_the_given_slots(dtype, dim, rotary, scattered, geometry):
    caches = Caches(geometry, 2, dim, dtype, scattered=scattered)
    rows = sum(count for count, _, _ in geometry)
    query, key, value = (random(rows, heads, dim, dtype=dtype, seed=heads) for heads in (6, 2, 2))
    cos, sin = rope_tables(rows, rotary)
    expected_q, expected_k = rotated(query, cos, sin), rotated(key, cos, sin)
    pop.rope_cache_write(
        query, key, value, cos, sin, *caches.lengths, caches.keys[0], caches.values[0], slot_table=caches.slot_table
    )
    assert_one_rounding(query, expected_q, ulps=4)
    assert_one_rounding(caches.new_rows(caches.keys[0]), expected_k, ulps=4)
    assert torch.equal(caches.new_rows(caches.values[0]), value)
    caches.assert_nothing_else_changed()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_cache_write_normalises_heads_of_any_stride(dtype, layout):
    geometry, dim = GEOMETRIES["batch with past and start"], 80
    caches = Caches(geometry, 2, dim, dtype, layout)
    rows = sum(count for count, _, _ in geometry)
    wide = random(rows, 10, dim, dtype=dtype)  # q, k and v are views of one fused projection
    query, key, value = wide.split([6, 2, 2], dim=1)
    norms = [random(dim, dtype=dtype, seed=seed) for seed in (1, 2)]
    cos, sin = rope_tables(rows, dim)
    expected_q, expected_k = (rotated(rms_norm(x, norm), cos, sin) for x, norm in zip((query, key), norms, strict=True))
    key_before, value_before = key.clone(), value.clone()
    pop.rope_cache_write(query, key, value, cos, sin, *caches.lengths, caches.keys[0], caches.values[0], *norms, EPS)
    assert_one_rounding(query, expected_q, ulps=4)
    assert_one_rounding(caches.new_rows(caches.keys[0]), expected_k, ulps=4)
    assert torch.equal(caches.new_rows(caches.values[0]), value_before)
    assert torch.equal(key, key_before)
    caches.assert_nothing_else_changed()


def test_bfloat16_rope_tables_act_as_their_float32_values():
    geometry = GEOMETRIES["past"]
    written = []
    for widen in (False, True):
        caches = Caches(geometry, 2, 64, torch.float32)
        cos, sin = rope_tables(7, 64, torch.bfloat16)
        if widen:
            cos, sin = cos.float(), sin.float()
        query, key = (random(7, heads, 64, seed=heads) for heads in (6, 2))
        pop.rope_cache_write(query, key, key, cos, sin, *caches.lengths, caches.keys[0], caches.values[0])
        written.append((query, caches.keys[0]))
    assert torch.equal(written[0][0], written[1][0])
    assert torch.equal(written[0][1], written[1][1])


# attention


def attention(query: Tensor, caches: Caches, scale: float, window: int, dtype) -> Tensor:
    """Compute causal attention of each sequence over its positions, aligned at the end, in `dtype`."""
    out, row = [], 0
    for i, (count, past, _) in enumerate(caches.geometry):
        q = query[row : row + count].transpose(0, 1).to(dtype)
        k, v = (caches.rows_of(c[0], i).to(dtype) for c in (caches.keys, caches.values))
        group = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        own, other = torch.arange(past, past + count)[:, None], torch.arange(past + count)[None]
        hidden = (other > own) | ((other <= own - window) if window else torch.zeros(1, dtype=torch.bool))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        out.append((scores.to(wide).softmax(-1).to(dtype) @ v).transpose(0, 1))
        row += count
    return torch.cat(out)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("window", [0, 1, 2, 16, 1000])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 64), (8, 1, 80), (6, 2, 128), (2, 2, 256), (4, 2, 24)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_equals_softmax_attention(dtype, heads, kv_heads, dim, window, geometry):
    caches = Caches(geometry, kv_heads, dim, dtype)
    caches.fill_past()
    rows = sum(count for count, _, _ in geometry)
    query = random(rows, heads, dim, dtype=dtype, seed=1)
    for cache, seed in ((caches.keys[0], 2), (caches.values[0], 3)):
        for i, (count, _, _) in enumerate(geometry):
            cache[i][:, caches.slots(i)] = random(kv_heads, count, dim, dtype=dtype, seed=10 * i + seed)
    scale = 1.3 * dim**-0.5
    before = [buffer.clone() for buffer in (query, *caches.buffers)]
    out = pop.attention(query, caches.keys[0], caches.values[0], *caches.lengths, scale, window)
    exact = attention(query, caches, scale, window, torch.float64)
    if dtype == torch.float32:
        assert_close_fp32(out, exact, "attention", atol=1e-5)
    else:
        assert_low_precision(out, attention(query, caches, scale, window, dtype), exact, "attention")
    for buffer, copy in zip((query, *caches.buffers), before, strict=True):
        assert torch.equal(buffer, copy)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scattered", [False, True], ids=["consecutive", "slot table"])
def test_attention_reads_caches_of_any_stride(scattered, layout):
    geometry = GEOMETRIES["batch with past and start"]
    caches = Caches(geometry, 2, 64, torch.float32, layout, scattered)
    caches.fill_past()
    rows = sum(count for count, _, _ in geometry)
    for cache, seed in ((caches.keys[0], 2), (caches.values[0], 3)):
        for i, (count, _, _) in enumerate(geometry):
            cache[i][:, caches.slots(i)] = random(2, count, 64, seed=10 * i + seed)
    query = random(rows, 9, 64, seed=1)[:, 3:]  # a view of a wider projection
    out = pop.attention(
        query, caches.keys[0], caches.values[0], *caches.lengths, 0.125, 0, slot_table=caches.slot_table
    )
    assert_close_fp32(out, attention(query, caches, 0.125, 0, torch.float64), "attention", atol=1e-5)


@pytest.mark.parametrize("length", [63, 64, 65, 500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_long_prompts_equals_softmax_attention(dtype, length):
    geometry = [(length, 3, 0)]
    caches = Caches(geometry, 1, 64, dtype)
    caches.keys = [random(1, 1, length + 3, 64, dtype=dtype, seed=2)]
    caches.values = [random(1, 1, length + 3, 64, dtype=dtype, seed=3)]
    query = random(length, 2, 64, dtype=dtype, seed=1)
    for window in (0, 70):
        out = pop.attention(query, caches.keys[0], caches.values[0], *caches.lengths, 0.125, window)
        exact = attention(query, caches, 0.125, window, torch.float64)
        if dtype == torch.float32:
            assert_close_fp32(out, exact, "attention", atol=1e-5)
        else:
            assert_low_precision(out, attention(query, caches, 0.125, window, dtype), exact, "attention")


# fold_kv, kv_project


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_kv_stacks_the_weights_times_their_norm(dtype):
    keys = [random(6, 33, dtype=dtype, seed=i) for i in range(3)]
    values = [strided(random(6, 33, dtype=dtype, seed=10 + i)) for i in range(3)]
    norms = [random(33, dtype=dtype, seed=20 + i) for i in range(3)]
    expected = [
        weight.float() * norm.float()
        for key, value, norm in zip(keys, values, norms, strict=True)
        for weight in (key, value)
    ]
    assert torch.equal(pop.fold_kv(keys, values, norms), torch.cat(expected).to(dtype))


def projected(hidden, keys, values, norms, biases, k_norms, cos, sin, dtype):
    """Return K and V [rows, heads, dim] of each layer, computed by norm, projection and RoPE in `dtype`."""
    x, out = hidden.to(dtype), []
    dim = k_norms[0].shape[0]
    for i in range(len(keys)):
        normed = F.rms_norm(x, (x.shape[-1],), norms[i].to(dtype), EPS)
        k = F.linear(normed, keys[i].to(dtype), biases[0][i].to(dtype)).unflatten(-1, (-1, dim))
        v = F.linear(normed, values[i].to(dtype), biases[1][i].to(dtype)).unflatten(-1, (-1, dim))
        k = F.rms_norm(k, (dim,), k_norms[i].to(dtype), EPS)
        out.append((rotated(k, cos, sin).to(dtype), v))
    return out


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("scattered", [False, True], ids=["consecutive", "slot table"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_project_equals_projecting_layer_by_layer(dtype, scattered, layers, geometry):
    heads, dim, hidden_size = 2, 20, 33
    layout = list(LAYOUTS)[layers]
    caches = Caches(geometry, heads, dim, dtype, layout, scattered, layers)
    rows = sum(count for count, _, _ in geometry)
    hidden = strided(5 * random(rows, hidden_size, dtype=dtype))
    keys, values = (
        [random(heads * dim, hidden_size, seed=s + i).mul(hidden_size**-0.5).to(dtype) for i in range(layers)]
        for s in (10, 20)
    )
    norms = [1 + random(hidden_size, dtype=dtype, seed=30 + i) for i in range(layers)]
    k_norms = [1 + random(dim, dtype=dtype, seed=40 + i) for i in range(layers)]
    biases = [[random(heads * dim, dtype=dtype, seed=s + i) for i in range(layers)] for s in (50, 60)]
    cos, sin = rope_tables(rows, dim)
    weight = pop.fold_kv(keys, values, norms)
    pop.kv_project(
        hidden, weight, cos, sin, *caches.lengths, EPS, caches.keys, caches.values, *biases, k_norms, caches.slot_table
    )
    exact = projected(hidden, keys, values, norms, biases, k_norms, cos, sin, torch.float64)
    same = projected(hidden, keys, values, norms, biases, k_norms, cos, sin, dtype)
    for i in range(layers):
        for cache, wanted, theirs, kind in zip(
            (caches.keys[i], caches.values[i]), exact[i], same[i], "KV", strict=True
        ):
            ours = caches.new_rows(cache)
            if dtype == torch.float32:
                assert_close_fp32(ours, wanted, f"{kind} of layer {i}", atol=2e-5)
            else:
                assert_low_precision(ours, theirs, wanted, f"{kind} of layer {i}")
    caches.assert_nothing_else_changed()


def test_kv_project_in_chunks_equals_one_row_at_a_time():
    rows = 1030  # more than one chunk
    hidden, weight = random(rows, 33), random(2 * 16, 33, seed=1)
    cos, sin = rope_tables(rows, 16)
    keys, values = torch.full((2, 1, 1, rows, 16), SENTINEL)
    pop.kv_project(hidden, weight, cos, sin, offsets([rows]), int32([0]), int32([0]), EPS, [keys], [values])
    for row in (0, 1023, 1024, 1029):
        one_key, one_value = torch.zeros(2, 1, 1, 1, 16)
        call = (offsets([1]), int32([0]), int32([0]), EPS, [one_key], [one_value])
        pop.kv_project(hidden[row : row + 1], weight, cos[row : row + 1], sin[row : row + 1], *call)
        assert_close_fp32(keys[:, :, row], one_key[:, :, 0], "key", atol=1e-5)
        assert_close_fp32(values[:, :, row], one_value[:, :, 0], "value", atol=1e-5)
