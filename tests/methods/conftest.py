"""The demo model with its tokenizer and a held-out text, for the tests of searches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.fixture(scope="module")
def text():
    return (DEMO / "heldout" / "pprint.py.txt").read_text()[:6000]
