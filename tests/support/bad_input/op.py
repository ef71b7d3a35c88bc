"""Cases of `torch.ops.pop.prefill`, `load` and `unload`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pop_ext
import torch
from op_calls import int32
from pop_ext import Plan
from torch import Tensor

from bad_input.fixture import CAPACITY, NEW, PAST, Case, Fixture, pop


def overlapping(f: Fixture) -> dict[str, Any]:
    """Return caches in which the values of layer 0 begin inside its keys."""
    buffer = torch.zeros(2 * 2 * CAPACITY * 64 + 640)
    size = 2 * 2 * CAPACITY * 64
    key, value = (buffer[at : at + size].view(2, 2, CAPACITY, 64) for at in (0, 640))
    return {"key_cache": [key, *f.op["key_cache"][1:]], "value_cache": [value, *f.op["value_cache"][1:]]}


def first_cache(f: Fixture, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return key caches with the one of layer 0 changed."""
    return {"key_cache": [change(f.op["key_cache"][0]), *f.op["key_cache"][1:]]}


def table(*slots: int) -> Tensor:
    """Return the identity slot table of both sequences; `slots` replace the first ones of sequence 1."""
    rows = torch.arange(PAST + NEW, dtype=torch.int32, device="cpu").repeat(2, 1)
    rows[1, : len(slots)] = int32(slots)
    return rows


def no_features(f: Fixture) -> Tensor:
    """Return an index that points to no row of features."""
    return torch.full_like(f.op["input"], -1)


def freed(f: Fixture) -> int:
    return pop_ext.load(f.model, f.plan).handle  # freed at once: nothing keeps a reference


LENGTHS = ("cu_seqlens", "past_lens", "cache_start", "boundary", "logits_to_keep")

