"""pop_ext.block_influence against cosines from hooks, and the plans that it gives."""

from __future__ import annotations

import dataclasses
import math

import pop_ext
import pytest
import torch
from models import FAMILIES, shared, tokens
from pop_ext import Plan


def batches(model):
    return list(tokens(model, 6, 24, seed=4).split(4))


@pytest.mark.parametrize("family", FAMILIES)
def test_block_influence_is_one_minus_the_mean_cosine(family):
    model = shared(family)
    found = pop_ext.block_influence(model, batches(model))
    of_samples = []
    for ids in torch.cat(batches(model)):
        states = []
        hooks = [
            layer.register_forward_hook(lambda m, args, out, states=states: states.append((args[0], out)))
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(ids[None])
        for hook in hooks:
            hook.remove()
        cosines = [(a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)) for a, b in states]
        of_samples.append([1 - float(cosine.mean()) for cosine in cosines])
    samples = torch.tensor(of_samples).double()
    assert found.influence == pytest.approx(samples.mean(0).tolist(), abs=1e-5)
    assert found.error == pytest.approx((samples.std(0) / math.sqrt(len(samples))).tolist(), abs=1e-5)


def test_block_influence_plan_is_not_contiguous_by_default(tmp_path):
    model = shared("llama")
    found = pop_ext.block_influence(model, batches(model))
    found = dataclasses.replace(found, influence=(9.0, 1.0, 8.0, 2.5, 0.5, 2.0))
    assert found.plan(2).omit == (1, 4)
    assert found.plan(2, contiguous=True).omit == (4, 5)
    assert found.plan(2).origin.method == "block influence, free"
    assert found.plan(2).origin.samples == 6
    found.save(tmp_path / "influence.json")
    assert '"influence": [' in (tmp_path / "influence.json").read_text()


def test_block_influence_of_an_enabled_model_reads_the_stock_forward():
    model = shared("llama")
    expected = pop_ext.block_influence(model, batches(model))
    told = []
    with pop_ext.enabled(model, Plan.last(6), strict=True):
        found = pop_ext.block_influence(model, batches(model), progress=lambda *done: told.append(done))
    assert found == expected
    assert told == [(4, 6), (6, 6)]
    with pytest.raises(ValueError, match="batches: expected at least one sequence, got none"):
        pop_ext.block_influence(model, [])
