"""The bench of products in 8-bit integers times every arm, and compares them within rounds."""

from __future__ import annotations

import sys
from pathlib import Path

import pop_ext
import pytest
import torch
from models import llama

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import int8

pytestmark = pytest.mark.cpu


def test_products_are_timed_in_both_types(monkeypatch):
    monkeypatch.setattr(int8, "SHAPES", {"q_proj": (32, 48)})
    [found] = int8.time_products([9], 2)
    assert (found["rows"], found["k"], found["n"]) == (9, 32, 48)
    assert found["arms"].keys() == {"float32", "float32 in blocks", "int8"}
    assert found["arms"]["float32"]["float32 by this"] == 1


def test_prefills_are_timed_full_and_pruned_and_in_int8(monkeypatch):
    class Loaded:
        model = llama(dtype=torch.float32)

    monkeypatch.setattr(int8, "load_model", lambda *args, **kwargs: Loaded)
    found = int8.time_prefills("any", 16, ["float32"], 2, ["full", "POP"], False)
    assert list(found["arms"]) == ["full, float32", "full, float32, int8", "POP, float32", "POP, float32, int8"]
    assert found["omitted"] == {"full": [], "POP": list(pop_ext.Plan.last(found["layers"]).omit)}
    assert found["extra_bytes"]["POP, float32, int8"] > found["extra_bytes"]["POP, float32"]
    alone = int8.time_prefills("any", 16, ["float32"], 2, ["POP"], True)
    assert list(alone["arms"]) == ["POP, float32, int8"]
    assert alone["extra_bytes"]["POP, float32, int8"] == found["extra_bytes"]["POP, float32"]
    assert alone["resident_bytes"] > 0
