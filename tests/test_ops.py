"""torch.ops.pop.*: each operator against plain torch, on odd sizes and strides, in every dtype."""

from __future__ import annotations

import functools
import json

import pop_ext
import pytest
import torch
from against_oracle import GAPS, plan_of, run_oracle
from models import FAMILIES, llama, tokens
from op_calls import LAYOUTS, SENTINEL, int32, offsets, op_call, rope_of, run_op
from pop_ext import Plan
from pop_ext.families import describe
from tolerance import assert_close_fp32, assert_low_precision
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

pop = torch.ops.pop
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5


@functools.cache
def shared(family: str = "llama", **over):
    """A model that tests only read."""
    return FAMILIES[family](**over)


def random(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_one_rounding(actual: Tensor, expected: Tensor, ulps: float = 2.0):
    """Equal to `expected` (computed in float64) but for rounding to actual's dtype."""
    eps = max(torch.finfo(actual.dtype).eps, 1e-6)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=ulps * eps, atol=ulps * eps * 0.1)


def strided(x: Tensor) -> Tensor:
    """The same values with gaps between rows."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


# rms_norm, add_rms_norm, gated_act


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


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


# The geometry of calls on a cache: (tokens, past, start) of each sequence


GEOMETRIES = {
    "one token": [(1, 0, 0)],
    "19 tokens": [(19, 0, 0)],
    "past": [(7, 12, 0)],
    "batch with past and start": [(7, 5, 3), (1, 0, 0), (33, 2, 9), (1, 40, 1)],
}
CAPACITY = 50


class Caches:
    """One pair of caches inside larger buffers of sentinels, and the addresses of a geometry in it."""

    def __init__(self, geometry, heads, dim, dtype, layout="separate", scattered=False, layers=1):
        self.geometry = geometry
        tokens_of = [tokens for tokens, _, _ in geometry]
        self.lengths = (offsets(tokens_of), int32(p for _, p, _ in geometry), int32(s for _, _, s in geometry))
        self.slot_table = None
        if scattered:
            generator = torch.Generator().manual_seed(7)
            slots = [torch.randperm(CAPACITY, generator=generator) for _ in geometry]
            # Strided on purpose; columns past a sequence's positions are not read.
            self.slot_table = torch.stack(slots).to(torch.int32).t().contiguous().t()
        self.buffers, self.keys, self.values = LAYOUTS[layout](layers, len(geometry), heads, CAPACITY, dim, dtype)
        self.before = [buffer.clone() for buffer in self.buffers]
        self.after = None

    def slots(self, sequence: int, new_only: bool = True) -> Tensor:
        """Slots of a sequence's new positions, or of all of them."""
        count, past, start = self.geometry[sequence]
        positions = torch.arange(past if new_only else 0, past + count)
        return positions + start if self.slot_table is None else self.slot_table[sequence, positions].long()

    def fill_past(self, seed: int = 5):
        """Random K and V at every past position."""
        for number, cache in enumerate((*self.keys, *self.values)):
            for i, (count, past, _) in enumerate(self.geometry):
                slots = self.slots(i, new_only=False)[:-count]
                cache[i][:, slots] = random(cache.shape[1], past, cache.shape[3], dtype=cache.dtype, seed=seed + number)
        self.before = [buffer.clone() for buffer in self.buffers]

    def new_rows(self, cache: Tensor) -> Tensor:
        """[rows, heads, dim]: what stands at the new positions, by sequence."""
        return torch.cat([cache[i][:, self.slots(i)].transpose(0, 1) for i in range(len(self.geometry))])

    def rows_of(self, cache: Tensor, sequence: int) -> Tensor:
        """[heads, past + tokens, dim] of one sequence, in order."""
        return cache[sequence][:, self.slots(sequence, new_only=False)]

    def assert_nothing_else_changed(self):
        """Puts what stood at the new positions back: the buffers must then be what they were, bit by bit."""
        shadows = [buffer.clone() for buffer in self.buffers]
        for cache in (*self.keys, *self.values):
            for i in range(len(self.geometry)):
                cache[i][:, self.slots(i)] = SENTINEL
        for buffer, before in zip(self.buffers, self.before, strict=True):
            assert torch.equal(buffer, before), "a slot that the call does not address was written"
        for buffer, shadow in zip(self.buffers, shadows, strict=True):
            buffer.copy_(shadow)


