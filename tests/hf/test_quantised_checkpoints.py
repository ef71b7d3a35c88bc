"""Test quantised checkpoints: the native backend refuses them by name, the others run them."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from enabled_models import LAYERS, PLAN, generate
from models import llama, mixtral, tokens
from pop_ext import Plan, UnsupportedModelError
from tolerance import assert_close_fp32
from torch import Tensor, nn

METHODS = (
    "bitsandbytes",
    "gptq",
    "awq",
    "fp8",
    "fbgemm_fp8",
    "hqq",
    "torchao",
    "quanto",
    "compressed-tensors",
    "mxfp4",
)


class Int8Linear(nn.Module):
    """Linear with int8 weights and one scale per row, dequantised in each call, as in weight-only quantisation."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def quantised(method: str | None, build=llama) -> nn.Module:
    model = build()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Int8Linear(getattr(layer.self_attn, name)))
    if method is not None:
        model.config.quantization_config = {"quant_method": method}
    return model


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_checkpoint_is_refused_by_the_name_of_its_method(method):
    model = quantised(method)
    with pytest.raises(UnsupportedModelError, match=rf'quantised checkpoint \({method}\).*backend="portable" works'):
        pop_ext.enable(model, backend="native")
    assert "forward" not in model.__dict__


def test_quantised_modules_without_a_config_are_refused_by_their_class():
    with pytest.raises(UnsupportedModelError, match="q_proj: expected a plain torch.nn.Linear, got .*Int8Linear"):
        pop_ext.enable(quantised(None), backend="native")


@pytest.mark.parametrize("build", [llama, mixtral])
@torch.no_grad()
def test_the_reference_backend_runs_a_quantised_checkpoint(build):
    model = quantised("hqq", build)
    ids = tokens(model, 1, 30)
    expected = generate(model, ids, 12)
    with pop_ext.enabled(model, Plan(LAYERS, ()), strict=True, backend="reference"):
        assert torch.equal(generate(model, ids, 12), expected)
    pop_ext.enable(model, PLAN, strict=True, backend="reference")
    pruned = model(ids, logits_to_keep=1).logits
    assert pop_ext.last_call(model).backend == "reference"
    assert torch.equal(pruned, pop_ext.reference.prefill(model, ids, PLAN)[0])
    pop_ext.enable(model, PLAN, strict=True)
    portable = model(ids, logits_to_keep=1).logits
    assert pop_ext.last_call(model).backend == "portable"
    assert_close_fp32(portable, pruned, "logits")
    pop_ext.disable(model)
    assert not torch.allclose(pruned, model(ids, logits_to_keep=1).logits, atol=1e-3), "the plan changes nothing"


@torch.no_grad()
def test_a_checkpoint_that_was_dequantised_runs_natively():
    model = llama()
    model.config.quantization_config = {"quant_method": "gguf"}
    pop_ext.enable(model, PLAN, strict=True)
    model(tokens(model, 1, 30), logits_to_keep=1)
    assert pop_ext.last_call(model).native
