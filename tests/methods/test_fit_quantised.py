"""pop_ext.fit of models with quantised weights: the same fit as of a model with those weights in full."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from models import batches, llama, phi3, tokens
from pop_ext import Plan, reference
from pop_ext.plans.projections import dense_weight, key_value_weights
from torch import nn

PLAN = Plan(6, (3, 4, 5))


def with_quanto(model):
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    quanto.quantize(model, weights=quanto.qint8, exclude="lm_head")
    quanto.freeze(model)
    return model


class Packed(nn.Module):
    """A linear module whose weight is not called so, as in GPTQ."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, (self.qweight * self.scale).to(x), self.bias)


def packed(model):
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.layers.set_submodule(name, Packed(module))
    return model


def dense(model, plain):
    """Return the plain model with the values of the quantised one's weights."""
    for name, module in plain.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data.copy_(dense_weight(model.model.layers.get_submodule(name)))
    return plain


@pytest.mark.parametrize("method", ["ridge", "distill"])
@pytest.mark.parametrize("make", [llama, phi3])
@pytest.mark.parametrize("quantise", [with_quanto, packed])
def test_a_quantised_model_is_fitted_as_its_values(quantise, make, method):
    model = quantise(make())
    same = dense(model, make())
    how = {"method": method, "lambdas": [0.1], "holdout": batches(model)[:1]}
    how |= {"steps": 2} if method == "distill" else {}
    fitted, plain = (pop_ext.fit(one, PLAN, batches(model), **how) for one in (model, same))
    for layer, matrix in fitted.projections.matrices.items():
        torch.testing.assert_close(matrix, plain.projections.matrices[layer], rtol=1e-3, atol=1e-4)
    ids = tokens(model, 2, 20)
    ours, _ = reference.prefill(model, ids, fitted)
    theirs, _ = reference.prefill(same, ids, plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    unfitted, _ = reference.prefill(model, ids, PLAN)
    assert not torch.allclose(ours, unfitted, atol=1e-3)


def test_quantised_weights_are_read_as_the_values_that_are_multiplied_by():
    attention = llama().model.layers[0].self_attn
    exact, weight = key_value_weights(attention), dense_weight(Packed(attention.k_proj))
    assert weight.shape == exact.k.shape
    torch.testing.assert_close(weight, exact.k, rtol=0, atol=float(exact.k.abs().max()) / 100)
