"""The arms of examples/demo_model/composition.py compute what their names say."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama, tokens
from pop_ext import Plan

SCRIPT = Path(__file__).parents[2] / "examples" / "demo_model" / "composition.py"
LAYERS, T, NEW = 6, 40, 6


@pytest.fixture(scope="module")
def script() -> Iterator[dict[str, Any]]:
    before = list(sys.path)
    yield runpy.run_path(str(SCRIPT))
    sys.path[:] = before


@pytest.fixture(scope="module")
def key_norm() -> Any:
    return runpy.run_path(str(SCRIPT.parents[1] / "kv_compression.py"))["KeyNormPress"]


@pytest.fixture
def prompts(script):
    model = llama()
    return script["Prompts"](tokens(model, 10, T), tokens(model, 10, NEW, seed=1))


def test_an_uncompressed_cache_has_the_loss_of_score(script, key_norm, prompts):
    model = llama()
    for plan in (Plan(LAYERS, ()), Plan.last(LAYERS, 3, boundary=5)):
        expected = script["losses"](model, plan, prompts)
        for hidden_states in (False, True):
            press = key_norm(compression_ratio=0.0)
            actual = script["pressed_losses"](model, plan, press, prompts, hidden_states)
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    dropped = script["pressed_losses"](model, plan, key_norm(compression_ratio=0.5), prompts, False)
    assert ((dropped - expected).abs() > 1e-2).all()


def test_windows_by_config_and_by_attention_agree(script, prompts):
    model, retained = llama(), range(3)
    for plan in (Plan(LAYERS, ()), Plan.last(LAYERS, 3)):
        native = script["losses"](script["with_windows"](model, 9, retained), plan, prompts)
        with script["windowed_attention"](model, 9, 0, retained):
            reference = script["losses"](model, plan, prompts, "reference")
        with script["windowed_attention"](model, 9, 2, retained):
            sinks = script["losses"](model, plan, prompts, "reference")
        torch.testing.assert_close(native, reference, atol=1e-4, rtol=0)
        for other in (script["losses"](model, plan, prompts), sinks):
            assert ((native - other).abs() > 1e-3).all()
    assert model.config._attn_implementation == "sdpa"


def test_it_prints_a_table_of_windows_and_reports_missing_kvpress():
    options = ["--prompts", "2", "--length", "72", "--continuation", "3", "--boundary", "1"]
    run = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "| window 64, native | " in run.stdout
    assert ("KnormPress, 25% dropped" in run.stdout) != ("kvpress is not installed" in run.stdout)
