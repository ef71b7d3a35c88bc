"""Arms from states of the full model: they measure what prefills measure, from one forward a set of prompts."""

from __future__ import annotations

import copy

import models
import pop_ext
import pytest
from evaluated_prompts import PLAN, prompt_sets
from models import shared, tokens
from pop_ext import Plan
from pop_ext.evaluation import (
    PromptSet,
    evaluate,
)


@pytest.mark.parametrize("plan", [PLAN, Plan(6, (3, 4, 5), boundary=3), Plan(6, (0,), boundary=40)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_arms_from_states_measure_what_prefills_measure(family, plan):
    model = shared(family)
    fitted = pop_ext.fit(model, plan.replace(boundary=1), models.batches(model), lambdas=[0.1]).replace(
        boundary=plan.boundary
    )
    sets = prompt_sets(model)
    first = tuple((tokens(model, 20, seed=70 + i), tokens(model, 4, seed=80 + i)) for i in range(3))
    sets.append(PromptSet("second turn", 20, sets[0].pairs, first))
    apart = evaluate(model, sets, [fitted], greedy_tokens=4)
    reused = evaluate(model, sets, [fitted], greedy_tokens=4, reuse_states=True)
    assert reused.facts["backend"] == "reference"
    assert [(cell["set"], cell["arm"]) for cell in reused.cells] == [(cell["set"], cell["arm"]) for cell in apart.cells]
    for cell, other in zip(reused.cells, apart.cells, strict=True):
        for name, samples in cell["samples"].items():
            assert samples == pytest.approx(other["samples"][name], abs=2e-4), (cell["arm"], name)


def test_second_turns_run_apart_where_rope_follows_the_length():
    model = models.llama(rope="longrope")  # of 32 positions: the second turn reaches beyond them
    first = tuple((tokens(model, 20, seed=70 + i), tokens(model, 4, seed=80 + i)) for i in range(3))
    sets = [PromptSet("second turn", 20, prompt_sets(model)[0].pairs, first)]
    apart, reused = (evaluate(model, sets, [PLAN], kinds=["pop"], reuse_states=reuse) for reuse in (False, True))
    for cell, other in zip(reused.cells, apart.cells, strict=True):
        assert cell["samples"]["loss"] == pytest.approx(other["samples"]["loss"], abs=2e-4), cell["arm"]


def test_reused_states_take_one_forward_of_the_full_model_per_set_of_prompts():
    model, forwards = copy.deepcopy(shared("llama")), []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: forwards.append(1))
    plans = [Plan(6, tuple(range(start, 6)), boundary) for start in (2, 3, 4) for boundary in (1, 8)]
    sets = prompt_sets(model)
    first = tuple((tokens(model, 20, seed=70 + i), tokens(model, 4, seed=80 + i)) for i in range(3))
    sets.append(PromptSet("second turn", 20, sets[0].pairs, first))
    evaluate(model, sets, plans, kinds=["pop"], greedy_tokens=0, reuse_states=True)
    assert len(forwards) == 3
