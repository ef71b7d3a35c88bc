"""The cases of test_bad_input.py and docs/bad-input.md: what is passed, what must come back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pop_ext
import torch
from models import llama, offloaded_cache, tokens
from op_calls import int32, op_call, run_op
from pop_ext import Plan, UnsupportedModelError
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

pop = torch.ops.pop
LAYERS, PAST, NEW, CAPACITY = 3, 5, 8, 20


class World:
    """A model, loaded, with filled caches of every kind: what a bad call must leave as it was."""

    def __init__(self, new: int = NEW, capacity: int = CAPACITY) -> None:
        self.model = llama(layers=LAYERS, hidden=32, intermediate=48, vocab=50, heads=2, kv_heads=2)
        self.plan = Plan(num_layers=LAYERS, omit=(1, 2))
        self.native = pop_ext.load(self.model, self.plan)
        self.ids = tokens(self.model, 2, new)
        self.dynamic = DynamicCache()
        self.static = StaticCache(config=self.model.config, max_cache_len=capacity)
        first = tokens(self.model, 2, PAST, seed=1)
        for cache in (self.dynamic, self.static):
            self.native.prefill(first, past_key_values=cache)
        self.op = op_call(self.native, list(self.ids), past=[PAST] * 2, capacity=capacity)
        for cache in (*self.op["key_cache"], *self.op["value_cache"]):
            cache.normal_()

    def prefill(self, **over: Any) -> Any:
        return self.native.prefill(**{"input_ids": self.ids, "past_key_values": self.dynamic, **over})

    def run_op(self, **over: Any) -> Tensor:
        return run_op({**self.op, **over})

    def tensors(self) -> list[Tensor]:
        caches = [
            x for cache in (self.dynamic, self.static) for layer in cache.layers for x in (layer.keys, layer.values)
        ]
        return [*self.model.parameters(), *caches, *self.op["key_cache"], *self.op["value_cache"]]

    def snapshot(self) -> list[tuple[int, tuple[int, ...], bytes]]:
        """Address, shape and bytes of every tensor, and the lengths of the caches."""
        state = [(x.data_ptr(), tuple(x.shape), bytes_of(x)) for x in self.tensors() if x.device.type == "cpu"]
        lengths = tuple(int(cache.get_seq_length()) for cache in (self.dynamic, self.static))
        return [*state, (0, lengths, b"")]


def bytes_of(x: Tensor) -> bytes:
    return x.detach().contiguous().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Case:
    given: str
    call: Callable[[World], Any]
    error: type[Exception]
    text: str
    """A regular expression that the message matches: the argument, what was expected, what came."""
    prepare: Callable[[World], Any] | None = None
    """Runs first; its changes belong to the state before the call."""


PLAN = [
    Case("a layer that the model does not have", lambda w: Plan(3, omit=[3]), ValueError, "omit: .*0...2, got 3"),
    Case("a negative layer", lambda w: Plan(3, omit=[-1]), ValueError, "omit: .*0...2, got -1"),
    Case("a layer twice", lambda w: Plan(3, omit=[1, 1]), ValueError, "omit: .*once, got 1 twice"),
    Case("every layer", lambda w: Plan(3, omit=range(3)), ValueError, "omit: .*retained, got all of them"),
    Case("no layers at all", lambda w: Plan(0, omit=[]), ValueError, "num_layers: .*1.*got 0"),
    Case("`omit=1`", lambda w: Plan(3, omit=1), TypeError, "omit: expected an iterable of integers, got 1"),
    Case("a layer that is no integer", lambda w: Plan(3, omit=[1.0]), TypeError, "omit: .*integer, got 1.0"),
    Case("`boundary=0`", lambda w: Plan(3, omit=[1], boundary=0), ValueError, "boundary: .*1.*got 0"),
    Case("`min_tokens=-1`", lambda w: Plan(3, omit=[1], min_tokens=-1), ValueError, "min_tokens: .*0.*got -1"),
    Case("a count of all layers", lambda w: Plan.last(3, count=3), ValueError, "count: .*0...2, got 3"),
    Case(
        "both count and fraction",
        lambda w: Plan.last(3, count=1, fraction=0.5),
        ValueError,
        "count, fraction: expected one of them",
    ),
    Case("JSON that is none", lambda w: Plan.from_json("{"), ValueError, "plan"),
]


class Adapter(nn.Linear):
    """A stand-in for what adapters and quantisers put in a Linear's place."""


class Subclass(Tensor):
    """A stand-in for DTensor (tensor parallelism) and quantised tensors."""


def load(w: World, plan: Any = None) -> Any:
    return pop_ext.load(w.model, plan)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=50))


def replace_projection(w: World) -> None:
    attention = w.model.model.layers[1].self_attn
    attention.q_proj = Adapter(*attention.q_proj.weight.shape[::-1], bias=False)


def subclass_weight(w: World) -> None:
    linear = w.model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Subclass), requires_grad=False)


class Headless(nn.Module):
    """No Hugging Face model: it has no config."""


