"""`autoplan` of models without a native form: the portable backend is timed, or the card says why nothing was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pop_ext.hf.architectures import UnsupportedModelError
from pop_ext.methods import autoplan as module
from pop_ext.methods.autoplan import Trial, autoplan
from pop_ext.plans.plan import Plan
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
TRIAL = Trial(tokens=40, continuation=8, prompts=8, samples=6, batch_size=4)
TEXT = (DEMO / "heldout" / "pprint.py.txt").read_text()[:6000]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float64)  # which has no native form


def found(model, **more):
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    how = {"max_kl": 9.0, "method": "unfitted", "highest": 4, "boundary": 1, **more}
    return autoplan(model, [TEXT], tokenizer=tokenizer, trial=TRIAL, **how)


def test_the_portable_backend_is_timed(model, tmp_path):
    result = found(model, pays_from=(16,), time_lengths=(32, 4096), save=tmp_path)
    (speed,) = result.card.speed
    assert (speed.tokens, speed.against) == (32, "Hugging Face full")
    assert 0.1 < speed.speedup < 10
    assert speed.hardware.endswith("float64 on cpu")
    assert result.card.not_measured["speed at 4096 tokens"] == "the model takes 2048"
    assert result.plan.min_tokens in (16, 17)
    assert Plan.from_pretrained(tmp_path).card == result.card
    assert "forward" not in vars(model)


@pytest.mark.parametrize(("slow", "expected"), [((), 16), ((16,), 32), ((32,), 64), ((64,), 65)])
def test_the_shortest_length_from_which_all_are_faster_becomes_min_tokens(model, monkeypatch, slow, expected):
    monkeypatch.setattr(module, "portable_speedup", lambda model, plan, tokens: 0.9 if tokens in slow else 1.5)
    result = found(model, pays_from=(32, 16, 64), time_lengths=(16,))
    assert result.plan.min_tokens == expected
    assert [(row.tokens, row.speedup) for row in result.card.speed] == [(16, 0.9 if 16 in slow else 1.5)]


def test_a_model_that_only_the_reference_runs_says_so(model, monkeypatch):
    def refuse(*_):
        raise UnsupportedModelError("model: expected something else")

    monkeypatch.setattr(module, "portable_speedup", refuse)
    result = found(model)
    assert result.card.speed == ()
    assert result.card.not_measured["speed"].startswith("no backend but the reference runs the model (model: expected")
