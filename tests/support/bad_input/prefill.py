"""Cases of `native.prefill`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from models import llama, offloaded_cache
from torch import Tensor
from transformers import StaticCache

from bad_input.fixture import NEW, PAST, Case, Fixture, ones


def short_row() -> Tensor:
    """Return a mask that leaves three new tokens in sequence 1."""
    mask = torch.ones(2, PAST + NEW, dtype=torch.long)
    mask[1, PAST : PAST + NEW - 3] = 0
    return mask


def small_static(f: Fixture) -> StaticCache:
    return StaticCache(config=f.model.config, max_cache_len=NEW - 1)


def changed_cache(f: Fixture, change: Callable[[Any], None], static: bool = False) -> Any:
    """Return a copy of a cache of the fixture, with `change` applied to its layers."""
    cache = copy.deepcopy(f.static if static else f.dynamic)
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
    Case("no input", lambda f: f.prefill(input_ids=None), ValueError, "input_ids: expected exactly one .*got none"),
    Case(
        "ids and embeddings",
        lambda f: f.prefill(inputs_embeds=torch.zeros(2, NEW, 32)),
        ValueError,
        "input_ids: expected exactly one of input_ids and inputs_embeds, got both",
    ),
    Case(
        "ids as a list",
        lambda f: f.prefill(input_ids=[[1, 2]]),
        TypeError,
        "input_ids: expected a tensor, got list",
    ),
    Case(
        "ids without a batch dimension",
        lambda f: f.prefill(input_ids=f.ids[0]),
        ValueError,
        r"input_ids: expected shape \[batch, tokens\], got \[8\]",
    ),
    Case(
        "ids in float32",
        lambda f: f.prefill(input_ids=f.ids.float()),
        TypeError,
        "input_ids: expected int64 or int32 ids, got torch.float32",
    ),
    Case(
        "an id outside the vocabulary",
        lambda f: f.prefill(input_ids=f.ids.clone().fill_(50)),
        ValueError,
        "input_ids: expected ids from 0 to 49, got 50",
    ),
    Case(
        "a negative id",
        lambda f: f.prefill(input_ids=-1 - f.ids),
        ValueError,
        "input_ids: expected ids from 0 to 49, got -",
    ),
    Case(
        "ids on another device",
        lambda f: f.prefill(input_ids=f.ids.to("meta")),
        ValueError,
        "input_ids: expected device cpu like the model, got meta",
    ),
    Case(
        "embeddings of another width",
        lambda f: f.prefill(input_ids=None, inputs_embeds=torch.zeros(2, NEW, 31)),
        ValueError,
        r"inputs_embeds: expected shape \[batch, tokens, 32\], got \[2, 8, 31\]",
    ),
    Case(
        "embeddings of another dtype",
        lambda f: f.prefill(input_ids=None, inputs_embeds=torch.zeros(2, NEW, 32).bfloat16()),
        ValueError,
        "inputs_embeds: expected dtype torch.float32 like the model, got torch.bfloat16",
    ),
    Case(
        "an empty prompt",
        lambda f: f.prefill(input_ids=f.ids[:, :0]),
        ValueError,
        r"input_ids: expected at least one new token per sequence, got shape \[2, 0\]",
    ),
    Case(
        "an empty batch",
        lambda f: f.prefill(input_ids=f.ids[:0], past_key_values=None),
        ValueError,
        r"input_ids: expected at least one new token per sequence, got shape \[0, 8\]",
    ),
    Case(
        "a mask of the new tokens only",
        lambda f: f.prefill(attention_mask=torch.ones(2, NEW)),
        ValueError,
        r"attention_mask: expected shape \[2, 13\] \(past and new tokens\), got \[2, 8\]",
    ),
    Case(
        "a mask with a hole in the new tokens",
        lambda f: f.prefill(attention_mask=ones(r1c9=0)),
        ValueError,
        "attention_mask: .*sequence 1 to be consecutive, got holes",
    ),
    Case(
        "a mask that leaves a sequence no new token",
        lambda f: f.prefill(attention_mask=torch.cat([torch.ones(2, PAST), torch.zeros(2, NEW)], 1)),
        ValueError,
        "attention_mask: expected at least one new token for sequence 0, got none",
    ),
    Case(
        "an additive mask",
        lambda f: f.prefill(attention_mask=(1 - ones(r0c0=0)) * -1e9),
        ValueError,
        "attention_mask: expected zeros and ones, got -1000000000.0",
    ),
    Case(
        "a 4-D mask",
        lambda f: f.prefill(attention_mask=torch.ones(2, 1, NEW, PAST + NEW)),
        ValueError,
        r"attention_mask: expected shape \[2, 13\] .*got \[2, 1, 8, 13\]",
    ),
    Case(
        "a mask as a list",
        lambda f: f.prefill(attention_mask=[[1] * 13] * 2),
        TypeError,
        "attention_mask: expected a tensor, got list",
    ),
    Case(
        "position ids of another width",
        lambda f: f.prefill(position_ids=torch.arange(PAST + NEW)[None]),
        ValueError,
        r"position_ids: expected shape \[2, 8\] or \[1, 8\], got \[1, 13\]",
    ),
    Case(
        "position ids as a list",
        lambda f: f.prefill(position_ids=[list(range(NEW))]),
        TypeError,
        "position_ids: expected a tensor, got list",
    ),
    Case(
        "position ids in float32",
        lambda f: f.prefill(position_ids=torch.arange(float(NEW))[None]),
        TypeError,
        "position_ids: expected int64 or int32, got torch.float32",
    ),
    Case(
        "position ids on another device",
        lambda f: f.prefill(position_ids=torch.arange(NEW, device="meta")[None]),
        ValueError,
        "position_ids: expected device cpu like the model, got meta",
    ),
    Case(
        "embeddings on another device",
        lambda f: f.prefill(input_ids=None, inputs_embeds=torch.zeros(2, NEW, 32, device="meta")),
        ValueError,
        "inputs_embeds: expected device cpu like the model, got meta",
    ),
    Case(
        "a mask on another device",
        lambda f: f.prefill(attention_mask=ones().to("meta")),
        ValueError,
        "attention_mask: expected device cpu like the model, got meta",
    ),
    Case(
        "a cache on another device",
        lambda f: f.prefill(past_key_values=changed_cache(f, to_meta)),
        ValueError,
        "past_key_values: layer 0: expected keys of torch.float32 on cpu like the model, got torch.float32 on meta",
    ),
    Case(
        "a boundary on the meta device",
        lambda f: f.prefill(boundary=torch.ones(2, dtype=torch.int64, device="meta")),
        ValueError,
        "boundary: expected a tensor with data, got one on the meta device",
    ),
    Case(
        "a boundary as a 0-d tensor",
        lambda f: f.prefill(boundary=torch.tensor(1)),
        TypeError,
        r"boundary: expected an int or one int per sequence .*got a torch.int64 tensor of shape \[\]",
    ),
    Case(
        "boundaries in float32",
        lambda f: f.prefill(boundary=torch.ones(2)),
        TypeError,
        r"boundary: expected an int or one int per sequence .*got a torch.float32 tensor of shape \[2\]",
    ),
    Case(
        "`logits_to_keep` as a 0-d tensor",
        lambda f: f.prefill(logits_to_keep=torch.tensor(1)),
        TypeError,
        r"logits_to_keep: expected an int or one int per sequence .*got a torch.int64 tensor of shape \[\]",
    ),
    Case(
        "`logits_to_keep` as a bool tensor",
        lambda f: f.prefill(logits_to_keep=torch.ones(2, dtype=torch.bool)),
        TypeError,
        r"logits_to_keep: expected an int or one int per sequence .*got a torch.bool tensor of shape \[2\]",
    ),
    Case("`boundary=0`", lambda f: f.prefill(boundary=0), ValueError, "boundary: expected at least 1, got 0"),
    Case(
        "a boundary above the new tokens",
        lambda f: f.prefill(boundary=NEW + 1),
        ValueError,
        r"boundary: expected at most 8 \(the new tokens\) for sequence 0, got 9",
    ),
    Case(
        "a boundary above the real new tokens of one sequence",
        lambda f: f.prefill(boundary=4, attention_mask=short_row()),
        ValueError,
        r"boundary: expected at most 3 \(the new tokens\) for sequence 1, got 4",
    ),
    Case(
        "boundaries for another batch",
        lambda f: f.prefill(boundary=[1, 1, 1]),
        ValueError,
        r"boundary: expected 2 values \(one per sequence\), got 3",
    ),
    Case("a boundary of 1.0", lambda f: f.prefill(boundary=1.0), TypeError, "boundary: expected an int.*got float"),
    Case(
        "`logits_to_keep=0`",
        lambda f: f.prefill(logits_to_keep=0),
        ValueError,
        "logits_to_keep: expected at least 1, got 0",
    ),
    Case(
        "`logits_to_keep` above the new tokens",
        lambda f: f.prefill(logits_to_keep=[1, NEW + 1]),
        ValueError,
        "logits_to_keep: expected at most 8 .*sequence 1, got 9",
    ),
    Case(
        "a list of tensors as a cache",
        lambda f: f.prefill(past_key_values=[]),
        TypeError,
        "past_key_values: expected a transformers Cache, got list",
    ),
    Case(
        "an offloaded cache",
        lambda f: f.prefill(past_key_values=offloaded_cache(f.model)),
        ValueError,
        "past_key_values: expected a cache on the model's device, got an offloaded one",
    ),
    Case(
        "a static cache that is too small",
        lambda f: f.prefill(past_key_values=small_static(f)),
        ValueError,
        "past_key_values: expected room for 8 positions .*got a static cache of 7",
    ),
    Case(
        "a filled static cache without room for the new tokens",
        lambda f: f.prefill(past_key_values=f.static, input_ids=f.ids.repeat(1, 2)),
        ValueError,
        "past_key_values: expected room for 21 positions .*got a static cache of 20",
    ),
    Case(
        "a cache of another dtype",
        lambda f: f.prefill(past_key_values=changed_cache(f, to_bfloat16)),
        ValueError,
        "past_key_values: layer 0: expected keys of torch.float32 on cpu like the model, got torch.bfloat16 on cpu",
    ),
    Case(
        "a cache of another batch",
        lambda f: f.prefill(past_key_values=changed_cache(f, one_sequence)),
        ValueError,
        r"past_key_values: layer 0: expected keys of \[2, 2, \*, 64\] .*got \[1, 2, 5, 64\]",
    ),
    Case(
        "a cache layer with other heads",
        lambda f: f.prefill(past_key_values=changed_cache(f, half_heads)),
        ValueError,
        r"past_key_values: layer 1: expected keys of \[2, 2, \*, 64\] .*got \[2, 1, 5, 64\]",
    ),
    Case(
        "a cache with a layer of another length",
        lambda f: f.prefill(past_key_values=changed_cache(f, shorter_layer)),
        ValueError,
        "past_key_values: layer 2: expected 5 positions like layer 0, got 4",
    ),
    Case(
        "a cache of a deeper model",
        lambda f: f.prefill(past_key_values=StaticCache(config=llama(layers=4).config, max_cache_len=20)),
        ValueError,
        "past_key_values: expected 3 layers like the model, got 4",
    ),
    Case(
        "a static cache with two layers in the same memory",
        lambda f: f.prefill(past_key_values=changed_cache(f, share_layers, static=True)),
        RuntimeError,
        r"key_cache\[2\]: expected memory of its own, got memory shared with key_cache\[1\]",
    ),
    Case(
        "a static cache expanded over the batch",
        lambda f: f.prefill(past_key_values=changed_cache(f, expand_batch, static=True)),
        RuntimeError,
        r"value_cache\[0\]: expected elements that do not share memory.*stride of 0",
    ),
]
