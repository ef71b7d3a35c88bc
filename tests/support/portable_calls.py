"""Calls under the portable backend, and models for them."""

from __future__ import annotations

import functools
from typing import Any

import pop_ext
import tiny_models
import torch
import transformers
from against_oracle import GAPS, plan_of
from models import shared, tokens
from pop_ext import Plan
from pop_ext.hf.compat import with_cache
from torch import Tensor, nn
from transformers import Cache

T = 30


@torch.no_grad()
def run_portable(model: nn.Module, plan: Plan, ids: Tensor, past: Cache | None = None, **call: Any) -> Any:
    """Call the model under the portable backend, and check that it ran the call."""
    given = {} if past is None else with_cache(model, past)
    with pop_ext.enabled(model, plan, strict=True, backend="portable"):
        output = model(ids, use_cache=True, **{"logits_to_keep": 1, **given, **call})
        assert pop_ext.last_call(model).backend == "portable"
    assert not any("forward" in vars(module) for module in model.modules())
    return output


def architecture(name: str, model_class: str) -> nn.Module:
    """Return a tiny model of an architecture of transformers."""
    return tiny_models.build(getattr(transformers, model_class), tiny_models.tiny_config(name))


@functools.cache
def fitted(family: str, boundary: int) -> Plan:
    model = shared(family)
    return pop_ext.fit(model, plan_of(model, GAPS, boundary), [tokens(model, 16, 30, seed=1)], lambdas=[0.1])


class Broken(nn.Module):
    def forward(self, *_: Any) -> Tensor:
        raise RuntimeError("broken")
