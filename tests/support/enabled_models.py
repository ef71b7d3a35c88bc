"""Helpers of the tests of `enable`: a plan, calls of an enabled model, comparisons, changes of a model."""

from __future__ import annotations

import copy
from typing import Any

import pop_ext
import torch
from models import tokens
from pop_ext import Decision, Plan, reference
from pop_ext.hf.compat import cache_of, with_cache
from tolerance import assert_close_fp32, compare_caches, stored_layers
from torch import Tensor, nn
from transformers import Cache, DynamicCache

T = 19
LAYERS = 6
PLAN = Plan(LAYERS, (2, 4, 5))
OTHER = Plan(LAYERS, (1, 3))


def enabled_twin(model: nn.Module, plan: Plan = PLAN, **how: Any) -> nn.Module:
    """Return an enabled copy of the model."""
    return pop_ext.enable(copy.deepcopy(model), plan, **how)


def native_and_oracle(model: nn.Module, plan: Plan) -> tuple[nn.Module, nn.Module]:
    """Return two copies of a model, enabled under `strict`: one runs natively, the other the oracle."""
    return tuple(enabled_twin(model, plan, strict=True, backend=backend) for backend in ("native", "reference"))


@torch.no_grad()
def prefill(model: nn.Module, ids: Tensor) -> Any:
    """Call the model, and check that it ran natively."""
    output = model(ids, logits_to_keep=1, use_cache=True)
    assert pop_ext.last_call(model).native
    return output


def generate(model: nn.Module, ids: Tensor, new: int = 16, **how: Any) -> Any:
    """Generate greedily, or as `how` says; sampling has the same seed in each call."""
    torch.manual_seed(11)
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, **how}
    return model.generate(ids, max_new_tokens=new, **how)


def recorded(model: nn.Module) -> list[Decision]:
    """Record the prefills that the model runs from now on."""
    decisions: list[Decision] = []

    def record(*_: Any) -> None:
        latest = pop_ext.last_call(model)
        if latest is not None and not any(latest is known for known in decisions):
            decisions.append(latest)

    model.register_forward_hook(record)
    return decisions


def filled_cache(model: nn.Module, length: int = 7, batch: int = 1) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(model, batch, length, seed=5), **with_cache(model, cache), use_cache=True, logits_to_keep=1)
    return cache


def assert_enabled_equals_oracle(model: nn.Module, ids: Tensor, plan: Plan = PLAN) -> None:
    output = prefill(model, ids)
    logits, cache = reference.prefill(model, ids, plan)
    assert_close_fp32(output.logits, logits, "logits")
    compare_caches(cache_of(output), cache)


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Compare two outputs of a model bit by bit: logits, loss, recorded states and the cache, if any."""
    assert type(actual) is type(expected)
    assert list(actual) == list(expected)
    for name in expected:
        if isinstance(expected[name], Cache):
            assert_same_cache(actual[name], expected[name])
            continue
        ours, theirs = (x[name] if isinstance(x[name], tuple) else (x[name],) for x in (actual, expected))
        for a, e in zip(ours, theirs, strict=True):
            assert torch.equal(a, e) if isinstance(e, torch.Tensor) else a is e, name


def assert_same_cache(actual: Any, expected: Any) -> None:
    for a, e in zip(stored_layers(actual), stored_layers(expected), strict=True):
        assert a.length == e.length
        assert torch.equal(a.keys, e.keys)
        assert torch.equal(a.values, e.values)


def handle_of(model: nn.Module) -> int:
    return model.forward.backend.native.handle


def is_alive(handle: int) -> bool:
    try:
        torch.ops.pop.info(handle)
    except RuntimeError:
        return False
    return True


class LowRank(nn.Linear):
    """A Linear with a low-rank addition that shares the weight of the replaced Linear, as adapters do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.down = nn.Parameter(torch.randn(2, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


def multiply_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.model.layers[4].self_attn.k_proj.weight.mul_(1.5)


def offload_with_accelerate(model: nn.Module) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for layer in model.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device=model.device))
