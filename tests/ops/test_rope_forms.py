"""RoPE that turns neighbouring channels, norms of heads after RoPE, and scaled residual updates, in the operators."""

from __future__ import annotations

import pytest
import torch
from op_calls import LAYOUTS
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
from torch import Tensor

pop = torch.ops.pop
GEOMETRY = GEOMETRIES["batch with past and start"]
ROWS = sum(count for count, _, _ in GEOMETRY)
HEADS, KV_HEADS = 4, 2
FORMS = [(False, True), (True, False), (True, True)]


def prepared(x: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, norm_after: bool) -> Tensor:
    """Return heads [rows, heads, dim] after norm and RoPE, in float64."""
    rotary = cos.shape[1]
    if norm is not None and not norm_after:
        x = rms_norm(x, norm)
    if interleaved:  # the same turn, with the channels of each pair side by side
        turned = x[..., :rotary].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        turned = rotated(turned, cos, sin).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        x = torch.cat([turned, x[..., rotary:].double()], -1)
    else:
        x = rotated(x, cos, sin)
    return rms_norm(x, norm) if norm is not None and norm_after else x


@pytest.mark.parametrize(("dim", "rotary"), [(8, 8), (40, 12), (64, 64), (80, 32), (128, 128), (256, 66)])
@pytest.mark.parametrize("with_norm", [False, True], ids=["no norm", "norm"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_cache_write_in_every_form(dtype, form, with_norm, dim, rotary):
    caches = Caches(GEOMETRY, KV_HEADS, dim, dtype, list(LAYOUTS)[2])
    query, key, value = (
        random(ROWS, heads, dim, dtype=dtype, seed=seed) for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))
    )
    norms = [random(dim, dtype=dtype, seed=seed) if with_norm else None for seed in (3, 4)]
    cos, sin = rope_tables(ROWS, rotary)
    cos, sin = 1.25 * cos, 1.25 * sin  # as YaRN scales them: a norm after RoPE removes the factor
    expected_q, expected_k = (prepared(x, norm, cos, sin, *form) for x, norm in zip((query, key), norms, strict=True))
    lengths = (*caches.lengths, caches.keys[0], caches.values[0])
    pop.rope_cache_write(query, key, value, cos, sin, *lengths, *norms, EPS, None, 0.0, *form)
    assert_one_rounding(query, expected_q, ulps=4)
    assert_one_rounding(caches.new_rows(caches.keys[0]), expected_k, ulps=4)
    assert torch.equal(caches.new_rows(caches.values[0]), value)
    caches.assert_nothing_else_changed()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_project_in_every_form(dtype, form):
    hidden_size, dim, layers = 96, 40, 3
    caches = Caches(GEOMETRY, KV_HEADS, dim, dtype, layers=layers)
    hidden = random(ROWS, hidden_size, dtype=dtype)
    weight = random(layers * 2 * KV_HEADS * dim, hidden_size, dtype=dtype, seed=1) / 10
    norms = [random(dim, dtype=dtype, seed=2 + layer) for layer in range(layers)]
    cos, sin = rope_tables(ROWS, 24)
    pop.kv_project(
        hidden,
        weight,
        cos,
        sin,
        *caches.lengths,
        EPS,
        caches.keys,
        caches.values,
        k_norm=norms,
        interleaved=form[0],
        norm_after=form[1],
    )
    projected = (rms_norm(hidden, torch.ones(hidden_size)) @ weight.double().T).view(ROWS, layers, 2, KV_HEADS, dim)
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    for layer in range(layers):
        expected = prepared(projected[:, layer, 0], norms[layer], cos, sin, *form)
        assert (caches.new_rows(caches.keys[layer]).double() - expected).abs().max() < bound
        values = caches.new_rows(caches.values[layer]).double()
        assert (values - projected[:, layer, 1]).abs().max() < bound
    caches.assert_nothing_else_changed()


@pytest.mark.parametrize("with_norm", [False, True], ids=["no norm", "norm"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", [(1, 1), (19, 111), (3, 4096)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scaled_update_of_the_residual_is_rounded_once(dtype, shape, with_bias, with_norm):
    x, delta = random(*shape, dtype=dtype), strided(7 * random(*shape, dtype=dtype, seed=1))
    weight, bias, norm = (random(shape[-1], dtype=dtype, seed=seed) for seed in (2, 3, 4))
    addend = delta.double() + (bias.double() if with_bias else 0)
    if with_norm:
        addend = rms_norm(addend, norm)
    expected = x.double() + 0.22 * addend
    given = (bias if with_bias else None, norm if with_norm else None)
    out = pop.add_rms_norm(x, delta, weight, EPS, *given, delta_scale=0.22)
    assert_one_rounding(x, expected, ulps=3)
    assert_one_rounding(out, rms_norm(x, weight))
