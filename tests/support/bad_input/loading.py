"""Cases of `Plan`, `load` and `enable`."""

from __future__ import annotations

from typing import Any

import pop_ext
from models import llama, mixtral
from pop_ext import Plan, PlanCard, UnsupportedModelError
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, XLNetConfig, XLNetLMHeadModel

from bad_input.fixture import Case, Fixture

PLAN = [
    Case("a layer that the model does not have", lambda f: Plan(3, omit=[3]), ValueError, "omit: .*0...2, got 3"),
    Case("a negative layer", lambda f: Plan(3, omit=[-1]), ValueError, "omit: .*0...2, got -1"),
    Case("a layer twice", lambda f: Plan(3, omit=[1, 1]), ValueError, "omit: .*once, got 1 twice"),
    Case("every layer", lambda f: Plan(3, omit=range(3)), ValueError, "omit: .*retained, got all of them"),
    Case("no layers at all", lambda f: Plan(0, omit=[]), ValueError, "num_layers: .*1.*got 0"),
    Case("`omit=1`", lambda f: Plan(3, omit=1), TypeError, "omit: expected an iterable of integers, got 1"),
    Case("a layer that is not an integer", lambda f: Plan(3, omit=[1.0]), TypeError, "omit: .*integer, got 1.0"),
    Case("`boundary=0`", lambda f: Plan(3, omit=[1], boundary=0), ValueError, "boundary: .*1.*got 0"),
    Case("`min_tokens=-1`", lambda f: Plan(3, omit=[1], min_tokens=-1), ValueError, "min_tokens: .*0.*got -1"),
    Case("a count of all layers", lambda f: Plan.last(3, count=3), ValueError, "count: .*0...2, got 3"),
    Case(
        "both count and fraction",
        lambda f: Plan.last(3, count=1, fraction=0.5),
        ValueError,
        "count, fraction: expected one of them",
    ),
    Case("a dict as card", lambda f: f.plan.replace(card={}), TypeError, "card: expected a .*PlanCard, got dict"),
    Case(
        "the card of another plan",
        lambda f: Plan(3, [1], card=PlanCard(3, (2,), 1)),
        ValueError,
        r"card: expected the figures of Plan.* got those of another plan \(1 of 3 layers omitted \(2\)",
    ),
    Case("text that is not JSON", lambda f: Plan.from_json("{"), ValueError, "plan"),
    Case("a dict, to `Plan.from_json`", lambda f: Plan.from_json({}), TypeError, "text: expected a str .*, got dict"),
]


class Adapter(nn.Linear):
    """Stand-in for the modules that adapters and quantisers put in the place of a Linear."""


class Subclass(Tensor):
    """Stand-in for quantised tensors. DTensor itself is tested in test_device_maps.py."""


class PackedLinear(nn.Linear):
    """Stand-in for the linear modules of a quantised checkpoint."""


def quantise(f: Fixture, config: Any) -> None:
    f.model.model.layers[1].mlp.up_proj.__class__ = PackedLinear
    f.model.config.quantization_config = config


def load(f: Fixture, plan: Any = None) -> Any:
    return pop_ext.load(f.model, plan)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=50))


def xlnet() -> XLNetLMHeadModel:
    return XLNetLMHeadModel(XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=64, vocab_size=50)).eval()


def replace_projection(f: Fixture) -> None:
    attention = f.model.model.layers[1].self_attn
    attention.q_proj = Adapter(*attention.q_proj.weight.shape[::-1], bias=False)


def subclass_weight(f: Fixture) -> None:
    linear = f.model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Subclass), requires_grad=False)


class WithoutConfig(nn.Module):
    """Module without a config, so no Hugging Face model."""


