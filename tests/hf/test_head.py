"""Test the head of a prefill: `torch.ops.pop.linear` runs a plain linear, any other head is called as a module."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from models import shared, tokens
from op_operands import DTYPES, random
from pop_ext.hf.head import apply_head
from tolerance import assert_close_fp32, assert_low_precision
from torch import nn

HIDDEN, VOCAB = 96, 1003


@pytest.fixture
def products(monkeypatch):
    """Return a list that records the input shape of every call of `torch.ops.pop.linear`."""
    seen, linear = [], torch.ops.pop.linear
    monkeypatch.setattr(torch.ops.pop, "linear", lambda x, weight: seen.append(tuple(x.shape)) or linear(x, weight))
    return seen


def head_of(dtype: torch.dtype = torch.float32, bias: bool = False, cls: type[nn.Linear] = nn.Linear) -> nn.Linear:
    head = cls(HIDDEN, VOCAB, bias=bias, dtype=dtype)
    return head.requires_grad_(False)


@pytest.mark.cpu
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7,), (2, 40), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plain_head_runs_pop_linear_as_exactly_as_the_module(dtype, shape, products):
    head, hidden = head_of(dtype), random(*shape, HIDDEN, dtype=dtype)
    logits, exact = apply_head(head, hidden), hidden.double() @ head.weight.double().T
    assert products == [(*shape, HIDDEN)]
    assert logits.dtype == dtype
    if dtype == torch.float32:
        assert_close_fp32(logits, exact, "logits", 2e-5)
    elif logits.numel():
        assert_low_precision(logits, head(hidden), exact, "logits")


@pytest.mark.cpu
def test_a_prefill_runs_its_plain_head_with_pop_linear(products):
    model = shared("llama")
    pop_ext.load(model, "third").prefill(tokens(model, 2, 9), logits_to_keep=2)
    assert products == [(2, 2, model.config.hidden_size)]


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(head):
    head.register_forward_hook(lambda module, args, output: output + 1)
    return head


def hooked_before(head):
    head.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return head


def with_another_forward(head):
    head.forward = lambda x: nn.Linear.forward(head, x) * 3
    return head


class Reversed(torch.Tensor):
    """Weight whose value is not that of its elements, as with quantised weights."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return nn.functional.linear(args[0], args[1].as_subclass(torch.Tensor).flip(0))
        return super().__torch_function__(function, types, args, kwargs)


def with_a_weight_subclass(head):
    weight = head.weight.detach().as_subclass(Reversed)
    del head._parameters["weight"]
    head.weight = weight
    return head


def transposed(head):
    head.weight = nn.Parameter(head.weight.T.contiguous().T, requires_grad=False)
    return head


def parametrised(head):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(head, "weight", Double())
    return head


OTHER_HEADS = {
    "a bias": lambda: head_of(bias=True),
    "a subclass of Linear": lambda: head_of(cls=Scaled),
    "a hook": lambda: hooked(head_of()),
    "a pre-hook": lambda: hooked_before(head_of()),
    "another forward": lambda: with_another_forward(head_of()),
    "a transposed weight": lambda: transposed(head_of()),
    "a weight subclass": lambda: with_a_weight_subclass(head_of()),
    "a parametrisation": lambda: parametrised(head_of()),
    "a Sequential": lambda: nn.Sequential(head_of(), nn.Tanh()),
}


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_any_other_head_is_called_as_a_module(name, products):
    head, hidden = OTHER_HEADS[name](), random(2, 1, HIDDEN)
    assert torch.equal(apply_head(head, hidden), head(hidden))
    assert products == []


@pytest.mark.cpu
def test_under_autocast_the_head_is_called_as_a_module(products):
    head, hidden = head_of(), random(2, 1, HIDDEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = apply_head(head, hidden)
    assert (logits.dtype, products) == (torch.bfloat16, [])


@pytest.mark.cpu
@pytest.mark.parametrize("kind", ["hook", "pre_hook"])
def test_a_hook_on_every_module_sees_the_head(kind, products):
    head, hidden, seen = head_of(), random(2, 1, HIDDEN), []
    register = getattr(nn.modules.module, f"register_module_forward_{kind}")
    handle = register(lambda *arguments: seen.append(arguments[0]))
    try:
        apply_head(head, hidden)
    finally:
        handle.remove()
    assert seen == [head]
    assert products == []


@pytest.mark.cpu
def test_a_replaced_linear_forward_is_called(monkeypatch, products):
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x.sum())
    assert apply_head(head_of(), random(2, HIDDEN)).dim() == 0
    assert products == []