LOAD = [
    Case(
        "an unknown architecture",
        lambda w: pop_ext.load(gpt2()),
        UnsupportedModelError,
        'model: expected an architecture of .*llama.*got gpt2.*backend="reference" works',
    ),
    Case(
        "an unknown architecture, to `enable`",
        lambda w: pop_ext.enable(gpt2()),
        UnsupportedModelError,
        'model: expected an architecture of .*got gpt2.*backend="reference" works',
    ),
    Case(
        "a quantised checkpoint",
        load,
        UnsupportedModelError,
        'model: expected unquantised weights, got .*bitsandbytes.*backend="reference" works',
        lambda w: setattr(w.model.config, "quantization_config", BitsAndBytesConfig(load_in_8bit=True)),
    ),
    Case(
        "a quantised checkpoint, its config a dict",
        load,
        UnsupportedModelError,
        "model: expected unquantised weights, got .*gptq",
        lambda w: setattr(w.model.config, "quantization_config", {"quant_method": "gptq"}),
    ),
    Case(
        "an adapter in place of a Linear",
        load,
        UnsupportedModelError,
        "layers.1.q_proj: expected a plain torch.nn.Linear, got .*Adapter .*merge adapters",
        replace_projection,
    ),
    Case(
        "a weight that is a tensor subclass (DTensor, quantised)",
        load,
        UnsupportedModelError,
        "weight layers.0.up_proj: expected a plain tensor, got Subclass",
        subclass_weight,
    ),
    Case(
        "another norm class",
        load,
        UnsupportedModelError,
        "expected a LlamaRMSNorm, got RMSNorm",
        lambda w: setattr(w.model.model, "norm", nn.RMSNorm(32)),
    ),
    Case(
        "fewer layers than the config says",
        load,
        UnsupportedModelError,
        "model: expected 3 decoder layers .*got 2",
        lambda w: setattr(w.model.model, "layers", w.model.model.layers[:2]),
    ),
    Case(
        "weights on the meta device (offloaded)",
        load,
        UnsupportedModelError,
        "expected loaded weights, got the meta device",
        lambda w: w.model.to("meta"),
    ),
    Case(
        "weights of several dtypes",
        load,
        UnsupportedModelError,
        "weight layers.1.k_proj: expected torch.float32 on cpu like embed_tokens, got torch.bfloat16 on cpu",
        lambda w: w.model.model.layers[1].self_attn.k_proj.bfloat16(),
    ),
    Case(
        "float64 weights",
        load,
        UnsupportedModelError,
        "model: expected float32, bfloat16 or float16 weights, got torch.float64",
        lambda w: w.model.double(),
    ),
    Case(
        "an unknown activation",
        lambda w: pop_ext.load(llama(layers=3, hidden_act="relu")),
        UnsupportedModelError,
        "config.hidden_act: expected one of .*silu.*got relu",
    ),
    Case(
        "a head_dim of 20",
        lambda w: pop_ext.load(llama(layers=3, head_dim=20)),
        UnsupportedModelError,
        "config.head_dim: expected a multiple of 8 up to 256, got 20",
    ),
    Case(
        "something that is no plan",
        lambda w: load(w, {"omit": [1]}),
        TypeError,
        "plan: expected a pop_ext.Plan, got dict",
    ),
    Case(
        "a plan for another depth",
        lambda w: load(w, Plan(4, omit=[3])),
        ValueError,
        "plan: expected num_layers=3 like the model, got 4",
    ),
    Case(
        "a plan for another depth, to `enable`",
        lambda w: pop_ext.enable(w.model, Plan(4, omit=[3])),
        ValueError,
        "plan: expected num_layers=3 like the model, got 4",
    ),
    Case(
        "`enable(model, backend='x')`",
        lambda w: pop_ext.enable(w.model, backend="x"),
        ValueError,
        "backend: expected one of native, reference, got 'x'",
    ),
    Case(
        "no Hugging Face model, to `enable`",
        lambda w: pop_ext.enable(Headless()),
        TypeError,
        "model: expected a Hugging Face model with a config, got Headless",
    ),
    Case(
        "no module at all, to `enable`",
        lambda w: pop_ext.enable("meta-llama/Llama-3.1-8B"),
        TypeError,
        "model: expected a Hugging Face model, got str",
    ),
]


@torch.no_grad()
def forward(w: World, **call: Any) -> Any:
    return w.model(**{"input_ids": w.ids, "logits_to_keep": 1, **call})


def enabled(w: World, **how: Any) -> None:
    pop_ext.enable(w.model, w.plan, **how)


def strictly(w: World) -> None:
    enabled(w, strict=True)


def with_the_oracle(w: World) -> None:
    enabled(w, backend="reference")


ENABLED = [
    Case(
        "a model that is not enabled, to `explain`",
        lambda w: pop_ext.explain(w.model, w.ids),
        ValueError,
        "model: expected an enabled model",
    ),
    Case(
        "a model that is not enabled, to `last_call`",
        lambda w: pop_ext.last_call(w.model),
        ValueError,
        "model: expected an enabled model",
    ),
    Case(
        "arguments that `forward` does not take, to `explain`",
        lambda w: pop_ext.explain(w.model, w.ids, input_ids=w.ids),
        TypeError,
        "multiple values for argument 'input_ids'",
        enabled,
    ),
    Case(
        "`logits_to_keep=0` (all rows) under `strict=True`",
        lambda w: forward(w, logits_to_keep=0),
        pop_ext.PrefillDeclined,
        "logits_to_keep=0: logits of all rows are wanted",
        strictly,
    ),
    Case(
        "a tensor of indices as `logits_to_keep` under `strict=True`",
        lambda w: forward(w, logits_to_keep=torch.tensor(1)),
        pop_ext.PrefillDeclined,
        "logits_to_keep is a tensor of indices: expected a number of last rows, an int",
        strictly,
    ),
    Case(
        "a right-padded batch under `strict=True`",
        lambda w: forward(w, attention_mask=ones(r0c12=0)[:, PAST:]),
        pop_ext.PrefillDeclined,
        "the last column is masked",
        strictly,
    ),
    Case(
        "position ids in float32 under `strict=True`",
        lambda w: forward(w, position_ids=torch.arange(float(NEW))[None]),
        pop_ext.PrefillDeclined,
        "position_ids: expected int64 or int32, got torch.float32",
        strictly,
    ),
    Case(
        "a mask on another device under `strict=True`",
        lambda w: forward(w, attention_mask=torch.ones(2, NEW, device="meta")),
        pop_ext.PrefillDeclined,
        "attention_mask: expected device cpu like the model, got meta",
        strictly,
    ),
    Case(
        "ids on the meta device under `strict=True`",
        lambda w: forward(w, input_ids=w.ids.to("meta")),
        pop_ext.PrefillDeclined,
        "input_ids or inputs_embeds: expected a tensor with data, got one on the meta device",
        strictly,
    ),
    Case(
        "a gradient to come, under `strict=True`",
        lambda w: w.model(w.ids, logits_to_keep=1),
        pop_ext.PrefillDeclined,
        "grad mode: the native prefill has no backward",
        strictly,
    ),
    Case(
        "ids outside the vocabulary, to an enabled model",
        lambda w: forward(w, input_ids=w.ids.clone().fill_(50)),
        ValueError,
        "input_ids: expected ids from 0 to 49, got 50",
        enabled,
    ),
    Case(
        "ids outside the vocabulary, to the reference backend",
        lambda w: forward(w, input_ids=w.ids.clone().fill_(50)),
        ValueError,
        r"input_ids: expected 0\.\.49, got 50",
        with_the_oracle,
    ),
]