LOAD = [
    Case(
        '`fp8="yes"`',
        lambda f: pop_ext.load(f.model, fp8="yes"),
        TypeError,
        "fp8: expected a bool, got str",
    ),
    Case(
        "`fp8` with the oracle",
        lambda f: pop_ext.enable(f.model, backend="reference", fp8=True),
        ValueError,
        'fp8: expected False with backend="reference", .* got True',
    ),
    Case(
        "`int8=1`",
        lambda f: pop_ext.load(f.model, int8=1),
        TypeError,
        "int8: expected a bool, got int",
    ),
    Case(
        "`int8` beside `fp8`",
        lambda f: pop_ext.enable(f.model, fp8=True, int8=True),
        ValueError,
        r"int8: expected False with fp8=True \(a product has one type of operands\), got True",
    ),
    Case(
        "`free_weights` without `int8`",
        lambda f: pop_ext.enable(f.model, free_weights=True),
        ValueError,
        r"free_weights: expected False without int8=True \(there are no integers to keep\), got True",
    ),
    Case(
        "`free_weights=1`",
        lambda f: pop_ext.load(f.model, int8=True, free_weights=1),
        TypeError,
        "free_weights: expected a bool, got int",
    ),
    Case(
        "`int8` without a native form",
        lambda f: pop_ext.enable(f.model, backend="portable", int8=True),
        ValueError,
        'int8: expected False with backend="portable", .* got True',
    ),
    Case(
        "`prepack=1`",
        lambda f: pop_ext.load(f.model, prepack=1),
        TypeError,
        "prepack: expected a bool, got int",
    ),
    Case(
        "`prepack` with the oracle",
        lambda f: pop_ext.enable(f.model, backend="reference", prepack=True),
        ValueError,
        'prepack: expected False with backend="reference", .* got True',
    ),
    Case(
        "`prepack` beside `fp8`",
        lambda f: pop_ext.enable(f.model, fp8=True, prepack=True),
        ValueError,
        r"prepack: expected False with fp8=True \(fp8 products do not read prepacked weights\), got True",
    ),
    Case(
        "`prepack` beside `int8`",
        lambda f: pop_ext.load(f.model, int8=True, prepack=True),
        ValueError,
        r"prepack: expected False with int8=True \(int8 products do not read prepacked weights\), got True",
    ),
    Case(
        "`prepack` of a model with experts",
        lambda f: pop_ext.load(mixtral(layers=3), prepack=True),
        UnsupportedModelError,
        "prepack: expected a model without experts, got one of",
    ),
    Case(
        "`prepack` of a model in float32",
        lambda f: pop_ext.enable(llama(layers=3), prepack=True),
        UnsupportedModelError,
        "prepack: expected bfloat16 weights, got float32",
        on_cuda=False,
    ),
    Case(
        "`fp8` of a model with experts",
        lambda f: pop_ext.load(mixtral(layers=3), fp8=True),
        UnsupportedModelError,
        "fp8: expected a model without experts, got one of",
    ),
    Case(
        "`int8` of a model with experts",
        lambda f: pop_ext.load(mixtral(layers=3), int8=True),
        UnsupportedModelError,
        "int8: expected a model without experts, got one of",
        on_cuda=False,
    ),
    Case(
        "`fp8` of a model with a size that is no multiple of 16",
        lambda f: pop_ext.enable(llama(layers=3, intermediate=150), fp8=True),
        UnsupportedModelError,
        "fp8: expected intermediate_size to be a multiple of 16, got 150",
    ),
    Case(
        "`cuda_graphs=True`",
        lambda f: pop_ext.load(f.model, cuda_graphs=True),
        TypeError,
        "cuda_graphs: expected an int, got bool",
    ),
    Case(
        "`cuda_graphs=-1`",
        lambda f: pop_ext.enable(f.model, cuda_graphs=-1),
        ValueError,
        "cuda_graphs: expected at least 0, got -1",
    ),
    Case(
        "`cuda_graphs` with the oracle",
        lambda f: pop_ext.enable(f.model, backend="reference", cuda_graphs=4),
        ValueError,
        'cuda_graphs: expected 0 with backend="reference", .* got 4',
    ),
    Case(
        "`cuda_graphs` of a model with experts",
        lambda f: pop_ext.load(mixtral(layers=3), "third", cuda_graphs=4),
        UnsupportedModelError,
        "cuda_graphs: expected a model without experts, .* got one of",
    ),
    Case(
        "`cuda_graphs` of a model on a CPU",
        lambda f: pop_ext.enable(f.model, cuda_graphs=4),
        UnsupportedModelError,
        "cuda_graphs: expected a model on a CUDA device, got one on cpu",
        on_cuda=False,
    ),
    Case(
        "an unknown architecture",
        lambda f: pop_ext.load(gpt2()),
        UnsupportedModelError,
        r'model: expected an architecture that pop-ext info lists as native, got gpt2\. .*backend="portable" works',
    ),
    Case(
        "an unknown architecture, to `enable`, whose layers the portable backend cannot run",
        lambda f: pop_ext.enable(xlnet()),
        UnsupportedModelError,
        "model: expected an architecture .*, got xlnet. The portable backend: model: expected a decoder",
    ),
    Case(
        "a quantised checkpoint",
        load,
        UnsupportedModelError,
        'model: expected unquantised weights, got .*bitsandbytes.*backend="portable" works',
        lambda f: quantise(f, BitsAndBytesConfig(load_in_8bit=True)),
    ),
    Case(
        "a quantised checkpoint whose config is a dict",
        load,
        UnsupportedModelError,
        "model: expected unquantised weights, got .*gptq",
        lambda f: quantise(f, {"quant_method": "gptq"}),
    ),
    Case(
        "an adapter in place of a Linear",
        load,
        UnsupportedModelError,
        "layers.1.q_proj: expected a plain torch.nn.Linear, got .*Adapter .*merge adapters",
        replace_projection,
    ),
    Case(
        "a weight that is a tensor subclass (DTensor of tensor parallelism, quantised)",
        load,
        UnsupportedModelError,
        "weight layers.0.up_proj: expected a plain tensor, got Subclass .*tensor-parallel",
        subclass_weight,
    ),
    Case(
        "a norm of another class",
        load,
        UnsupportedModelError,
        "expected a LlamaRMSNorm, got RMSNorm",
        lambda f: setattr(f.model.model, "norm", nn.RMSNorm(32)),
    ),
    Case(
        "fewer layers than the config says",
        load,
        UnsupportedModelError,
        "model: expected 3 decoder layers .*got 2",
        lambda f: setattr(f.model.model, "layers", f.model.model.layers[:2]),
    ),
    Case(
        "weights on the meta device (offloaded)",
        load,
        UnsupportedModelError,
        "expected loaded weights, got the meta device",
        lambda f: f.model.to("meta"),
    ),
    Case(
        "weights of several dtypes",
        load,
        UnsupportedModelError,
        "weight layers.1.k_proj: expected torch.float32 on cpu like embed_tokens, got torch.bfloat16 on cpu",
        lambda f: f.model.model.layers[1].self_attn.k_proj.bfloat16(),
    ),
    Case(
        "float64 weights",
        load,
        UnsupportedModelError,
        "model: expected float32, bfloat16 or float16 weights, got torch.float64",
        lambda f: f.model.double(),
    ),
    Case(
        "an unknown activation",
        lambda f: pop_ext.load(llama(layers=3, hidden_act="relu")),
        UnsupportedModelError,
        "config.hidden_act: expected one of .*silu.*got relu",
    ),
    Case(
        "a head_dim of 20",
        lambda f: pop_ext.load(llama(layers=3, head_dim=20)),
        UnsupportedModelError,
        "config.head_dim: expected a multiple of 8 up to 256, got 20",
    ),
    Case(
        'an unknown word as plan, `enable(model, "half")`',
        lambda f: pop_ext.enable(f.model, "half"),
        ValueError,
        'plan: expected a pop_ext.Plan, "third", "preset", or the path of a plan file .* got \'half\'',
    ),
    Case(
        '`plan="preset"` for a model without a preset',
        lambda f: load(f, "preset"),
        ValueError,
        'plan: expected a model that has a preset with "preset".* got llama with 3 layers',
    ),
    Case(
        "a dict as plan",
        lambda f: load(f, {"omit": [1]}),
        TypeError,
        "plan: expected a pop_ext.Plan, got dict",
    ),
    Case(
        "a plan for another depth",
        lambda f: load(f, Plan(4, omit=[3])),
        ValueError,
        "plan: expected num_layers=3 like the model, got 4",
    ),
    Case(
        "a plan for another depth, to `enable`",
        lambda f: pop_ext.enable(f.model, Plan(4, omit=[3])),
        ValueError,
        "plan: expected num_layers=3 like the model, got 4",
    ),
    Case(
        "`enable(model, backend='x')`",
        lambda f: pop_ext.enable(f.model, backend="x"),
        ValueError,
        "backend: expected one of auto, native, portable, reference, got 'x'",
    ),
    Case(
        "a model without its head",
        lambda f: pop_ext.load(f.model.model),
        UnsupportedModelError,
        "model: expected a LlamaForCausalLM, got LlamaModel$",
    ),
    Case(
        "a string as model, to `load`",
        lambda f: pop_ext.load("meta-llama/Llama-3.1-8B"),
        TypeError,
        "model: expected a Hugging Face model, got str",
    ),
    Case(
        "a string as model, to `enabled`",
        lambda f: pop_ext.enabled("meta-llama/Llama-3.1-8B").__enter__(),
        TypeError,
        "model: expected a Hugging Face model, got str",
    ),
    Case(
        "a string as model, to `reference.prefill`",
        lambda f: pop_ext.reference.prefill("meta-llama/Llama-3.1-8B", f.ids, f.plan),
        TypeError,
        "model: expected a Hugging Face model, got str",
    ),
    Case(
        "`enable(model, strict='yes')`",
        lambda f: pop_ext.enable(f.model, strict="yes"),
        TypeError,
        "strict: expected a bool, got str",
    ),
    Case(
        "a module without a config, to `enable`",
        lambda f: pop_ext.enable(WithoutConfig()),
        TypeError,
        "model: expected a Hugging Face model with a config, got WithoutConfig",
    ),
    Case(
        "a string as model, to `enable`",
        lambda f: pop_ext.enable("meta-llama/Llama-3.1-8B"),
        TypeError,
        "model: expected a Hugging Face model, got str",
    ),
]
