"""Operators of torch that the library calls without a count of arguments: one whose schema changed is never called."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from models import shared, tokens
from pop_ext import env_info, ops


@pytest.fixture
def changed(monkeypatch):
    """Lets torch have another schema for an operator, and looks again, as the import of pop_ext does."""
    schema_of = ops._schema_of

    def change(name: str) -> None:
        another = f"{name}(Tensor self, int surprise) -> Tensor"
        monkeypatch.setattr(ops, "_schema_of", lambda asked: another if asked == name else schema_of(asked))
        monkeypatch.setattr(ops, "FOREIGN_UNKNOWN", ops._find_foreign())

    yield change
    monkeypatch.undo()
    ops._find_foreign()


def test_the_operators_of_this_torch_are_those_that_the_library_knows():
    assert ops.changed_aten() == {}
    assert all(name in torch.ops.pop.foreign_schemas() for name in ops._REQUIRED)


@pytest.mark.parametrize("name", ops._REQUIRED)
def test_a_changed_operator_that_a_prefill_needs_is_named_and_loads_no_model(changed, name):
    changed(name)
    with pytest.raises(RuntimeError, match=rf'{name}: found {name}\(Tensor self, int surprise\).*backend="reference"'):
        pop_ext.load(shared())
    assert env_info.installation()["aten_schemas"] == {name: f"{name}(Tensor self, int surprise) -> Tensor"}


def test_a_model_loaded_before_calls_no_changed_operator(changed):
    native = pop_ext.load(shared())
    ids = tokens(native.model, 1, 200)  # more rows than the kernel for few of them takes
    expected = native.prefill(ids).logits
    changed("aten::mm.out")
    with pytest.raises(RuntimeError, match=r"aten::mm.out: disabled: .*int surprise"):
        native.prefill(ids)
    ops.torch.ops.pop.set_foreign("aten::mm.out", 0, "")
    assert torch.equal(native.prefill(ids).logits, expected)


def test_a_changed_operator_that_only_serves_attention_leaves_the_rest_alone(changed):
    changed("aten::scaled_dot_product_attention")
    native = pop_ext.load(shared())
    assert native.prefill(tokens(native.model, 1, 9)).logits.isfinite().all()
