"""Test argument checks of the public functions: accepted integers, and the error for a wrong kind of value."""

from __future__ import annotations

import numpy as np
import pop_ext
import pytest
import torch
from models import llama, tokens


def test_integers_of_numpy_are_integers():
    native = pop_ext.load(llama(), "third")
    ids = tokens(native.model, 2, 9)
    expected = native.prefill(ids, logits_to_keep=2, boundary=[2, 3])
    actual = native.prefill(ids, logits_to_keep=np.int64(2), boundary=[np.int32(2), np.int64(3)])
    assert torch.equal(actual.logits, expected.logits)
    with pytest.raises(TypeError, match="boundary: expected an int or one int per sequence, got ndarray"):
        native.prefill(ids, boundary=np.array([2, 3]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pop_ext.disable("x"), TypeError, "model: expected a Hugging Face model, got str"),
        (lambda: pop_ext.explain("x"), TypeError, "model: expected a Hugging Face model, got str"),
        (lambda: pop_ext.Plan.preset([3]), ValueError, "preset: expected a name like"),
        (lambda: pop_ext.reference.prefill(llama(), torch.ones(1, 3).long(), {}), TypeError, "plan: expected a Plan"),
        (
            lambda: pop_ext.load(llama(), "third").prefill(torch.ones(1, 3).long(), window_only="no"),
            TypeError,
            "window_only: expected a bool, got str",
        ),
    ],
    ids=["disable", "explain", "preset", "reference", "window_only"],
)
def test_an_argument_of_the_wrong_kind_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
