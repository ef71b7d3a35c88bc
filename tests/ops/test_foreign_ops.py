"""The library calls torch's operators without a count of arguments, and never one whose schema changed."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from models import shared, tokens
from pop_ext import env_info, ops


@pytest.fixture
def changed(monkeypatch):
    """Give an operator of torch another schema, and compare the schemas again, as the import of pop_ext does."""
    schema_of = ops._schema_of

    def change(name: str) -> None:
        another = f"{name}(Tensor self, int surprise) -> Tensor"
        monkeypatch.setattr(ops, "_schema_of", lambda asked: another if asked == name else schema_of(asked))
        monkeypatch.setattr(ops, "FOREIGN_UNKNOWN", ops._find_foreign())

    yield change
    monkeypatch.undo()
    ops._find_foreign()


def test_the_library_knows_the_operators_of_this_torch():
    assert ops.changed_aten() == {}
    assert all(name in torch.ops.pop.foreign_schemas() for name in ops._REQUIRED)


@pytest.mark.parametrize("name", ops._REQUIRED)
def test_a_changed_required_operator_is_named_and_loading_fails(changed, name):
    changed(name)
    with pytest.raises(RuntimeError, match=rf'{name}: found {name}\(Tensor self, int surprise\).*backend="portable"'):
        pop_ext.load(shared(), "third")
    assert env_info.installation()["aten_schemas"] == {name: f"{name}(Tensor self, int surprise) -> Tensor"}


def test_a_model_loaded_before_calls_no_changed_operator(changed):
    native = pop_ext.load(shared(), "third")
    ids = tokens(native.model, 1, 200)  # more rows than the kernel for few rows supports
    expected = native.prefill(ids).logits
    changed("aten::mm.out")
    with pytest.raises(RuntimeError, match=r"aten::mm.out: disabled: .*int surprise"):
        native.prefill(ids)
    ops.torch.ops.pop.set_foreign("aten::mm.out", 0, "")
    assert torch.equal(native.prefill(ids).logits, expected)


def test_a_changed_attention_operator_affects_nothing_else(changed):
    changed("aten::scaled_dot_product_attention")
    native = pop_ext.load(shared(), "third")
    assert native.prefill(tokens(native.model, 1, 9)).logits.isfinite().all()
