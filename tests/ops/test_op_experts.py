"""Sparse layers of torch.ops.pop.prefill against plain torch in float64: every kind of router, ties, shared experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_calls import int32, offsets
from op_operands import DTYPES, EPS, random, rms_norm
from pop_ext import Plan
from pop_ext._core import ModelSpec
from torch import Tensor
from torch.nn.functional import silu

pop = torch.ops.pop
HIDDEN, HEAD_DIM = 40, 16
EXPERTS = {"num_experts": 6, "experts_per_token": 3, "moe_intermediate_size": 24}
SIGMOID = {"router_scores": "sigmoid", "norm_topk": True, "norm_topk_eps": 1e-20}

KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, normalised": {"norm_topk": True},
    "softmax, scaled, float32": {"routed_scale": 2.5, "router_float32": True},
    "sigmoid": {"router_scores": "sigmoid"},
    "sigmoid, normalised, scaled": {**SIGMOID, "routed_scale": 1.7},
    "sigmoid, bias": {"router_scores": "sigmoid", "router_bias": True},
    "sigmoid, bias, normalised, scaled, float32": {
        **SIGMOID,
        "router_bias": True,
        "routed_scale": 1.7,
        "router_float32": True,
    },
    "shared expert": {"shared_intermediate_size": 56},
    "a wide shared expert": {"shared_intermediate_size": 1000},
    "shared expert with a gate": {"shared_intermediate_size": 16, "shared_gate": True},
    "all": {
        **SIGMOID,
        "router_bias": True,
        "routed_scale": 0.3,
        "router_float32": True,
        "shared_intermediate_size": 56,
        "shared_gate": True,
    },
    "all experts": {**SIGMOID, "experts_per_token": 6, "router_bias": True},
    "one expert": {"router_scores": "sigmoid", "experts_per_token": 1, "router_bias": True},
    "one expert, float32": {"experts_per_token": 1, "router_float32": True},
}


def make_spec(dtype: torch.dtype, **fields: Any) -> ModelSpec:
    return ModelSpec(
        architecture="any",
        dtype=str(dtype).removeprefix("torch."),
        num_layers=1,
        hidden_size=HIDDEN,
        num_heads=1,
        num_kv_heads=1,
        head_dim=HEAD_DIM,
        intermediate_size=8,
        vocab_size=10,
        rms_norm_eps=EPS,
        sparse=[1],
        **{**EXPERTS, **fields},
    )


def make_weights(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw the weights of a model whose attention adds nothing.

    The keys of two experts are at least a twentieth apart for every row: the router reads a one-hot part of the row.
    """
    weights = {}
    for seed, (name, _layer, shape) in enumerate(spec.weight_slots()):
        kind = name.rpartition(".")[2]
        weights[kind] = random(*shape, dtype=dtype, seed=seed) * (1.0 if len(shape) == 1 else shape[-1] ** -0.5)
    weights["o_proj"].zero_()
    weights["post_norm"].fill_(1.0)
    router = torch.zeros(spec.num_experts, HIDDEN)
    for column in range(spec.num_experts):
        order = torch.randperm(spec.num_experts, generator=torch.Generator().manual_seed(column), device="cpu")
        router[:, column] = torch.linspace(-0.5, 0.5, spec.num_experts)[order.to(router.device)]
    router_dtype = torch.float32 if spec.router_float32 else dtype
    weights["router"] = router.to(router_dtype)
    if spec.router_bias:  # moves one expert to the front and one to the back
        weights["router_bias"] = torch.tensor([0.0, 3.0, 0.0, -3.0, 0.0, 0.0], dtype=router_dtype)
    return weights


def make_rows(spec: ModelSpec, rows: int, dtype: torch.dtype) -> Tensor:
    x = random(rows, HIDDEN, dtype=dtype, seed=99)
    x[:, : spec.num_experts] = 4 * torch.eye(spec.num_experts, dtype=dtype)[torch.arange(rows) % spec.num_experts]
    return x


