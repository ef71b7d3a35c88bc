"""The model and caches that a bad call must not change, and the dataclass of a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pop_ext
import torch
from models import llama, tokens
from op_calls import op_call, run_op
from pop_ext import Plan
from torch import Tensor
from transformers import DynamicCache, StaticCache

pop = torch.ops.pop
LAYERS, PAST, NEW, CAPACITY = 3, 5, 8, 20


class Fixture:
    """A loaded model and filled caches of every kind, which a bad call must not change."""

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
        """Return address, shape and bytes of every tensor, and the lengths of the caches."""
        state = [(x.data_ptr(), tuple(x.shape), bytes_of(x)) for x in self.tensors() if x.device.type != "meta"]
        lengths = tuple(int(cache.get_seq_length()) for cache in (self.dynamic, self.static))
        return [*state, (0, lengths, b"")]


def bytes_of(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Case:
    """A bad call and the error that it must get.

    Attributes:
        given: what is passed, for the id of the test and the first column of docs/bad-input.md.
        call: makes the bad call.
        error: expected type of the error.
        text: regular expression for the message: the argument, what was expected, what came.
        prepare: runs first; its changes are part of the state before the call.
        on_cuda: False if the case applies to CPU models only, for example because values in CUDA memory are not
            checked.
    """

    given: str
    call: Callable[[Fixture], Any]
    error: type[Exception]
    text: str
    prepare: Callable[[Fixture], Any] | None = None
    on_cuda: bool = True


def ones(**values: int) -> Tensor:
    """Return a mask of ones. Keywords set single elements: ones(r1c6=0) masks row 1, column 6."""
    mask = torch.ones(2, PAST + NEW, dtype=torch.long)
    for place, value in values.items():
        row, column = place.removeprefix("r").split("c")
        mask[int(row), int(column)] = value
    return mask
