"""The bench of the portable backend times the backend that it names, also behind the hooks of accelerate."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from pop_ext.utils.roofline import Peaks

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import portable

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


@pytest.mark.cpu
@pytest.mark.parametrize("form", ["plain", "offloaded", "LoRA"])
def test_the_backend_that_is_named_is_timed(form, monkeypatch):
    monkeypatch.setattr(portable, "SIZES", SIZES)
    [result] = portable.measure(form, torch.float32, 16, 2, ["portable"], time.perf_counter, Peaks(1e9, 1e9))
    assert (result.form, result.backend, result.rounds) == (form, "portable", 2)
    assert result.share == pytest.approx(result.ratio / result.ceiling)
    assert result.share_of_roofline == pytest.approx(result.ratio / result.roofline)
    assert 1 < result.roofline < result.ceiling  # at 16 tokens bytes count, and a row reads the weights of all layers
