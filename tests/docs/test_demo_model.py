"""The demo model: real text through a trained model, which shows the quality of pruned prefills."""

from __future__ import annotations

from pathlib import Path

import pop_ext
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
FILES = sorted((DEMO / "heldout").glob("*.txt"))
PROMPT, CONTINUATION = 768, 128


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pairs(tokenizer):
    ids = [tokenizer(path.read_text(), return_tensors="pt").input_ids[0] for path in FILES]
    return [row[:PROMPT] for row in ids], [row[PROMPT : PROMPT + CONTINUATION] for row in ids]


def loss(model, plan, pairs) -> float:
    """Return the mean loss of the true continuations after pruned prompts, in nats a token."""
    with pop_ext.enabled(model, plan, strict=True):
        scores = pop_ext.score(model, *pairs)
    return -sum(score.log_likelihood for score in scores) / sum(len(ids) for ids in pairs[1])


def test_weights_fit_into_24_mib():
    assert (DEMO / "model" / "model.safetensors").stat().st_size <= 24 * 2**20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_tokenizer_preserves_every_character(tokenizer, path):
    text = path.read_text()
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_pruned_greedy_continuations_equal_the_oracles(model, pairs):
    prompt = pairs[0][0][None]
    continuations = []
    for backend in ("native", "reference"):
        with pop_ext.enabled(model, "third", strict=True, backend=backend):
            continuations.append(model.generate(prompt, max_new_tokens=64, do_sample=False)[0, PROMPT:])
            assert pop_ext.last_call(model).backend == backend
    assert torch.equal(*continuations)


def test_omitting_nothing_costs_nothing(model, pairs):
    depth = model.config.num_hidden_layers
    contexts, continuations = pairs
    with torch.no_grad():
        ids = torch.cat([contexts[0], continuations[0]])[None]
        rows = model(ids).logits[0, PROMPT - 1 : -1].log_softmax(-1)
    stock = -float(rows.gather(1, continuations[0][:, None]).mean())
    native = loss(model, pop_ext.Plan(depth, ()), (contexts[:1], continuations[:1]))
    assert native == pytest.approx(stock, abs=1e-5)


def test_a_third_of_the_layers_costs_little_and_less_than_two_thirds(model, pairs):
    depth = model.config.num_hidden_layers
    full = loss(model, pop_ext.Plan(depth, ()), pairs)
    third = loss(model, pop_ext.Plan.last(depth), pairs)
    two_thirds = loss(model, pop_ext.Plan.last(depth, fraction=2 / 3), pairs)
    assert third - full < 0.1
    assert third < two_thirds
