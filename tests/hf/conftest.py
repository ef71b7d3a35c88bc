"""Fixtures of the tests of models in transformers."""

from __future__ import annotations

import pytest
from pop_ext.hf import native_trial
from pop_ext.portable import trial


@pytest.fixture
def no_trials_yet(monkeypatch) -> None:
    """Forget which kinds of models have passed a trial in this process, and which were refused."""
    for module in (native_trial, trial):
        monkeypatch.setattr(module, "_passed", set())
        monkeypatch.setattr(module, "_refused", {})