def run(spec: ModelSpec, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the hidden states after the layer and a final norm of ones. Each row is a sequence of its own."""
    rows = len(x)
    weights["norm"].fill_(1.0)
    handle = pop.load(spec.to_json(), Plan(1, ()).to_json(), list(weights.values()))
    table, cache = torch.ones(rows, HEAD_DIM), [torch.zeros(rows, 1, 1, HEAD_DIM, dtype=x.dtype) for _ in range(2)]
    none, one = int32([0] * rows), int32([1] * rows)
    try:
        return pop.prefill(handle, x, table, table, offsets([1] * rows), none, none, one, one, [cache[0]], [cache[1]])
    finally:
        pop.unload(handle)


def choose(spec: ModelSpec, weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the experts of each row and their weights, [rows, experts_per_token] each, in float64.

    Among equal keys the lower expert comes first, which `torch.topk` does not promise.
    """
    logits = x.double() @ weights["router"].double().T
    scores = logits.softmax(-1) if spec.router_scores == "softmax" else logits.sigmoid()
    keys = scores + weights["router_bias"].double() if spec.router_bias else scores
    chosen = keys.sort(descending=True, stable=True).indices[:, : spec.experts_per_token]
    found = scores.gather(1, chosen)
    if spec.norm_topk:
        found = found / (found.sum(-1, keepdim=True) + spec.norm_topk_eps)
    return chosen, found * spec.routed_scale


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    x, gate, up, down = (part.double() for part in (x, gate, up, down))
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def expected(spec: ModelSpec, weights: dict[str, Tensor], rows: Tensor) -> Tensor:
    x = rms_norm(rows, torch.ones(HIDDEN)).to(rows.dtype)  # the stock model rounds here, too
    chosen, factors = choose(spec, weights, x)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row, (experts, factors_of_row) in enumerate(zip(chosen, factors, strict=True)):
        for expert, factor in zip(experts, factors_of_row, strict=True):
            gate, up = weights["experts_gate_up"][expert].chunk(2)
            out[row] += factor * mlp(x[row], gate, up, weights["experts_down"][expert])
    if spec.shared_intermediate_size:
        shared = mlp(x, *(weights[f"shared_{name}_proj"] for name in ("gate", "up", "down")))
        gate = (x.double() @ weights["shared_gate"].double().T).sigmoid() if spec.shared_gate else 1.0
        out += gate * shared
    return rms_norm(rows.double() + out, torch.ones(HIDDEN))


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    bound = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[actual.dtype]
    torch.testing.assert_close(actual.double(), wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("rows", [1, 9, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_layer_equals_plain_torch(kind, dtype, rows):
    spec = make_spec(dtype, **KINDS[kind])
    weights, x = make_weights(spec, dtype), make_rows(spec, rows, dtype)
    assert_close(run(spec, weights, x), expected(spec, weights, x))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "sigmoid, bias"])
def test_the_lower_expert_comes_first_among_equals(kind):
    """All experts tie, or all but the two that a bias moves; sigmoids of large logits tie by rounding."""
    for scale in (0.0, 60.0):
        spec = make_spec(torch.float32, **KINDS[kind])
        weights, x = make_weights(spec, torch.float32), make_rows(spec, 7, torch.float32)
        weights["router"] = torch.ones(6, HIDDEN) * scale / HIDDEN
        x = x.abs()
        assert_close(run(spec, weights, x), expected(spec, weights, x))


def test_a_bias_chooses_and_does_not_weigh():
    spec = make_spec(torch.float32, **{**KINDS["sigmoid, bias"], "experts_per_token": 1})
    weights, x = make_weights(spec, torch.float32), make_rows(spec, 7, torch.float32)
    chosen, factors = choose(spec, weights, rms_norm(x, torch.ones(HIDDEN)))
    assert set(chosen.flatten().tolist()) == {1}
    assert float(factors.max()) < 1.0
    before = run(spec, weights, x)
    weights["router_bias"] += torch.tensor([0.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    assert torch.equal(run(spec, weights, x), before)


def test_scores_of_zero_add_nothing_with_an_epsilon():
    spec = make_spec(torch.float32, **SIGMOID)
    weights, x = make_weights(spec, torch.float32), make_rows(spec, 3, torch.float32).abs()
    weights["router"] = -200 * torch.ones(6, HIDDEN)
    assert_close(run(spec, weights, x), rms_norm(x, torch.ones(HIDDEN)))
    without = make_spec(torch.float32, **{**SIGMOID, "norm_topk_eps": 0.0})
    assert run(without, weights, x).isnan().all()


@pytest.mark.parametrize("kind", ["softmax", "softmax, normalised", "sigmoid", "sigmoid, normalised, scaled", "all"])
def test_a_nan_stays_in_its_row(kind):
    spec = make_spec(torch.float32, **KINDS[kind])
    weights, x = make_weights(spec, torch.float32), make_rows(spec, 5, torch.float32)
    x[3, 20] = torch.nan
    found = run(spec, weights, x)
    assert found[3].isnan().all()
    assert found[[0, 1, 2, 4]].isfinite().all()


def test_a_prefill_longer_than_a_chunk_equals_plain_torch():
    spec = make_spec(torch.float32, **KINDS["all"])
    weights, x = make_weights(spec, torch.float32), make_rows(spec, 2100, torch.float32)
    assert_close(run(spec, weights, x)[2040:], expected(spec, weights, x[2040:]))


@pytest.mark.parametrize("name", ["router", "router_bias"])
def test_a_router_of_another_dtype_is_refused_by_name(name):
    spec = make_spec(torch.bfloat16, **KINDS["all"])
    weights = make_weights(spec, torch.bfloat16)
    weights[name] = weights[name].bfloat16()
    with pytest.raises(RuntimeError, match=rf"weight layers.0.{name}: expected dtype float32, got bfloat16"):
        run(spec, weights, make_rows(spec, 3, torch.bfloat16))