def ones(**values: int) -> Tensor:
    """An attention mask of ones but for zeros at row_column names: ones(r1c6=0)."""
    mask = torch.ones(2, PAST + NEW, dtype=torch.long)
    for place, value in values.items():
        row, column = place.removeprefix("r").split("c")
        mask[int(row), int(column)] = value
    return mask


def short_row() -> Tensor:
    """A mask that leaves sequence 1 three new tokens."""
    mask = torch.ones(2, PAST + NEW, dtype=torch.long)
    mask[1, PAST : PAST + NEW - 3] = 0
    return mask


def small_static(w: World) -> StaticCache:
    return StaticCache(config=w.model.config, max_cache_len=NEW - 1)


def changed_cache(w: World, change: Callable[[Any], None], static: bool = False) -> Any:
    """A copy of the world's cache with one change."""
    cache = copy.deepcopy(w.static if static else w.dynamic)
    change(cache.layers)
    return cache


def share_layers(layers: Any) -> None:
    layers[2].keys = layers[1].keys


def expand_batch(layers: Any) -> None:
    layers[0].values = layers[0].values[:1].expand(2, -1, -1, -1)


def to_bfloat16(layers: Any) -> None:
    for layer in layers:
        layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()


def to_meta(layers: Any) -> None:
    for layer in layers:
        layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")


def one_sequence(layers: Any) -> None:
    for layer in layers:
        layer.keys, layer.values = layer.keys[:1], layer.values[:1]


def half_heads(layers: Any) -> None:
    layers[1].keys = layers[1].keys[:, :1]


def shorter_layer(layers: Any) -> None:
    layers[2].keys, layers[2].values = layers[2].keys[:, :, 1:], layers[2].values[:, :, 1:]


