"""Ablations of an evaluation, each against an independent implementation."""

from __future__ import annotations

from contextlib import ExitStack

import pop_ext
import pytest
import torch
from hook_reference import held_back_forward
from models import FAMILIES, shared, tokens
from pop_ext import Plan
from pop_ext.evaluation.ablations import (
    ABLATIONS,
    DROPPED,
    NO_BOUNDARY,
    NO_KV,
    ablated_logits,
    group_by_shape,
    stock_logits,
)
from pop_ext.evaluation.arms import POP, Arm, arm_logits
from portable_calls import architecture
from tolerance import assert_close_fp32

PROMPT, NEW = 40, 5
OMIT = (1, 4, 5)


def pair(model, batch=2):
    return tokens(model, batch, PROMPT, seed=3), tokens(model, batch, NEW, seed=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_equals_a_model_without_those_layers(family):
    model = shared(family)
    context, continuation = pair(model)
    found = ablated_logits(model, DROPPED, Plan(6, OMIT), context, continuation)
    ids = torch.cat([context, continuation[:, :-1]], dim=1)
    with ExitStack() as stack, torch.no_grad():
        for index in OMIT:
            hook = model.model.layers[index].register_forward_hook(lambda layer, args, output: args[0])
            stack.callback(hook.remove)
        expected = model(ids).logits[:, PROMPT - 1 :]
    assert_close_fp32(found, expected, "logits")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_boundary_makes_every_prompt_row_a_context_row(family):
    model = shared(family)
    context, continuation = pair(model)
    found = ablated_logits(model, NO_BOUNDARY, Plan(6, OMIT, boundary=7), context, continuation)
    ids = torch.cat([context, continuation[:, :-1]], dim=1)
    is_context = (torch.arange(ids.shape[1]) < PROMPT).expand(len(ids), -1)
    expected, _ = held_back_forward(model, ids, OMIT, is_context)
    assert_close_fp32(found, expected[:, PROMPT - 1 :], "logits")


def masked_forward(model, ids, omit, first):
    """Compute `no-kv` in another way: omitted layers run all rows, and a mask hides context rows from later ones."""
    rows = torch.arange(ids.shape[1])

    def enter(layer, args, kwargs):
        # A row still sees itself, so that its softmax is finite.
        hidden = (rows[None] < first) & (rows[:, None] != rows[None])
        mask = kwargs["attention_mask"]  # the model's own mask, with its window
        if mask is None:
            mask = (rows[None] <= rows[:, None])[None, None]
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": mask.masked_fill(hidden, torch.finfo(torch.float32).min)}

    def leave(layer, args, kwargs, output):
        return torch.cat([args[0][:, :first], output[:, first:]], dim=1)

    with ExitStack() as stack, torch.no_grad():
        for index in omit:
            layer = model.model.layers[index]
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(leave, with_kwargs=True).remove)
        return model(ids).logits


@pytest.mark.parametrize("boundary", [1, 7, PROMPT, 200])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_kv_hides_context_rows_in_omitted_layers(family, boundary):
    model = shared(family)
    context, continuation = pair(model)
    found = ablated_logits(model, NO_KV, Plan(6, OMIT, boundary), context, continuation)
    ids = torch.cat([context, continuation[:, :-1]], dim=1)
    expected = masked_forward(model, ids, OMIT, max(0, PROMPT - boundary))[:, PROMPT - 1 :]
    assert_close_fp32(found, expected, "logits")


def test_ablations_differ_from_pop_full_depth_and_each_other():
    model = shared("llama")
    context, continuation = pair(model, batch=1)
    plan = Plan(6, OMIT, boundary=3)
    ids = torch.cat([context, continuation[:, :-1]], dim=1)
    logits = {kind: ablated_logits(model, kind, plan, context, continuation)[0] for kind in ABLATIONS}
    logits["full"] = stock_logits(model, ids, NEW)[0]
    [(_, logits["pop"])] = arm_logits(model, Arm(POP, plan), [(context[0], continuation[0])], 1, "native")
    for one, other in ((a, b) for a in logits for b in logits if a < b):
        assert (logits[one] - logits[other]).abs().max() > 0.05, f"{one}, {other}"


def test_ablations_that_omit_nothing_equal_the_stock_model():
    model = shared("llama")
    context, continuation = pair(model)
    ids = torch.cat([context, continuation[:, :-1]], dim=1)
    with torch.no_grad():
        expected = model(ids).logits[:, PROMPT - 1 :]
    with pop_ext.enabled(model, Plan(6, OMIT), strict=True):
        assert torch.equal(stock_logits(model, ids, NEW), expected)
        for kind in ABLATIONS:
            assert_close_fp32(ablated_logits(model, kind, Plan(6, ()), context, continuation), expected, kind)
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


@torch.no_grad()
def test_ablations_of_layers_that_return_tuples():
    model = architecture("falcon_h1", "FalconH1ForCausalLM")
    context, continuation = torch.randint(3, 290, (2, PROMPT)), torch.randint(3, 290, (2, NEW))
    ids = torch.cat([context, continuation[:, :-1]], dim=1)
    full = stock_logits(model, ids, NEW)
    for kind in ABLATIONS:
        assert_close_fp32(ablated_logits(model, kind, Plan(6, ()), context, continuation), full, kind)
    dropped = ablated_logits(model, DROPPED, Plan(6, OMIT), context, continuation)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(layer for index, layer in enumerate(layers) if index not in OMIT)
    model.config.num_hidden_layers = len(model.model.layers)
    assert_close_fp32(dropped, stock_logits(model, ids, NEW), "dropped")


def test_an_unknown_ablation_is_refused_by_name():
    model = shared("llama")
    with pytest.raises(ValueError, match="kind: expected one of no-kv, no-boundary, dropped, got 'pop'"):
        ablated_logits(model, "pop", Plan(6, ()), *pair(model))


def test_group_by_shape_batches_every_pair_once():
    pairs = [(torch.zeros(n), torch.zeros(m)) for n, m in ((3, 1), (4, 1), (3, 1), (3, 2), (3, 1))]
    groups = group_by_shape(pairs, 2)
    assert sorted(index for group in groups for index in group) == [0, 1, 2, 3, 4]
    assert [0, 2] in groups
    assert all(len({(len(pairs[i][0]), len(pairs[i][1])) for i in group}) == 1 for group in groups)