OP = [
    Case(
        "a freed handle",
        lambda f: f.run_op(model=freed(f)),
        RuntimeError,
        "model: expected a handle of pop::load that was not freed, got",
    ),
    Case(
        "a handle that was never returned",
        lambda f: f.run_op(model=-1),
        RuntimeError,
        "model: expected a handle .*got -1",
    ),
    Case(
        "an id outside the vocabulary",
        lambda f: f.run_op(input=f.op["input"].clone().fill_(50)),
        RuntimeError,
        "pop::prefill: input: expected ids from 0 to 49, got 50 at row 0",
        on_cuda=False,
    ),
    Case(
        "ids in float32",
        lambda f: f.run_op(input=f.op["input"].float()),
        RuntimeError,
        "input: expected ids of dtype int64 or int32, got float32",
    ),
    Case(
        "padded ids",
        lambda f: f.run_op(input=f.ids),
        RuntimeError,
        "input .embeddings.: expected float32, bfloat16 or float16, got int64",
    ),
    Case(
        "embeddings of another width",
        lambda f: f.run_op(input=torch.zeros(16, 31)),
        RuntimeError,
        r"input \(embeddings\): expected shape \[\*, 32\], got \[16, 31\]",
    ),
    Case(
        "embeddings of another dtype",
        lambda f: f.run_op(input=torch.zeros(16, 32).bfloat16()),
        RuntimeError,
        r"input \(embeddings\): expected dtype float32, got bfloat16",
    ),
    Case(
        "input of three dimensions",
        lambda f: f.run_op(input=torch.zeros(1, 16, 32)),
        RuntimeError,
        r"input: expected ids \[rows\] or embeddings \[rows, 32\], got \[1, 16, 32\]",
    ),
    Case(
        "cos for another number of rows",
        lambda f: f.run_op(cos=f.op["cos"][1:]),
        RuntimeError,
        r"cos: expected shape \[16, 64\] or \[16, 32\], got \[15, 64\]",
    ),
    Case(
        "sin of another width than cos",
        lambda f: f.run_op(sin=f.op["sin"][:, :32]),
        RuntimeError,
        r"sin: expected shape \[16, 64\], got \[16, 32\]",
    ),
    Case(
        "cos on another device",
        lambda f: f.run_op(cos=f.op["cos"].to("meta")),
        RuntimeError,
        "pop::prefill: cos: expected device cpu like input, got meta",
    ),
    Case(
        "a cache on another device",
        lambda f: f.run_op(**first_cache(f, lambda cache: cache.to("meta"))),
        RuntimeError,
        r"pop::prefill: key_cache\[0\]: expected device cpu like input, got meta",
    ),
    Case(
        "integer cos",
        lambda f: f.run_op(cos=f.op["cos"].int()),
        RuntimeError,
        "cos: expected float32, bfloat16 or float16, got int32",
    ),
    *[
        Case(
            f"{name} on another device",
            lambda f, name=name: f.run_op(**{name: f.op[name].to("meta")}),
            RuntimeError,
            rf"pop::prefill: {name}: expected a tensor on the CPU \(the operator never synchronises\), got meta",
        )
        for name in LENGTHS
    ],
    *[
        Case(
            f"None as {name}",
            lambda f, name=name: f.run_op(**{name: None}),
            RuntimeError,
            f"pop::prefill: {name}: expected a tensor, got None",
        )
        for name in ("input", "sin", *LENGTHS[:2])
    ],
    Case(
        "cu_seqlens in int64",
        lambda f: f.run_op(cu_seqlens=f.op["cu_seqlens"].long()),
        RuntimeError,
        "cu_seqlens: expected dtype int32, got int64",
    ),
    Case(
        "cu_seqlens that end elsewhere",
        lambda f: f.run_op(cu_seqlens=int32([0, 8, 15])),
        RuntimeError,
        r"cu_seqlens: expected to begin with 0 and end with 16 .*got 0 and 15",
    ),
    Case(
        "a sequence without new tokens",
        lambda f: f.run_op(cu_seqlens=int32([0, 16, 16])),
        RuntimeError,
        "cu_seqlens: expected at least 1 new token for sequence 1, got 0",
    ),
    Case(
        "cu_seqlens that decrease",
        lambda f: f.run_op(cu_seqlens=int32([0, 18, 16])),
        RuntimeError,
        "cu_seqlens: expected at least 1 new token for sequence 1, got -2",
    ),
    Case(
        "cu_seqlens of no sequence",
        lambda f: f.run_op(cu_seqlens=int32([0])),
        RuntimeError,
        r"cu_seqlens: expected shape \[batch \+ 1\] with batch >= 1, got \[1\]",
    ),
    Case(
        "past_lens for another batch",
        lambda f: f.run_op(past_lens=int32([5])),
        RuntimeError,
        r"past_lens: expected shape \[2\], got \[1\]",
    ),
    Case(
        "a negative past",
        lambda f: f.run_op(past_lens=int32([5, -1])),
        RuntimeError,
        "past_lens: expected >= 0 for sequence 1, got -1",
    ),
    Case(
        "a negative cache_start",
        lambda f: f.run_op(cache_start=int32([-1, 0])),
        RuntimeError,
        "cache_start: expected >= 0 for sequence 0, got -1",
    ),
    Case(
        "a boundary of 0",
        lambda f: f.run_op(boundary=int32([1, 0])),
        RuntimeError,
        r"boundary: expected 1 to 8 \(the new tokens\) for sequence 1, got 0",
    ),
    Case(
        "a boundary above the new tokens",
        lambda f: f.run_op(boundary=int32([9, 1])),
        RuntimeError,
        "boundary: expected 1 to 8 .*sequence 0, got 9",
    ),
    Case(
        "a logits_to_keep of 0",
        lambda f: f.run_op(logits_to_keep=int32([0, 1])),
        RuntimeError,
        "logits_to_keep: expected 1 to 8 .*sequence 0, got 0",
    ),
    Case(
        "a logits_to_keep above the new tokens",
        lambda f: f.run_op(logits_to_keep=int32([1, 9])),
        RuntimeError,
        "logits_to_keep: expected 1 to 8 .*sequence 1, got 9",
    ),
    Case(
        "one key cache missing",
        lambda f: f.run_op(key_cache=f.op["key_cache"][:2]),
        RuntimeError,
        r"key_cache: expected 3 tensors \(one a layer\), got 2",
    ),
    Case(
        "a cache of another dtype",
        lambda f: f.run_op(**first_cache(f, Tensor.bfloat16)),
        RuntimeError,
        r"key_cache\[0\]: expected dtype float32, got bfloat16",
    ),
    Case(
        "a cache with other heads",
        lambda f: f.run_op(**first_cache(f, lambda x: x[:, :1])),
        RuntimeError,
        r"key_cache\[0\]: expected shape \[\*, 2, \*, 64\], got \[2, 1, 20, 64\]",
    ),
    Case(
        "a cache of another head_dim",
        lambda f: f.run_op(**first_cache(f, lambda x: x[..., :56])),
        RuntimeError,
        r"key_cache\[0\]: expected shape \[\*, 2, \*, 64\], got \[2, 2, 20, 56\]",
    ),
    Case(
        "a cache of another batch",
        lambda f: f.run_op(**first_cache(f, lambda x: x[:1])),
        RuntimeError,
        r"key_cache\[0\]: expected a batch of 2 \(cu_seqlens\), got 1",
    ),
    Case(
        "a cache that is too small",
        lambda f: f.run_op(**first_cache(f, lambda x: x[:, :, :12])),
        RuntimeError,
        r"key_cache\[0\]: expected capacity of at least 13 \(cache_start \+ past \+ new tokens of sequence 0\), got 12",
    ),
    Case(
        "a cache_start that leaves too little room",
        lambda f: f.run_op(cache_start=int32([0, 8])),
        RuntimeError,
        r"key_cache\[0\]: expected capacity of at least 21 .*sequence 1\), got 20",
    ),
    Case(
        "a cache with strided channels",
        lambda f: f.run_op(**first_cache(f, lambda x: x.mT.contiguous().mT)),
        RuntimeError,
        r"key_cache\[0\]: expected a contiguous last dimension \(stride 1\), got stride 20",
    ),
    Case(
        "an expanded cache (stride 0)",
        lambda f: f.run_op(**first_cache(f, lambda x: x[:1].expand(2, -1, -1, -1))),
        RuntimeError,
        r"key_cache\[0\]: expected elements that do not share memory",
    ),
    Case(
        "two layers in the same memory",
        lambda f: f.run_op(**first_cache(f, lambda x: f.op["key_cache"][2])),
        RuntimeError,
        r"key_cache\[2\]: expected memory of its own, got memory shared with key_cache\[0\]",
    ),
    Case(
        "keys and values in the same memory",
        lambda f: f.run_op(value_cache=[f.op["key_cache"][0], *f.op["value_cache"][1:]]),
        RuntimeError,
        r"value_cache\[0\]: expected memory of its own, got memory shared with key_cache\[0\]",
    ),
    Case(
        "caches that overlap partly",
        lambda f: f.run_op(**overlapping(f)),
        RuntimeError,
        r"value_cache\[0\]: expected memory of its own, got memory shared with key_cache\[0\]",
    ),
    Case(
        "a slot table in int64",
        lambda f: f.run_op(slot_table=table().long()),
        RuntimeError,
        "slot_table: expected int32 on cpu, got int64 on cpu",
    ),
    Case(
        "a slot table on another device",
        lambda f: f.run_op(slot_table=table().to("meta")),
        RuntimeError,
        "pop::prefill: slot_table: expected a tensor on the CPU .*, got meta",
    ),
    Case(
        "a slot table for another batch",
        lambda f: f.run_op(slot_table=table()[:1]),
        RuntimeError,
        r"slot_table: expected shape \[2, \*\], got \[1, 13\]",
    ),
    Case(
        "a slot table that is too narrow",
        lambda f: f.run_op(slot_table=table()[:, 1:]),
        RuntimeError,
        r"slot_table: expected at least 13 columns .*got 12",
    ),
    Case(
        "a slot outside the cache",
        lambda f: f.run_op(slot_table=table(20)),
        RuntimeError,
        "slot_table: expected slots from 0 to 19 for sequence 1, got 20 at position 0",
    ),
    Case(
        "two positions in one slot",
        lambda f: f.run_op(slot_table=table(1)),
        RuntimeError,
        "slot_table: expected every position of sequence 1 in a slot of its own, got slot 1 twice",
    ),
    *[
        Case(f"blocks {given}", lambda f, blocks=blocks: f.run_op(blocks=blocks()), RuntimeError, "blocks: " + text)
        for given, blocks, text in (
            ("in int64", lambda: int32([[0, 0, 2]]).long(), "expected int32 on cpu, got int64 on cpu"),
            ("of pairs", lambda: int32([[0, 2]]), r"expected shape \[\*, 3\], got \[1, 2\]"),
            ("of another sequence", lambda: int32([[2, 0, 2]]), "expected sequences from 0 to 1, got 2"),
            (
                "beyond the new tokens",
                lambda: int32([[1, 3, 9]]),
                r"expected 0 <= begin < end <= 8 \(the new tokens\) for sequence 1, got 3 and 9",
            ),
            (
                "that overlap",
                lambda: int32([[0, 0, 3], [0, 2, 4]]),
                "expected ascending blocks that do not overlap, got 2 to 4 of sequence 0 in row 1",
            ),
            (
                "around the boundary",
                lambda: int32([[0, 5, 8]]),
                r"expected no boundary inside a block \(widen it to 3\), got 1 for sequence 0",
            ),
        )
    ],
    Case(
        "features without an index",
        lambda f: f.run_op(features=[torch.zeros(1, 32)]),
        RuntimeError,
        r"feature_index: expected a table \(features are given\), got none",
    ),
    Case(
        "features of another width",
        lambda f: f.run_op(features=[torch.zeros(1, 31)], feature_index=no_features(f)),
        RuntimeError,
        r"features\[0\]: expected shape \[1, 32\], got \[1, 31\]",
    ),
    Case(
        "features of more layers than there are",
        lambda f: f.run_op(features=[torch.zeros(1, 32)] * 4, feature_index=no_features(f)),
        RuntimeError,
        r"features: expected at most 3 tensors \(one for each of the first layers\), got 4",
    ),
    Case(
        "an index beyond the features",
        lambda f: f.run_op(features=[torch.zeros(1, 32)], feature_index=no_features(f) + 2),
        RuntimeError,
        r"feature_index: expected -1 to 0 \(rows of features\), got 1 at row 0",
        on_cuda=False,
    ),
    Case(
        "an index for fewer rows",
        lambda f: f.run_op(features=[torch.zeros(1, 32)], feature_index=no_features(f)[1:]),
        RuntimeError,
        r"feature_index: expected shape \[16\], got \[15\]",
    ),
    Case(
        "a plan for another depth, to `pop::load`",
        lambda f: pop.load(f.native.spec.to_json(), Plan(4, omit=[3]).to_json(), list(f.model.parameters())),
        RuntimeError,
        "plan: expected num_layers 3 like the model, got 4",
    ),
    Case(
        "too few weights, to `pop::load`",
        lambda f: pop.load(f.native.spec.to_json(), f.plan.to_json(), [f.model.model.norm.weight]),
        RuntimeError,
        "weights: expected 29 tensors, got 1",
    ),
    Case(
        "`load` with `fp8` and `prepack`",
        lambda f: pop.load(f.native.spec.to_json(), f.plan.to_json(), list(f.model.parameters()), None, True, True),
        RuntimeError,
        "pop::load: prepack: expected False with fp8=True, got True",
    ),
    Case(
        "`load` with `fp8` and `int8`",
        lambda f: pop.load(
            f.native.spec.to_json(), f.plan.to_json(), list(f.model.parameters()), None, True, int8=True
        ),
        RuntimeError,
        "pop::load: int8: expected False with fp8=True, got True",
    ),
    Case(
        "a freed handle, to `pop::unload`",
        lambda f: pop.unload(freed(f)),
        RuntimeError,
        "pop::unload: model: expected a handle that was not freed",
    ),
]