PREFILL = [
    Case("no input", lambda w: w.prefill(input_ids=None), ValueError, "input_ids: expected exactly one .*got none"),
    Case(
        "ids and embeddings",
        lambda w: w.prefill(inputs_embeds=torch.zeros(2, NEW, 32)),
        ValueError,
        "input_ids: expected exactly one of input_ids and inputs_embeds, got both",
    ),
    Case(
        "ids as a list",
        lambda w: w.prefill(input_ids=[[1, 2]]),
        TypeError,
        "input_ids: expected a tensor, got list",
    ),
    Case(
        "ids without a batch dimension",
        lambda w: w.prefill(input_ids=w.ids[0]),
        ValueError,
        r"input_ids: expected shape \[batch, tokens\], got \[8\]",
    ),
    Case(
        "ids in float32",
        lambda w: w.prefill(input_ids=w.ids.float()),
        TypeError,
        "input_ids: expected int64 or int32 ids, got torch.float32",
    ),
    Case(
        "an id outside the vocabulary",
        lambda w: w.prefill(input_ids=w.ids.clone().fill_(50)),
        ValueError,
        "input_ids: expected ids from 0 to 49, got 50",
    ),
    Case(
        "a negative id",
        lambda w: w.prefill(input_ids=-1 - w.ids),
        ValueError,
        "input_ids: expected ids from 0 to 49, got -",
    ),
    Case(
        "ids on another device",
        lambda w: w.prefill(input_ids=w.ids.to("meta")),
        ValueError,
        "input_ids: expected device cpu like the model, got meta",
    ),
    Case(
        "embeddings of another width",
        lambda w: w.prefill(input_ids=None, inputs_embeds=torch.zeros(2, NEW, 31)),
        ValueError,
        r"inputs_embeds: expected shape \[batch, tokens, 32\], got \[2, 8, 31\]",
    ),
    Case(
        "embeddings of another dtype",
        lambda w: w.prefill(input_ids=None, inputs_embeds=torch.zeros(2, NEW, 32).bfloat16()),
        ValueError,
        "inputs_embeds: expected dtype torch.float32 like the model, got torch.bfloat16",
    ),
    Case(
        "an empty prompt",
        lambda w: w.prefill(input_ids=w.ids[:, :0]),
        ValueError,
        r"input_ids: expected at least one new token per sequence, got shape \[2, 0\]",
    ),
    Case(
        "an empty batch",
        lambda w: w.prefill(input_ids=w.ids[:0], past_key_values=None),
        ValueError,
        r"input_ids: expected at least one new token per sequence, got shape \[0, 8\]",
    ),
    Case(
        "a mask of the new tokens only",
        lambda w: w.prefill(attention_mask=torch.ones(2, NEW)),
        ValueError,
        r"attention_mask: expected shape \[2, 13\] \(past and new tokens\), got \[2, 8\]",
    ),
    Case(
        "a mask with a hole in the new tokens",
        lambda w: w.prefill(attention_mask=ones(r1c9=0)),
        ValueError,
        "attention_mask: .*sequence 1 to be consecutive, got holes",
    ),
    Case(
        "a mask that leaves a sequence no new token",
        lambda w: w.prefill(attention_mask=torch.cat([torch.ones(2, PAST), torch.zeros(2, NEW)], 1)),
        ValueError,
        "attention_mask: expected at least one new token for sequence 0, got none",
    ),
    Case(
        "an additive mask",
        lambda w: w.prefill(attention_mask=(1 - ones(r0c0=0)) * -1e9),
        ValueError,
        "attention_mask: expected zeros and ones, got -1000000000.0",
    ),
    Case(
        "a 4-D mask",
        lambda w: w.prefill(attention_mask=torch.ones(2, 1, NEW, PAST + NEW)),
        ValueError,
        r"attention_mask: expected shape \[2, 13\] .*got \[2, 1, 8, 13\]",
    ),
    Case(
        "a mask as a list",
        lambda w: w.prefill(attention_mask=[[1] * 13] * 2),
        TypeError,
        "attention_mask: expected a tensor, got list",
    ),
    Case(
        "position ids of another width",
        lambda w: w.prefill(position_ids=torch.arange(PAST + NEW)[None]),
        ValueError,
        r"position_ids: expected shape \[2, 8\] or \[1, 8\], got \[1, 13\]",
    ),
    Case(
        "position ids as a list",
        lambda w: w.prefill(position_ids=[list(range(NEW))]),
        TypeError,
        "position_ids: expected a tensor, got list",
    ),
    Case(
        "position ids in float32",
        lambda w: w.prefill(position_ids=torch.arange(float(NEW))[None]),
        TypeError,
        "position_ids: expected int64 or int32, got torch.float32",
    ),
    Case(
        "position ids on another device",
        lambda w: w.prefill(position_ids=torch.arange(NEW, device="meta")[None]),
        ValueError,
        "position_ids: expected device cpu like the model, got meta",
    ),
    Case(
        "embeddings on another device",
        lambda w: w.prefill(input_ids=None, inputs_embeds=torch.zeros(2, NEW, 32, device="meta")),
        ValueError,
        "inputs_embeds: expected device cpu like the model, got meta",
    ),
    Case(
        "a mask on another device",
        lambda w: w.prefill(attention_mask=ones().to("meta")),
        ValueError,
        "attention_mask: expected device cpu like the model, got meta",
    ),
    Case(
        "a cache on another device",
        lambda w: w.prefill(past_key_values=changed_cache(w, to_meta)),
        ValueError,
        "past_key_values: layer 0: expected keys of torch.float32 on cpu like the model, got torch.float32 on meta",
    ),
    Case(
        "a boundary on the meta device",
        lambda w: w.prefill(boundary=torch.ones(2, dtype=torch.int64, device="meta")),
        ValueError,
        "boundary: expected a tensor with data, got one on the meta device",
    ),
    Case(
        "a boundary in a 0-d tensor",
        lambda w: w.prefill(boundary=torch.tensor(1)),
        TypeError,
        r"boundary: expected an int or one int per sequence .*got a torch.int64 tensor of shape \[\]",
    ),
    Case(
        "boundaries in float32",
        lambda w: w.prefill(boundary=torch.ones(2)),
        TypeError,
        r"boundary: expected an int or one int per sequence .*got a torch.float32 tensor of shape \[2\]",
    ),
    Case(
        "wanted logits in a 0-d tensor",
        lambda w: w.prefill(logits_to_keep=torch.tensor(1)),
        TypeError,
        r"logits_to_keep: expected an int or one int per sequence .*got a torch.int64 tensor of shape \[\]",
    ),
    Case(
        "a mask of bools as wanted logits",
        lambda w: w.prefill(logits_to_keep=torch.ones(2, dtype=torch.bool)),
        TypeError,
        r"logits_to_keep: expected an int or one int per sequence .*got a torch.bool tensor of shape \[2\]",
    ),
    Case("`boundary=0`", lambda w: w.prefill(boundary=0), ValueError, "boundary: expected at least 1, got 0"),
    Case(
        "a boundary above the new tokens",
        lambda w: w.prefill(boundary=NEW + 1),
        ValueError,
        r"boundary: expected at most 8 \(the new tokens\) for sequence 0, got 9",
    ),
    Case(
        "a boundary above the real new tokens of one sequence",
        lambda w: w.prefill(boundary=4, attention_mask=short_row()),
        ValueError,
        r"boundary: expected at most 3 \(the new tokens\) for sequence 1, got 4",
    ),
    Case(
        "boundaries for another batch",
        lambda w: w.prefill(boundary=[1, 1, 1]),
        ValueError,
        r"boundary: expected 2 values \(one per sequence\), got 3",
    ),
    Case("a boundary of 1.0", lambda w: w.prefill(boundary=1.0), TypeError, "boundary: expected an int.*got float"),
    Case(
        "`logits_to_keep=0`",
        lambda w: w.prefill(logits_to_keep=0),
        ValueError,
        "logits_to_keep: expected at least 1, got 0",
    ),
    Case(
        "more wanted logits than new tokens",
        lambda w: w.prefill(logits_to_keep=[1, NEW + 1]),
        ValueError,
        "logits_to_keep: expected at most 8 .*sequence 1, got 9",
    ),
    Case(
        "a list of tensors as a cache",
        lambda w: w.prefill(past_key_values=[]),
        TypeError,
        "past_key_values: expected a transformers Cache, got list",
    ),
    Case(
        "an offloaded cache",
        lambda w: w.prefill(past_key_values=offloaded_cache(w.model)),
        ValueError,
        "past_key_values: expected a cache on the model's device, got an offloaded one",
    ),
    Case(
        "a static cache that is too small",
        lambda w: w.prefill(past_key_values=small_static(w)),
        ValueError,
        "past_key_values: expected room for 8 positions .*got a static cache of 7",
    ),
    Case(
        "a filled static cache without room for the new tokens",
        lambda w: w.prefill(past_key_values=w.static, input_ids=w.ids.repeat(1, 2)),
        ValueError,
        "past_key_values: expected room for 21 positions .*got a static cache of 20",
    ),
    Case(
        "a cache of another dtype",
        lambda w: w.prefill(past_key_values=changed_cache(w, to_bfloat16)),
        ValueError,
        "past_key_values: layer 0: expected keys of torch.float32 on cpu like the model, got torch.bfloat16 on cpu",
    ),
    Case(
        "a cache of another batch",
        lambda w: w.prefill(past_key_values=changed_cache(w, one_sequence)),
        ValueError,
        r"past_key_values: layer 0: expected keys of \[2, 2, \*, 64\] .*got \[1, 2, 5, 64\]",
    ),
    Case(
        "a cache layer with other heads",
        lambda w: w.prefill(past_key_values=changed_cache(w, half_heads)),
        ValueError,
        r"past_key_values: layer 1: expected keys of \[2, 2, \*, 64\] .*got \[2, 1, 5, 64\]",
    ),
    Case(
        "a cache with a layer of another length",
        lambda w: w.prefill(past_key_values=changed_cache(w, shorter_layer)),
        ValueError,
        "past_key_values: layer 2: expected 5 positions like layer 0, got 4",
    ),
    Case(
        "a cache of a deeper model",
        lambda w: w.prefill(past_key_values=StaticCache(config=llama(layers=4).config, max_cache_len=20)),
        ValueError,
        "past_key_values: expected 3 layers like the model, got 4",
    ),
    Case(
        "a static cache with two layers in one memory",
        lambda w: w.prefill(past_key_values=changed_cache(w, share_layers, static=True)),
        RuntimeError,
        r"key_cache\[2\]: expected memory of its own, got memory shared with key_cache\[1\]",
    ),
    Case(
        "a static cache expanded over the batch",
        lambda w: w.prefill(past_key_values=changed_cache(w, expand_batch, static=True)),
        RuntimeError,
        r"value_cache\[0\]: expected elements that do not share memory.*stride of 0",
    ),
]


