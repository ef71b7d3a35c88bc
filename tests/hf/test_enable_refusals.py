"""Test models without a native form: the error of `enable`, and the backends that run them."""

from __future__ import annotations

import pickle

import models
import pop_ext
import pytest
import torch
import transformers
from enabled_models import LAYERS, PLAN, LowRank, T, assert_enabled_equals_oracle, generate
from models import gemma3, hyperclovax, llama, qwen3, tokens
from pop_ext import Plan, UnsupportedModelError, reference
from pop_ext.hf import reference_backend
from tiny_models import build, tiny_config
from tolerance import assert_close_fp32, compare_caches
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


class OtherLinear(nn.Linear):
    """A linear module of another class, as quantised checkpoints have them."""


def quantised() -> nn.Module:
    model = llama()
    model.model.layers[2].mlp.up_proj.__class__ = OtherLinear
    model.config.quantization_config = {"quant_method": "gptq"}
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50))


def one_layer_on_meta() -> nn.Module:
    model = llama()
    model.model.layers[3].mlp.to("meta")
    return model


def offloaded_by_accelerate() -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(llama(), execution_device="cpu")


def of_mixed_dtype() -> nn.Module:
    model = llama()
    model.model.layers[3].mlp.to(torch.bfloat16)
    return model


def in_float64() -> nn.Module:
    return llama().to(torch.float64)


def with_an_adapter() -> nn.Module:
    model = llama()
    model.model.layers[0].mlp.up_proj = LowRank(model.model.layers[0].mlp.up_proj)
    return model


def with_one_layer_fewer() -> nn.Module:
    model = llama()
    del model.model.layers[5]
    return model


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32)).eval()


def without_a_head() -> nn.Module:
    return LlamaModel(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50))


class MyLlama(LlamaForCausalLM):
    """A user's subclass, which may compute something else."""


def of_a_subclass() -> nn.Module:
    return models.build(MyLlama, LlamaConfig, {})


def bidirectional() -> nn.Module:
    return gemma3(use_bidirectional_attention=True)


UNSUPPORTED = {
    quantised: "unquantised weights.*gptq",
    on_meta: "meta device",
    one_layer_on_meta: "layers.3.gate_proj.*meta device",
    offloaded_by_accelerate: "meta device",
    of_mixed_dtype: "layers.3.gate_proj.*torch.bfloat16",
    in_float64: "float32, bfloat16 or float16.*float64",
    with_an_adapter: "plain torch.nn.Linear, got enabled_models.LowRank",
    with_one_layer_fewer: "6 decoder layers.*got 5",
    gpt2: "expected an architecture that pop-ext info lists as native, got gpt2",
    hyperclovax: "got hyperclovax",
    bidirectional: "use_bidirectional_attention: expected a causal model",
    without_a_head: "expected a LlamaForCausalLM, got LlamaModel",
    of_a_subclass: "expected a LlamaForCausalLM, got MyLlama",
}


# What neither backend can run: nothing loads the weights, the stock model fails, a layer is missing, or all rows see
# each other.
BY_NO_BACKEND = {on_meta, one_layer_on_meta, of_mixed_dtype, with_one_layer_fewer, bidirectional, without_a_head}


@pytest.mark.parametrize("build", UNSUPPORTED, ids=lambda build: build.__name__)
def test_an_unsupported_model_is_refused_and_unchanged(build):
    model = build()
    before = dict(model.__dict__)
    with pytest.raises(UnsupportedModelError, match=UNSUPPORTED[build]) as error:
        pop_ext.enable(model, backend="native")
    assert model.__dict__ == before
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


@pytest.mark.parametrize("build", UNSUPPORTED, ids=lambda build: build.__name__)
@torch.no_grad()
def test_the_error_names_the_portable_backend_where_that_runs_the_model_and_nowhere_else(build):
    model = build()
    with pytest.raises(UnsupportedModelError) as error:
        pop_ext.enable(model, backend="native")
    named = 'backend="portable" works' in str(error.value)
    assert named is (build not in BY_NO_BACKEND)
    if named:
        pop_ext.enable(model, Plan(model.config.num_hidden_layers, (1,)), strict=True, backend="portable")
        assert model(torch.arange(2, 14)[None], logits_to_keep=1).logits.isfinite().all()


@pytest.mark.parametrize("build", UNSUPPORTED, ids=lambda build: build.__name__)
@torch.no_grad()
def test_the_portable_backend_takes_over_where_it_can(build):
    model = build()
    if build in BY_NO_BACKEND:
        with pytest.raises(UnsupportedModelError, match=UNSUPPORTED[build]):
            pop_ext.enable(model)
        assert "forward" not in model.__dict__
        return
    pop_ext.enable(model, Plan(model.config.num_hidden_layers, (1,)), strict=True)
    assert model(torch.arange(2, 14)[None], logits_to_keep=1).logits.isfinite().all()
    assert pop_ext.last_call(model).backend == "portable"


