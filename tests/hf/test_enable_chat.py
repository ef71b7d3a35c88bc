"""Test a chat of several turns over one cache, with a chat template, on the demo model."""

from __future__ import annotations

from pathlib import Path

import pop_ext
import pytest
import torch
from enabled_models import enabled_twin, recorded
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo_model" / "model"
TEMPLATE = (
    "{% for message in messages %}# {{ message.role }}:\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:\n{% endif %}"
)
QUESTIONS = (
    "def area(width, height):\n    return width * height\n\nclass Square:",
    "def test_area():\n    assert",
    "import os\nfor name in",
)
NEW = 12


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def converse(model, tokenizer, cache) -> list[list[int]]:
    """Return the sampled tokens of each answer. Each prompt begins with the token ids of all earlier turns."""
    history = torch.empty(1, 0, dtype=torch.int64)
    answers = []
    for turn, question in enumerate(QUESTIONS):
        torch.manual_seed(turn)
        new_ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        prompt = torch.cat([history, new_ids], dim=1)
        history = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=True,
        )
        answers.append(history[0, prompt.shape[1] :].tolist())
    return answers


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("boundary", [1, 8])
def test_each_turn_prefills_its_own_tokens_and_answers_as_the_oracle(model, tokenizer, kind, boundary):
    plan = pop_ext.Plan.last(12, count=4, boundary=boundary)
    answers, lengths = [], []
    for backend in ("native", "reference"):
        cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=256)
        twin = enabled_twin(model, plan, strict=True, backend=backend)
        decisions = recorded(twin)
        answers.append(converse(twin, tokenizer, cache))
        assert [decision.backend for decision in decisions] == [backend] * len(QUESTIONS)
        lengths.append([decision.tokens[0] for decision in decisions])
    assert answers[0] == answers[1]
    assert len({token for answer in answers[0] for token in answer}) >= 16
    # A later turn also prefills the last token of the answer before it, which no decode step has read.
    question_lengths = [
        len(tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)["input_ids"])
        for q in QUESTIONS
    ]
    assert lengths[0] == lengths[1] == [question_lengths[0], question_lengths[1] + 1, question_lengths[2] + 1]