def overlapping(w: World) -> dict[str, Any]:
    """The values of layer 0 begin inside its keys."""
    buffer = torch.zeros(2 * 2 * CAPACITY * 64 + 640)
    size = 2 * 2 * CAPACITY * 64
    key, value = (buffer[at : at + size].view(2, 2, CAPACITY, 64) for at in (0, 640))
    return {"key_cache": [key, *w.op["key_cache"][1:]], "value_cache": [value, *w.op["value_cache"][1:]]}


def first_cache(w: World, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The key cache of layer 0 changed."""
    return {"key_cache": [change(w.op["key_cache"][0]), *w.op["key_cache"][1:]]}


def table(*slots: int) -> Tensor:
    """A slot table of both sequences, position by position, but for the slots given at its start."""
    rows = torch.arange(PAST + NEW, dtype=torch.int32).repeat(2, 1)
    rows[1, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
    return rows


def freed(w: World) -> int:
    return pop_ext.load(w.model, w.plan).handle  # nothing keeps the model: freed at once


OP = [
    Case(
        "a freed handle",
        lambda w: w.run_op(model=freed(w)),
        RuntimeError,
        "model: expected a handle of pop::load that was not freed, got",
    ),
    Case("a handle that never was", lambda w: w.run_op(model=-1), RuntimeError, "model: expected a handle .*got -1"),
    Case(
        "an id outside the vocabulary",
        lambda w: w.run_op(input=w.op["input"].clone().fill_(50)),
        RuntimeError,
        "pop::prefill: input: expected ids from 0 to 49, got 50 at row 0",
    ),
    Case(
        "ids in float32",
        lambda w: w.run_op(input=w.op["input"].float()),
        RuntimeError,
        "input: expected ids of dtype int64 or int32, got float32",
    ),
    Case(
        "padded ids",
        lambda w: w.run_op(input=w.ids),
        RuntimeError,
        "input .embeddings.: expected float32, bfloat16 or float16, got int64",
    ),
    Case(
        "embeddings of another width",
        lambda w: w.run_op(input=torch.zeros(16, 31)),
        RuntimeError,
        r"input \(embeddings\): expected shape \[\*, 32\], got \[16, 31\]",
    ),
    Case(
        "embeddings of another dtype",
        lambda w: w.run_op(input=torch.zeros(16, 32).bfloat16()),
        RuntimeError,
        r"input \(embeddings\): expected dtype float32, got bfloat16",
    ),
    Case(
        "input of three dimensions",
        lambda w: w.run_op(input=torch.zeros(1, 16, 32)),
        RuntimeError,
        r"input: expected ids \[rows\] or embeddings \[rows, 32\], got \[1, 16, 32\]",
    ),
    Case(
        "rows of cos for other rows",
        lambda w: w.run_op(cos=w.op["cos"][1:]),
        RuntimeError,
        r"cos: expected shape \[16, 64\] or \[16, 32\], got \[15, 64\]",
    ),
    Case(
        "sin of another width than cos",
        lambda w: w.run_op(sin=w.op["sin"][:, :32]),
        RuntimeError,
        r"sin: expected shape \[16, 64\], got \[16, 32\]",
    ),
    Case(
        "cos on another device",
        lambda w: w.run_op(cos=w.op["cos"].to("meta")),
        RuntimeError,
        "pop::prefill: cos: expected device cpu like input, got meta",
    ),
    Case(
        "a cache on another device",
        lambda w: w.run_op(**first_cache(w, lambda cache: cache.to("meta"))),
        RuntimeError,
        r"pop::prefill: key_cache\[0\]: expected device cpu like input, got meta",
    ),
    Case(
        "integer cos",
        lambda w: w.run_op(cos=w.op["cos"].int()),
        RuntimeError,
        "cos: expected float32, bfloat16 or float16, got int32",
    ),
    Case(
        "cu_seqlens in int64",
        lambda w: w.run_op(cu_seqlens=w.op["cu_seqlens"].long()),
        RuntimeError,
        "cu_seqlens: expected dtype int32, got int64",
    ),
    Case(
        "cu_seqlens that end elsewhere",
        lambda w: w.run_op(cu_seqlens=int32([0, 8, 15])),
        RuntimeError,
        r"cu_seqlens: expected to begin with 0 and end with 16 .*got 0 and 15",
    ),
    Case(
        "a sequence without a new token",
        lambda w: w.run_op(cu_seqlens=int32([0, 16, 16])),
        RuntimeError,
        "cu_seqlens: expected at least 1 new token for sequence 1, got 0",
    ),
    Case(
        "cu_seqlens that decrease",
        lambda w: w.run_op(cu_seqlens=int32([0, 18, 16])),
        RuntimeError,
        "cu_seqlens: expected at least 1 new token for sequence 1, got -2",
    ),
    Case(
        "cu_seqlens of no sequence",
        lambda w: w.run_op(cu_seqlens=int32([0])),
        RuntimeError,
        r"cu_seqlens: expected shape \[batch \+ 1\] with batch >= 1, got \[1\]",
    ),
    Case(
        "past_lens for another batch",
        lambda w: w.run_op(past_lens=int32([5])),
        RuntimeError,
        r"past_lens: expected shape \[2\], got \[1\]",
    ),
    Case(
        "a negative past",
        lambda w: w.run_op(past_lens=int32([5, -1])),
        RuntimeError,
        "past_lens: expected >= 0 for sequence 1, got -1",
    ),
    Case(
        "a negative cache_start",
        lambda w: w.run_op(cache_start=int32([-1, 0])),
        RuntimeError,
        "cache_start: expected >= 0 for sequence 0, got -1",
    ),
    Case(
        "a boundary of 0",
        lambda w: w.run_op(boundary=int32([1, 0])),
        RuntimeError,
        r"boundary: expected 1 to 8 \(the new tokens\) for sequence 1, got 0",
    ),
    Case(
        "a boundary above the new tokens",
        lambda w: w.run_op(boundary=int32([9, 1])),
        RuntimeError,
        "boundary: expected 1 to 8 .*sequence 0, got 9",
    ),
    Case(
        "a logits_to_keep of 0",
        lambda w: w.run_op(logits_to_keep=int32([0, 1])),
        RuntimeError,
        "logits_to_keep: expected 1 to 8 .*sequence 0, got 0",
    ),
    Case(
        "more wanted rows than new tokens",
        lambda w: w.run_op(logits_to_keep=int32([1, 9])),
        RuntimeError,
        "logits_to_keep: expected 1 to 8 .*sequence 1, got 9",
    ),
    Case(
        "a cache too few",
        lambda w: w.run_op(key_cache=w.op["key_cache"][:2]),
        RuntimeError,
        r"key_cache: expected 3 tensors \(one a layer\), got 2",
    ),
    Case(
        "a cache of another dtype",
        lambda w: w.run_op(**first_cache(w, Tensor.bfloat16)),
        RuntimeError,
        r"key_cache\[0\]: expected dtype float32, got bfloat16",
    ),
    Case(
        "a cache with other heads",
        lambda w: w.run_op(**first_cache(w, lambda x: x[:, :1])),
        RuntimeError,
        r"key_cache\[0\]: expected shape \[\*, 2, \*, 64\], got \[2, 1, 20, 64\]",
    ),
    Case(
        "a cache of another head_dim",
        lambda w: w.run_op(**first_cache(w, lambda x: x[..., :56])),
        RuntimeError,
        r"key_cache\[0\]: expected shape \[\*, 2, \*, 64\], got \[2, 2, 20, 56\]",
    ),
    Case(
        "a cache of another batch",
        lambda w: w.run_op(**first_cache(w, lambda x: x[:1])),
        RuntimeError,
        r"key_cache\[0\]: expected a batch of 2 \(cu_seqlens\), got 1",
    ),
    Case(
        "a cache that is too small",
        lambda w: w.run_op(**first_cache(w, lambda x: x[:, :, :12])),
        RuntimeError,
        r"key_cache\[0\]: expected capacity of at least 13 \(cache_start \+ past \+ new tokens of sequence 0\), got 12",
    ),
    Case(
        "a cache_start that leaves too little room",
        lambda w: w.run_op(cache_start=int32([0, 8])),
        RuntimeError,
        r"key_cache\[0\]: expected capacity of at least 21 .*sequence 1\), got 20",
    ),
    Case(
        "a cache with strided channels",
        lambda w: w.run_op(**first_cache(w, lambda x: x.mT.contiguous().mT)),
        RuntimeError,
        r"key_cache\[0\]: expected a contiguous last dimension \(stride 1\), got stride 20",
    ),
    Case(
        "an expanded cache (stride 0)",
        lambda w: w.run_op(**first_cache(w, lambda x: x[:1].expand(2, -1, -1, -1))),
        RuntimeError,
        r"key_cache\[0\]: expected elements that do not share memory",
    ),
    Case(
        "two layers in one memory",
        lambda w: w.run_op(**first_cache(w, lambda x: w.op["key_cache"][2])),
        RuntimeError,
        r"key_cache\[2\]: expected memory of its own, got memory shared with key_cache\[0\]",
    ),
    Case(
        "keys and values in one memory",
        lambda w: w.run_op(value_cache=[w.op["key_cache"][0], *w.op["value_cache"][1:]]),
        RuntimeError,
        r"value_cache\[0\]: expected memory of its own, got memory shared with key_cache\[0\]",
    ),
    Case(
        "caches that overlap in part",
        lambda w: w.run_op(**overlapping(w)),
        RuntimeError,
        r"value_cache\[0\]: expected memory of its own, got memory shared with key_cache\[0\]",
    ),
    Case(
        "a slot table in int64",
        lambda w: w.run_op(slot_table=table().long()),
        RuntimeError,
        "slot_table: expected int32 on cpu, got int64 on cpu",
    ),
    Case(
        "a slot table for another batch",
        lambda w: w.run_op(slot_table=table()[:1]),
        RuntimeError,
        r"slot_table: expected shape \[2, \*\], got \[1, 13\]",
    ),
    Case(
        "a slot table that is too narrow",
        lambda w: w.run_op(slot_table=table()[:, 1:]),
        RuntimeError,
        r"slot_table: expected at least 13 columns .*got 12",
    ),
    Case(
        "a slot outside the cache",
        lambda w: w.run_op(slot_table=table(20)),
        RuntimeError,
        "slot_table: expected slots from 0 to 19 for sequence 1, got 20 at position 0",
    ),
    Case(
        "two positions in one slot",
        lambda w: w.run_op(slot_table=table(1)),
        RuntimeError,
        "slot_table: expected every position of sequence 1 in a slot of its own, got slot 1 twice",
    ),
    Case(
        "a plan for another depth, to `pop::load`",
        lambda w: pop.load(w.native.spec.to_json(), Plan(4, omit=[3]).to_json(), list(w.model.parameters())),
        RuntimeError,
        "plan: expected num_layers 3 like the model, got 4",
    ),
    Case(
        "weights too few, to `pop::load`",
        lambda w: pop.load(w.native.spec.to_json(), w.plan.to_json(), [w.model.model.norm.weight]),
        RuntimeError,
        "weights: expected 29 tensors, got 1",
    ),
    Case(
        "a handle twice, to `pop::unload`",
        lambda w: pop.unload(freed(w)),
        RuntimeError,
        "pop::unload: model: expected a handle that was not freed",
    ),
]


def written_caches(**over: Any) -> dict[str, Any]:
    """A call of rope_cache_write that is right."""
    call = {
        "query": torch.zeros(3, 4, 64),
        "key": torch.zeros(3, 2, 64),
        "value": torch.zeros(3, 2, 64),
        "cos": torch.zeros(3, 64),
        "sin": torch.zeros(3, 64),
        "cu_seqlens": int32([0, 3]),
        "past_lens": int32([0]),
        "cache_start": int32([0]),
        "key_cache": torch.zeros(1, 2, 3, 64),
        "value_cache": torch.zeros(1, 2, 3, 64),
    }
    return {**call, **over}


def attended(**over: Any) -> dict[str, Any]:
    """A call of attention that is right."""
    names = ("query", "key_cache", "value_cache", "cu_seqlens", "past_lens", "cache_start")
    return {**{name: value for name, value in written_caches().items() if name in names}, "scale": 1.0, **over}


def kv_projected(**over: Any) -> dict[str, Any]:
    """A call of kv_project for two layers that is right."""
    names = ("cos", "sin", "cu_seqlens", "past_lens", "cache_start")
    call = {name: value for name, value in written_caches().items() if name in names}
    caches = torch.zeros(2, 2, 1, 2, 3, 64)
    own = {"hidden": torch.zeros(3, 9), "weight": torch.zeros(2 * 2 * 128, 9), "eps": 1e-5}
    return {**call, **own, "key_cache": list(caches[0]), "value_cache": list(caches[1]), **over}


SAME = torch.zeros(1, 2, 3, 64)

BLOCKS = [
    Case(
        "`rms_norm` with a weight of another width",
        lambda w: pop.rms_norm(torch.zeros(3, 8), torch.zeros(7), 1e-5),
        RuntimeError,
        r"pop::rms_norm: weight: expected shape \[8\], got \[7\]",
    ),
    Case(
        "`rms_norm` of integers",
        lambda w: pop.rms_norm(torch.zeros(3, 8).int(), torch.zeros(8), 1e-5),
        RuntimeError,
        "pop::rms_norm: x: expected float32, bfloat16 or float16",
    ),
    Case(
        "`rms_norm` with a weight of another dtype",
        lambda w: pop.rms_norm(torch.zeros(3, 8), torch.zeros(8).half(), 1e-5),
        RuntimeError,
        "pop::rms_norm: weight: expected dtype float32, got float16",
    ),
    Case(
        "`add_rms_norm` with a delta of another shape",
        lambda w: pop.add_rms_norm(torch.zeros(3, 8), torch.zeros(2, 8), torch.zeros(8), 1e-5),
        RuntimeError,
        r"pop::add_rms_norm: delta: expected shape \[3, 8\], got \[2, 8\]",
    ),
    Case(
        "`gated_act` with another activation",
        lambda w: pop.gated_act(torch.zeros(3, 8), torch.zeros(3, 8), "relu"),
        RuntimeError,
        "pop::gated_act: activation: expected one of silu.*got relu",
    ),
    Case(
        "`gated_act` with up of another shape",
        lambda w: pop.gated_act(torch.zeros(3, 8), torch.zeros(3, 7)),
        RuntimeError,
        r"pop::gated_act: up: expected shape \[3, 8\], got \[3, 7\]",
    ),
    Case(
        "`rope_cache_write` with keys and values in one memory",
        lambda w: pop.rope_cache_write(**written_caches(key_cache=SAME, value_cache=SAME)),
        RuntimeError,
        "pop::rope_cache_write: value_cache: expected memory of its own, got memory shared with key_cache",
    ),
    Case(
        "`rope_cache_write` with tables wider than a head",
        lambda w: pop.rope_cache_write(**written_caches(cos=torch.zeros(3, 66), sin=torch.zeros(3, 66))),
        RuntimeError,
        r"cos: expected shape \[3, rotary_dim\] with an even rotary_dim <= 64, got \[3, 66\]",
    ),
    Case(
        "`rope_cache_write` to a cache that is too small",
        lambda w: pop.rope_cache_write(**written_caches(past_lens=int32([1]))),
        RuntimeError,
        "pop::rope_cache_write: key_cache: expected capacity of at least 4 .*got 3",
    ),
    Case(
        "`attention` with a head_dim of 20",
        lambda w: pop.attention(
            **attended(
                query=torch.zeros(3, 4, 20), key_cache=torch.zeros(1, 2, 3, 20), value_cache=torch.zeros(1, 2, 3, 20)
            )
        ),
        RuntimeError,
        "pop::attention: query: expected a head_dim that is a multiple of 8 up to 256, got 20",
    ),
    Case(
        "`attention` with heads that no group divides",
        lambda w: pop.attention(**attended(query=torch.zeros(3, 3, 64))),
        RuntimeError,
        r"pop::attention: query: expected a multiple of 2 heads \(those of key_cache\), got 3",
    ),
    Case(
        "`attention` with a negative window",
        lambda w: pop.attention(**attended(window=-1)),
        RuntimeError,
        "pop::attention: window: expected .*0.*got -1",
    ),
    Case(
        "`attention` with a value cache of another shape",
        lambda w: pop.attention(**attended(value_cache=torch.zeros(1, 1, 3, 64))),
        RuntimeError,
        r"pop::attention: value_cache: expected shape \[\*, 2, \*, 64\], got \[1, 1, 3, 64\]",
    ),
    Case(
        "`kv_project` with a weight for another number of layers",
        lambda w: pop.kv_project(**kv_projected(weight=torch.zeros(256, 9))),
        RuntimeError,
        r"pop::kv_project: weight: expected shape \[512, 9\], got \[256, 9\]",
    ),
    Case(
        "`kv_project` with two layers in one memory",
        lambda w: pop.kv_project(**kv_projected(key_cache=[SAME, SAME])),
        RuntimeError,
        r"pop::kv_project: key_cache\[1\]: expected memory of its own, got memory shared with key_cache\[0\]",
    ),
    Case(
        "`kv_project` with a bias too few",
        lambda w: pop.kv_project(**kv_projected(k_bias=[torch.zeros(128)])),
        RuntimeError,
        r"pop::kv_project: k_bias: expected 2 tensors \(one a layer\), got 1",
    ),
    Case(
        "`fold_kv` with norms too few",
        lambda w: pop.fold_kv([torch.zeros(4, 8)] * 2, [torch.zeros(4, 8)] * 2, [torch.zeros(8)]),
        RuntimeError,
        "pop::fold_kv: expected k_proj, v_proj and input_norm of one length > 0, got 2, 2 and 1",
    ),
]


SCORE = [
    Case(
        "a model that is not enabled",
        lambda w: pop_ext.score(w.model, [[1]], [[2]]),
        ValueError,
        "model: expected an enabled model",
    ),
    Case(
        "fewer continuations than contexts",
        lambda w: pop_ext.score(w.model, [[1], [2]], [[2]]),
        ValueError,
        "continuation_ids: expected 2 sequences like context_ids, got 1",
        enabled,
    ),
    Case(
        "an empty continuation",
        lambda w: pop_ext.score(w.model, [[1]], [[]]),
        ValueError,
        "continuation_ids: expected at least one id for pair 0",
        enabled,
    ),
    Case(
        "an empty context",
        lambda w: pop_ext.score(w.model, [[]], [[1]]),
        ValueError,
        "context_ids: expected at least one id for pair 0",
        enabled,
    ),
    Case(
        "text in place of ids",
        lambda w: pop_ext.score(w.model, ["a"], ["b"]),
        TypeError,
        "context_ids: expected one sequence of ids per pair, got str for pair 0",
        enabled,
    ),
    Case(
        "one sequence in place of a list of them",
        lambda w: pop_ext.score(w.model, [1, 2], [3, 4]),
        TypeError,
        "context_ids: expected one sequence of ids per pair, got int for pair 0",
        enabled,
    ),
    Case(
        "ids that are no integers",
        lambda w: pop_ext.score(w.model, [[1.5]], [[2]]),
        TypeError,
        "context_ids: expected integer ids, got torch.float32 for pair 0",
        enabled,
    ),
    Case(
        "a context id outside the vocabulary",
        lambda w: pop_ext.score(w.model, [[50]], [[2]]),
        ValueError,
        "context_ids: expected ids from 0 to 49, got 50 for pair 0",
        enabled,
    ),
    Case(
        "a last id outside the vocabulary, which is never fed",
        lambda w: pop_ext.score(w.model, [[5]], [[-1]]),
        ValueError,
        "continuation_ids: expected ids from 0 to 49, got -1 for pair 0",
        enabled,
    ),
    Case(
        "a number in place of the contexts",
        lambda w: pop_ext.score(w.model, 5, [[2]]),
        TypeError,
        "context_ids: expected a list with one sequence of ids per pair, got int",
        enabled,
    ),
    Case(
        "text in place of the continuations",
        lambda w: pop_ext.score(w.model, [[1]], "b"),
        TypeError,
        "continuation_ids: expected a list with one sequence of ids per pair, got str",
        enabled,
    ),
    Case(
        "lists of different length as one context",
        lambda w: pop_ext.score(w.model, [[[1], [2, 3]]], [[2]]),
        TypeError,
        "context_ids: expected one sequence of integer ids per pair, for pair 0",
        enabled,
    ),
    Case(
        "ids on the meta device",
        lambda w: pop_ext.score(w.model, [torch.ones(3, dtype=torch.int64, device="meta")], [[2]]),
        TypeError,
        "context_ids: expected one sequence of integer ids per pair, for pair 0",
        enabled,
    ),
    Case(
        "`batch_size=2.0`",
        lambda w: pop_ext.score(w.model, [[1]], [[2]], batch_size=2.0),
        TypeError,
        "batch_size: expected an int, got float 2.0",
        enabled,
    ),
    Case(
        "`batch_size=True`",
        lambda w: pop_ext.score(w.model, [[1]], [[2]], batch_size=True),
        TypeError,
        "batch_size: expected an int, got bool True",
        enabled,
    ),
    Case(
        "`batch_size=0`",
        lambda w: pop_ext.score(w.model, [[1]], [[2]], batch_size=0),
        ValueError,
        "batch_size: expected at least 1, got 0",
        enabled,
    ),
]

SECTIONS = {
    "`pop_ext.Plan`": PLAN,
    "`pop_ext.load` and `pop_ext.enable`": LOAD,
    "An enabled model": ENABLED,
    "`native.prefill`": PREFILL,
    "`torch.ops.pop.prefill`, `load` and `unload`": OP,
    "The building blocks of `torch.ops.pop`": BLOCKS,
    "`pop_ext.score`": SCORE,
}