def rope_tables(rows: int, rotary: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    angle = 3 * random(rows, rotary // 2, seed=8)
    return torch.cat([angle.cos()] * 2, 1).to(dtype), torch.cat([angle.sin()] * 2, 1).to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [rows, heads, dim] turned in its first `rotary` channels; float64."""
    rotary, x = cos.shape[1], x.double()
    half = rotary // 2
    turned, rest = x[..., :rotary], x[..., rotary:]
    crossed = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    return torch.cat([turned * cos.double()[:, None] + crossed * sin.double()[:, None], rest], -1)


# rope_cache_write


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("scattered", [False, True], ids=["consecutive", "slot table"])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 80), (128, 32), (20, 6)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_cache_write_turns_and_writes_only_where_it_is_told(dtype, dim, rotary, scattered, geometry):
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
def test_rope_cache_write_normalises_heads_and_takes_any_stride(dtype, layout):
    geometry, dim = GEOMETRIES["batch with past and start"], 80
    caches = Caches(geometry, 2, dim, dtype, layout)
    rows = sum(count for count, _, _ in geometry)
    wide = random(rows, 10, dim, dtype=dtype)  # q, k and v of one fused projection
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


def test_rope_tables_in_bfloat16_are_those_values_in_float32():
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
    """Rows of each sequence over its own positions, causal and aligned at the end; computed in `dtype`."""
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
    query = random(rows, 9, 64, seed=1)[:, 3:]  # rows of a wider projection
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
    """K and V [rows, heads, dim] of each layer as its own modules would compute them, in `dtype`."""
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
def test_kv_project_equals_norm_projection_and_rope_layer_by_layer(dtype, scattered, layers, geometry):
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


def test_kv_project_of_several_chunks_equals_one_row_at_a_time():
    rows = 1030  # more than are in flight at once
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


# prefill on caches of one's own


def assert_prefill_equals_oracle(native, prompts, call, past=None):
    """Hidden states of the wanted rows, and K/V of every layer and position, sequence by sequence."""
    hidden = run_op(call)
    boundary, keep, start = (call[name].tolist() for name in ("boundary", "logits_to_keep", "cache_start"))
    row = 0
    for i, ids in enumerate(prompts):
        cache = None if past is None else past[i]
        expected = run_oracle(
            native.model, native.plan, ids[None], boundary=boundary[i], logits_to_keep=keep[i], past_key_values=cache
        )
        assert_close_fp32(hidden[row : row + keep[i]], expected.hidden_states[0], f"hidden states of sequence {i}")
        row += keep[i]
        for number, layer in enumerate(expected.cache.layers):
            slots = slice(start[i], start[i] + layer.keys.shape[2])
            where = f"layer {number}, sequence {i}"
            assert_close_fp32(call["key_cache"][number][i][:, slots], layer.keys[0], f"keys, {where}")
            assert_close_fp32(call["value_cache"][number][i][:, slots], layer.values[0], f"values, {where}")
    assert row == len(hidden)
    return hidden


def assert_sentinels_outside(call, spans):
    """Slots outside `spans[i]` of sequence i still hold the sentinel."""
    for cache in (*call["key_cache"], *call["value_cache"]):
        for i, (begin, end) in enumerate(spans):
            assert (cache[i][:, :begin] == SENTINEL).all()
            assert (cache[i][:, end:] == SENTINEL).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_prefill_fills_caches_of_any_stride(family, layout):
    native = pop_ext.load(shared(family), plan_of(shared(family), GAPS, 2))
    prompts = [tokens(native.model, n, seed=n) for n in (19, 1, 33)]
    call = op_call(
        native, prompts, start=[3, 0, 7], boundary=[2, 1, 9], logits_to_keep=[2, 1, 4], capacity=45, layout=layout
    )
    assert_prefill_equals_oracle(native, prompts, call)
    assert_sentinels_outside(call, [(3, 22), (0, 1), (7, 40)])


def test_prefill_writes_no_byte_between_the_views():
    native = pop_ext.load(shared(), plan_of(shared(), GAPS))
    spec = native.spec
    for name in ("padded channels", "[B, S, H, D]"):
        call = op_call(native, [tokens(native.model, 9)])
        buffers, keys, values = LAYOUTS[name](spec.num_layers, 1, spec.num_kv_heads, 11, spec.head_dim, torch.float32)
        run_op({**call, "key_cache": keys, "value_cache": values})
        for cache in (*keys, *values):
            assert not (cache[:, :, :9] == SENTINEL).any()
            cache[:, :, :9] = SENTINEL
        assert all((buffer == SENTINEL).all() for buffer in buffers)


def test_prefill_continues_a_cache_of_ones_own():
    native = pop_ext.load(shared(), plan_of(shared(), GAPS, 2))
    first = [tokens(native.model, n, seed=n) for n in (19, 4)]
    call = op_call(native, first, start=[2, 5], capacity=60)
    run_op(call)
    past = [run_oracle(native.model, native.plan, ids[None]).cache for ids in first]
    second = [tokens(native.model, n, seed=n) for n in (7, 20)]
    again = op_call(native, second, past=[19, 4], start=[2, 5], capacity=60)
    again.update(key_cache=call["key_cache"], value_cache=call["value_cache"])
    assert_prefill_equals_oracle(native, second, again, past)
    assert_sentinels_outside(again, [(2, 28), (5, 29)])


def test_prefill_scatters_through_a_slot_table():
    native = pop_ext.load(shared(), plan_of(shared(), GAPS, 2))
    prompts = [tokens(native.model, n, seed=n) for n in (19, 4)]
    straight = op_call(native, prompts, capacity=30)
    expected = run_op(straight)
    table = torch.stack([torch.randperm(30) for _ in prompts]).to(torch.int32)
    scattered = {**op_call(native, prompts, capacity=30), "slot_table": table}
    assert torch.equal(run_op(scattered), expected)
    for name in ("key_cache", "value_cache"):
        for ours, theirs in zip(scattered[name], straight[name], strict=True):
            for i in range(2):
                assert torch.equal(ours[i][:, table[i].long()], theirs[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_takes_ids_of_either_width_strided_lengths_and_any_form_of_rope_tables(dtype):
    model = shared(dtype=dtype)
    native = pop_ext.load(model, plan_of(model, GAPS, 2))
    prompts = [tokens(model, n, seed=n) for n in (19, 4)]

    def run(**over):
        call = {**op_call(native, prompts), **over}
        return [run_op(call), *call["key_cache"], *call["value_cache"]]

    call = op_call(native, prompts)
    expected = run()
    half = native.spec.rotary_dim // 2
    spread = {
        name: torch.stack([call[name], call[name] + 1], dim=1)[:, 0]
        for name in ("cu_seqlens", "past_lens", "cache_start", "boundary", "logits_to_keep")
    }
    assert not spread["past_lens"].is_contiguous()
    rows = len(call["input"])
    variants = {
        "int32 ids": {"input": call["input"].int()},
        "strided ids": {"input": torch.stack([call["input"]] * 2, dim=1)[:, 0]},
        "half width": {"cos": call["cos"][:, :half].contiguous(), "sin": call["sin"][:, :half].contiguous()},
        "strided half width": {"cos": call["cos"][:, :half], "sin": call["sin"][:, half:]},
        "strided lengths": spread,
        "embeddings": {"input": model.model.embed_tokens.weight.detach()[call["input"]]},
        "strided embeddings": {"input": strided(model.model.embed_tokens.weight.detach()[call["input"]])},
        "column-major rope tables": {name: call[name].t().contiguous().t() for name in ("cos", "sin")},
    }
    for name, over in variants.items():
        for ours, theirs in zip(run(**over), expected, strict=True):
            assert torch.equal(ours, theirs), name
    rounded = {name: call[name].bfloat16() for name in ("cos", "sin")}
    widened = {name: table.float() for name, table in rounded.items()}
    for ours, theirs in zip(run(**rounded), run(**widened), strict=True):
        assert torch.equal(ours, theirs)
    assert rows == 23


def test_each_row_takes_its_own_row_of_the_rope_tables():
    native = pop_ext.load(shared(), plan_of(shared(), GAPS, 2))
    prompts = [tokens(native.model, n, seed=n) for n in (9, 12)]
    together = op_call(native, prompts)
    positions = [torch.arange(9) * 3 + 5, torch.arange(12) + 40]
    cos, sin = zip(*(rope_of(native, p) for p in positions), strict=True)
    hidden = run_op({**together, "cos": torch.cat(cos), "sin": torch.cat(sin)})
    for i in range(2):
        alone = {**op_call(native, prompts[i : i + 1]), "cos": cos[i], "sin": sin[i]}
        assert_close_fp32(hidden[i : i + 1], run_op(alone), f"sequence {i}")


def test_prefill_without_a_guard_gives_the_same():
    native = pop_ext.load(shared(), plan_of(shared()))
    prompts = [tokens(native.model, 19)]
    expected = run_op(op_call(native, prompts))
    assert torch.equal(run_op({**op_call(native, prompts), "restore_on_error": False}), expected)


# Handles


def test_handles_are_never_reused_and_a_freed_one_is_refused():
    model, seen = shared(), set()
    for _ in range(3):
        native = pop_ext.load(model, plan_of(model))
        call = op_call(native, [tokens(model, 3)])
        assert native.handle not in seen
        seen.add(native.handle)
        del native
        with pytest.raises(RuntimeError, match=f"model: expected a handle .* not freed, got {call['model']}"):
            run_op(call)


def test_unload_frees_a_handle_once():
    model = shared()
    description = describe(model)
    weights = [ref.tensor for ref in description.weights]
    plan = plan_of(model)
    handle = pop.load(description.spec.to_json(), plan.to_json(), weights)
    assert pop.stale_weight(handle) == ""
    pop.unload(handle)
    for call in (pop.unload, pop.info, pop.stale_weight):
        with pytest.raises(RuntimeError, match=f"expected a handle .* not freed, got {handle}"):
            call(handle)


def test_info_counts_the_folded_weights_and_nothing_else():
    model = shared()
    for omit, folded in (((), 1), (GAPS, 4), ((5,), 1)):
        native = pop_ext.load(model, plan_of(model, omit))
        info = json.loads(pop.info(native.handle))
        spec = info["spec"]
        one_layer = 2 * spec["num_kv_heads"] * spec["head_dim"] * spec["hidden_size"] * 4
        assert info["extra_bytes"] == native.extra_bytes == folded * one_layer
        assert Plan.from_json(json.dumps(info["plan"])) == native.plan


def test_weights_are_shared_not_copied():
    model = llama()
    native = pop_ext.load(model, plan_of(model))
    ids = tokens(model, 1, 9)
    before = native.prefill(ids).logits
    model.lm_head.weight.data.mul_(2)  # not folded, not even the operator's
    assert_close_fp32(native.prefill(ids).logits, 2 * before, "logits")


# Threads, profiler, fake tensors


def test_two_threads_give_the_bits_of_one():
    model = llama(hidden=128, intermediate=512)
    native = pop_ext.load(model, plan_of(model, GAPS, 2))
    prompts = [tokens(model, n, seed=n) for n in (131, 40)]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        call = op_call(native, prompts)
        x, weight = random(300, 129), random(129, seed=1)
        results.append(
            [run_op(call), *call["key_cache"], *call["value_cache"], pop.rms_norm(x, weight, EPS), pop.gated_act(x, x)]
        )
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_stages_appear_in_the_profiler():
    native = pop_ext.load(shared(), plan_of(shared()))
    call = op_call(native, [tokens(native.model, 19)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run_op(call)
    counts = {event.key: event.count for event in profile.key_averages()}
    # Six layers, of which the last two are a run: one projection, and every layer for the boundary row.
    expected = {"embed": 1, "kv_project": 1, "qkv": 6, "rope_cache_write": 6, "attention": 6, "o_proj": 6, "mlp": 6}
    assert {name: counts.get(f"pop::{name}", 0) for name in expected} == expected
    assert counts.get("pop::final_norm") == 1
    assert counts.get("pop::prefill") == 1


def opcheck_cases():
    """Operator name -> arguments, for every operator that takes tensors."""
    geometry = GEOMETRIES["batch with past and start"]
    rows = sum(count for count, _, _ in geometry)
    caches = Caches(geometry, 2, 64, torch.float32, layers=2)
    caches.fill_past()
    cos, sin = rope_tables(rows, 64)
    x, weight = random(5, 8), random(8, seed=1)
    query, key = random(rows, 4, 64), random(rows, 2, 64, seed=1)
    for cache in (*caches.keys, *caches.values):
        cache.nan_to_num_(0.0).clamp_(-1, 1)
    return {
        "rms_norm": ((x, weight, EPS), {}),
        "add_rms_norm": ((x, x * 2, weight, EPS, weight), {}),
        "gated_act": ((x, x * 2, "gelu", weight, None), {}),
        "rope_cache_write": ((query, key, key * 2, cos, sin, *caches.lengths, caches.keys[0], caches.values[0]), {}),
        "attention": ((query, caches.keys[0], caches.values[0], *caches.lengths, 0.125, 3), {}),
        "fold_kv": (([random(4, 8)] * 2, [random(4, 8, seed=1)] * 2, [weight] * 2), {}),
        "kv_project": (
            (random(rows, 9), random(2 * 2 * 128, 9), cos, sin, *caches.lengths, EPS, caches.keys, caches.values),
            {},
        ),
    }


@pytest.mark.parametrize("name", opcheck_cases())
def test_an_operator_passes_opcheck(name):
    args, kwargs = opcheck_cases()[name]
    torch.library.opcheck(getattr(pop, name).default, args, kwargs)


def test_prefill_passes_opcheck():
    native = pop_ext.load(shared(), plan_of(shared(), GAPS, 2))
    call = op_call(native, [tokens(native.model, n, seed=n) for n in (9, 4)])
    torch.library.opcheck(pop.prefill.default, (), call)


# opcheck's comparison of eager and traced results knows numbers and tensors, no text; and a traced program holds a
# model by its handle, a constant, so that nothing of these operators is ever traced. What remains is checked.
TEXT_OPERATORS = ("info", "stale_weight", "cpu_isa", "foreign_schemas")
WITHOUT_TEXT_COMPARISON = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("name", TEXT_OPERATORS)
def test_an_operator_that_returns_text_passes_what_opcheck_can_compare(name):
    native = pop_ext.load(shared(), plan_of(shared()))
    args = (native.handle,) if name in ("info", "stale_weight") else ()
    torch.library.opcheck(getattr(pop, name).default, args, test_utils=WITHOUT_TEXT_COMPARISON)


def test_load_changes_none_of_its_weights_and_unload_returns_nothing():
    # Each call of `load` makes another handle: opcheck's comparison of two calls would find them unequal.
    native = pop_ext.load(shared(), plan_of(shared()))
    weights = [ref.tensor.detach() for ref in native.description.weights]
    args = (native.spec.to_json(), native.plan.to_json(), weights)
    torch.library.opcheck(pop.load.default, args, test_utils=("test_schema", "test_autograd_registration"))
    assert pop.unload(pop.load(*args)) is None


def test_load_refuses_weights_without_memory():
    native = pop_ext.load(shared(), plan_of(shared()))
    weights = [ref.tensor.detach() for ref in native.description.weights]
    args = (native.spec.to_json(), native.plan.to_json())
    with pytest.raises(RuntimeError, match="weight embed_tokens: expected memory .* meta"):
        pop.load(*args, [weight.to("meta") for weight in weights])
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match="weight embed_tokens: expected memory .* fake"):
        pop.load(*args, [mode.from_tensor(weight) for weight in weights])


def test_every_operator_is_checked():
    registered = {name.removeprefix("pop::") for name in torch._C._dispatch_get_all_op_names() if name[:5] == "pop::"}
    assert registered == {*opcheck_cases(), "prefill", *TEXT_OPERATORS, "load", "unload", "set_foreign", "tune"}