@pytest.mark.parametrize("option", ["fp8", "prepack"])
def test_the_error_of_an_option_does_not_name_the_backend_that_refuses_it(option):
    with pytest.raises(UnsupportedModelError, match=f"without {option} the model runs natively$"):
        pop_ext.enable(llama(intermediate=150), PLAN, **{option: True})


@pytest.mark.cpu  # the operator says so of a GPU that the build has no code for
def test_a_device_that_the_kernels_cannot_run_on_is_named_before_anything_runs(monkeypatch):
    reason = "expected a compute capability that this build has code for (80+PTX, 86), got 7.5"
    monkeypatch.setattr(torch.ops.pop, "device_missing", lambda like: reason)
    model = llama()
    with pytest.raises(UnsupportedModelError, match=r"^device cpu: expected a compute capability .* got 7.5"):
        pop_ext.load(model, PLAN)
    with pop_ext.enabled(model, PLAN), torch.no_grad():
        model(tokens(model, 1, T), logits_to_keep=1, use_cache=True)
        assert pop_ext.last_call(model).backend == "portable"


def test_a_refused_enable_keeps_the_previous_one():
    model = pop_ext.enable(llama(), PLAN)
    before = model.forward
    with pytest.raises(ValueError, match="num_layers=6"):
        pop_ext.enable(model, Plan(4, (3,)))
    assert model.forward is before
    assert_enabled_equals_oracle(model, tokens(model, 1, T))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"plan": Plan(4, (3,))}, ValueError, "expected num_layers=6 like the model, got 4"),
        ({"plan": (3, 4)}, TypeError, "expected a pop_ext.Plan, got tuple"),
        ({"backend": "cuda"}, ValueError, "expected one of auto, native, portable, reference, got 'cuda'"),
        ({"plan": Plan(4, (3,)), "backend": "reference"}, ValueError, "expected num_layers=6"),
    ],
)
def test_bad_arguments_of_enable_are_named(arguments, error, text):
    model = llama()
    with pytest.raises(error, match=text):
        pop_ext.enable(model, **arguments)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("what", [None, "meta-llama/Llama-3.1-8B", nn.Linear(2, 2)])
def test_an_argument_that_is_no_model_is_refused(what):
    with pytest.raises(TypeError, match="expected a Hugging Face model"):
        pop_ext.enable(what)


@pytest.mark.parametrize("build", [qwen3, hyperclovax])
@torch.no_grad()
def test_the_reference_backend_runs_families_beyond_the_native_ones(build):
    model = build()
    ids = tokens(model, 2, T)
    pop_ext.enable(model, PLAN, strict=True, backend="reference")
    output = model(ids, logits_to_keep=1)
    assert pop_ext.last_call(model).backend == "reference"
    logits, cache = reference.prefill(model, ids, PLAN)
    assert_close_fp32(output.logits, logits, "logits")
    compare_caches(output.past_key_values, cache)
    assert generate(model, ids, 12).shape == (2, T + 12)


@pytest.mark.parametrize("build", [gpt2, without_a_head, with_one_layer_fewer, bidirectional])
def test_the_reference_backend_refuses_models_it_cannot_run(build):
    model = build()
    with pytest.raises(ValueError, match=r"model: expected|use_bidirectional_attention: expected a causal model"):
        pop_ext.enable(model, backend="reference")
    assert "forward" not in model.__dict__


def test_an_unpruned_reference_backend_generates_as_the_stock_model():
    model = hyperclovax()
    ids = tokens(model, 1, 40)
    expected = generate(model, ids)
    pop_ext.enable(model, Plan(LAYERS, ()), strict=True, backend="reference")
    assert torch.equal(generate(model, ids), expected)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nanochat", "no attribute 'weight'"),
        ("apertus", "ApertusAttention of layer 1 computes something else"),
        ("stablelm", "computes something else"),
        ("mimo_v2_flash", "computes something else"),
        ("minimax", "not compatible with"),
    ],
)
def test_a_model_that_the_oracle_cannot_run_is_refused_at_once(name, text):
    model = build(getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]), tiny_config(name))
    plan = Plan(model.config.num_hidden_layers, (1,))
    with pytest.raises(ValueError, match=f"model: expected one that the oracle can run, got .*{text}"):
        pop_ext.enable(model, plan, backend="reference")
    assert "forward" not in model.__dict__


def test_a_family_whose_oracle_computes_something_else_is_refused(monkeypatch):
    """As PaliGemma's would, whose prompts attend in both directions."""
    model = llama()
    prefill = reference.prefill

    def shifted(*args, **kwargs):
        logits, cache = prefill(*args, **kwargs)
        return 1.1 * logits, cache

    monkeypatch.setattr(reference, "prefill", shifted)
    monkeypatch.setattr(reference_backend, "_passed", set())
    with pytest.raises(ValueError, match="in a trial of 7 tokens the logits differ by"):
        pop_ext.enable(model, Plan(6, (1,)), backend="reference")
