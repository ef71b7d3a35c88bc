"""Run a step of continuous batching natively: gather the past of its requests from the pages, prefill, write back.

The operator takes caches of whole sequences, and refuses layers that share memory, as those of transformers' pages do.
So K and V of the step's requests lie in a cache of their own for the time of the call, ``[requests, positions,
kv_heads, head_dim]`` for each layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pop_ext import ops
from pop_ext.hf.architectures import decoder_of
from pop_ext.hf.decision import Decline
from pop_ext.hf.inputs import PrefillRequest
from pop_ext.hf.native_model import NativeModel, PrefillOutput
from pop_ext.hf.operator_call import rope_tables, run_operator
from pop_ext.hf.packed_step import RULE, PackedStep
from pop_ext.hf.packing import PackedBatch
from pop_ext.hf.restore import module_restored_on_error
from pop_ext.utils.forks import check_threads

MOST_PADDING = 4
"""Largest ratio of the cache's positions to those in use. Few long requests that decode beside many short chunks would
take memory for all of them."""


@dataclass(frozen=True)
class _Group:
    """Where the requests of a step lie in the pages of some layers, and in the cache of the call.

    Attributes:
        read, past: int64, places of the positions before the step: in the pages, and in the flattened cache.
        write, new: the same of the step's own rows.
        pages: K and V of each layer, ``[slots, kv_heads, head_dim]`` each.
    """

    read: Tensor
    past: Tensor
    write: Tensor
    new: Tensor
    pages: dict[int, tuple[Tensor, Tensor]]


class NativeStep:
    """Run one step on a loaded model.

    Raises:
        Decline: The step or its pages have a form that this does not know.
    """

    def __init__(self, native: NativeModel, step: PackedStep) -> None:
        self._native, self._arguments = native, step.arguments
        self._tokens, self._boundary = (list(filter(None, counts)) for counts in (step.tokens, step.boundary))
        if native.device.type != "cpu":
            raise Decline(RULE, "native steps of continuous batching on a GPU have never run")
        if native.family.vision is not None or "logits_to_keep" not in self._arguments:
            raise Decline(RULE, "native steps of continuous batching are of models of text that take logits_to_keep")
        firsts = [0, *accumulate(self._tokens)]
        self._ends = firsts[1:]
        self._past: list[int] = self._arguments["position_ids"][0][firsts[:-1]].tolist()
        lengths = [past + new for past, new in zip(self._past, self._tokens, strict=True)]
        self._capacity = max(lengths)
        if self._capacity * len(lengths) > MOST_PADDING * sum(lengths):
            raise Decline(RULE, f"requests of {min(lengths)} to {self._capacity} positions in one step")
        self._groups = [self._group_of(allocator) for allocator in self._allocators()]

    def _allocators(self) -> list[Any]:
        """Return the objects of the paged cache that know where the K and V of each kind of layer lie."""
        allocators = getattr(self._arguments["cache"], "cache_allocators", None)
        found = list(allocators.values()) if isinstance(allocators, dict) else []
        if not found or any(not hasattr(one, "_kv_token_views") for one in found):
            raise Decline(RULE, "pages of another version than those of transformers 5.24")
        return found

    def _group_of(self, allocator: Any) -> _Group:
        device = self._native.device
        read: Tensor = self._arguments["read_index"][allocator.index]
        write: Tensor = self._arguments["write_index"][allocator.index][: self._ends[-1]]
        window = getattr(allocator, "sliding_window", None)
        kept: list[int] = []
        past: list[int] = []
        new: list[int] = []
        at = 0
        for row, (before, count) in enumerate(zip(self._past, self._tokens, strict=True)):
            held = before if window is None else min(before, window - 1)
            start = row * self._capacity + before
            kept += range(at, at + held)
            past += range(start - held, start)
            new += range(start, start + count)
            at += held + count
        index = [torch.tensor(places, dtype=torch.int64, device=device) for places in (kept, past, new)]
        if kept and at > read.shape[0]:
            raise Decline(RULE, f"pages of another version: expected at least {at} places to read, got {read.shape[0]}")
        return _Group(read[index[0]], index[1], write, index[2], allocator._kv_token_views)

    def run(self) -> PrefillOutput:
        """Run the step. After an error transformers frees the pages of all its requests.

        Raises:
            RuntimeError: The operator failed, or the process was forked from one with OpenMP threads.
        """
        native, loaded = self._native, self._native._loaded
        check_threads()
        rows = self._arguments["input_ids"][0, : self._ends[-1]]
        flat = self._gathered()
        shape = (len(self._tokens), self._capacity, loaded.spec.num_kv_heads, loaded.spec.head_dim)
        keys, values = ([pair[kind].view(shape).transpose(1, 2) for pair in flat] for kind in (0, 1))
        request = self._request(rows)
        rotary = decoder_of(native.model).rotary_emb
        try:
            with module_restored_on_error(rotary):
                tables = rope_tables(loaded, rotary, request.positions)
            hidden = run_operator(loaded, request, False, rows, tables, keys, values)
        except RuntimeError as error:
            ops.raise_interrupt(error)
            raise
        for group in self._groups:
            for layer, pages in group.pages.items():
                for mine, page in zip(flat[layer], pages, strict=True):
                    page.index_copy_(0, group.write, mine.index_select(0, group.new))
        logits = native.logits_of(hidden[self._wanted()])[None]
        return PrefillOutput(logits, hidden, self._arguments["cache"])

    def _gathered(self) -> list[tuple[Tensor, Tensor]]:
        """Return K and V of each layer, flattened, with the past of each request that the pages hold."""
        spec = self._native.spec
        shape = (len(self._tokens) * self._capacity, spec.num_kv_heads, spec.head_dim)
        flat: dict[int, tuple[Tensor, Tensor]] = {}
        for group in self._groups:
            # Positions before a window stay as they are made: an attention may read them, to weigh them with zero.
            new = torch.zeros if any(spec.window[layer] > 0 for layer in group.pages) else torch.empty
            for layer, pages in group.pages.items():
                both = [new(shape, dtype=self._native.dtype, device=self._native.device) for _ in pages]
                for mine, page in zip(both, pages, strict=True):
                    if len(group.past) > 0:
                        mine.index_copy_(0, group.past, page.index_select(0, group.read))
                flat[layer] = (both[0], both[1])
        return [flat[layer] for layer in range(spec.num_layers)]

    def _request(self, rows: Tensor) -> PrefillRequest:
        batch, past = len(self._tokens), max(self._past)
        packed = PackedBatch(batch, max(self._tokens), past, None, self._tokens, self._past, [0] * batch, None)
        return PrefillRequest(
            rows=rows,
            packed=packed,
            positions=self._arguments["position_ids"][0, : self._ends[-1]].to(torch.int64),
            cache=self._arguments["cache"],
            boundary=self._boundary,
            num_logits=[1] * batch,
            output_shape=(batch,),
            spans=[],
            arguments={},
        )

    def _wanted(self) -> list[int]:
        """Return the request of each row of logits; the first one for rows that nobody reads."""
        request_of = {end - 1: number for number, end in enumerate(self._ends)}
        return [request_of.get(row, 0) for row in self._arguments["logits_to_keep"].tolist()]
