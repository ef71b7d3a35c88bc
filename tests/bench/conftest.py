"""A folder that holds a tiny model, for tests that start the bench on it."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def folder(request, tmp_path):
    """A folder with the config of a model in `tiny`, whose sizes are the SIZES of the test's module."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(request.module.SIZES))
    return tmp_path
