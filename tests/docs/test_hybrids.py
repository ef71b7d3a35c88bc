"""The small hybrids of examples/demo_model/hybrids.py, and the page of what pruning costs them."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pop_ext
import pytest
import torch
from tolerance import assert_close_fp32

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
NAMES = ("Llama", "Qwen 3.5", "LFM2", "Granite 4 hybrid", "DeepSeek V3", "Falcon-H1")


@pytest.fixture(scope="module")
def script() -> Iterator[dict[str, Any]]:
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "examples" / "demo_model"))
    yield runpy.run_path(str(ROOT / "examples" / "demo_model" / "hybrids.py"))
    sys.path[:] = before


@pytest.mark.parametrize("name", NAMES)
def test_a_portable_prefill_and_the_oracle_agree(script, name):
    model = script["build"](name).eval()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, script["VOCAB"], (2, 48), generator=generator)
    prompt, continuation = ids[:, :40], ids[:, 40:]
    for plan in (script["PLANS"]["third, boundary 16"], script["PLANS"]["half"]):
        expected = script["run_oracle"](model, plan, prompt, continuation)
        assert_close_fp32(script["run_portable"](model, plan, prompt, continuation), expected, name)
        full = script["run_oracle"](model, pop_ext.Plan(script["LAYERS"], (), 1), prompt, continuation)
        assert (expected - full).abs().max() > 1e-3


def test_the_page_shows_the_results(script):
    results = json.loads((RESULTS / "hybrids.json").read_text())
    assert set(results["models"]) <= set(NAMES) == set(script["MODELS"])
    page = (RESULTS / "hybrids.md").read_text()
    for line in script["table"](results):
        assert line in page
    for name, found in results["models"].items():
        assert found["largest_difference_to_oracle"] < 1e-4, name
