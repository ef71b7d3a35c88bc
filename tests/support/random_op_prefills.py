"""Random calls of torch.ops.pop.prefill over the caller's caches, and their comparison with the oracle.

Every sequence is compared with an oracle of its own, which knows neither batch nor strides. Slots that a call does not
name must keep their bytes, those between the views of a cache too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pop_ext
import torch
from against_oracle import Result, float32_cache, run_oracle
from hypothesis import strategies as st
from models import float32_twin, tokens
from op_calls import LAYOUTS, SENTINEL, op_call, run_op
from op_operands import strided
from pop_ext import NativeModel, Plan
from random_models import RandomModel, least_tokens, models, plans
from tolerance import assert_close_fp32, assert_low_precision
from torch import Tensor


@dataclass(frozen=True)
class Sequence:
    """New tokens, past positions, slot of the first position, rows at full depth, rows to return."""

    tokens: int
    past: int
    start: int
    boundary: int
    keep: int


@dataclass(frozen=True)
class OpPrefill:
    """A call. `scattered` gives the caches a slot table; `input` and `rope` are kinds of INPUTS and ROPES."""

    model: RandomModel
    plan: Plan
    sequences: tuple[Sequence, ...]
    layout: str
    scattered: bool
    window_only: bool
    input: str
    rope: str


INPUTS = {
    "int64 ids": lambda model, ids: ids,
    "int32 ids": lambda model, ids: ids.int(),
    "strided ids": lambda model, ids: torch.stack([ids, ids], dim=1)[:, 0],
    "embeddings": lambda model, ids: model.get_input_embeddings()(ids).detach(),
    "strided embeddings": lambda model, ids: strided(model.get_input_embeddings()(ids).detach()),
}
ROPES = {
    "contiguous": lambda table: table,
    "half width": lambda table: table[:, : table.shape[1] // 2],
    "strided": strided,
    "column-major": lambda table: table.t().contiguous().t(),
}


@st.composite
def sequences(draw: st.DrawFn, least: int = 1) -> Sequence:
    length = draw(st.integers(least, 40))
    past = draw(st.one_of(st.just(0), st.integers(1, 30)))
    small, any_row = st.integers(1, min(3, length)), st.integers(1, length)
    return Sequence(length, past, draw(st.integers(0, 5)), draw(st.one_of(small, any_row)), draw(small))


@st.composite
def op_prefills(draw: st.DrawFn) -> OpPrefill:
    model = draw(models())
    return OpPrefill(
        model=model,
        plan=draw(plans(model.layers)),
        sequences=(draw(sequences(least_tokens(model))), *draw(st.lists(sequences(), max_size=3))),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        scattered=draw(st.booleans()),
        window_only=draw(st.booleans()),
        input=draw(st.sampled_from(sorted(INPUTS))),
        rope=draw(st.sampled_from(sorted(ROPES))),
    )


class Run:
    """A call with its caches, filled at the past positions with what the oracle computed for them."""

    def __init__(self, given: OpPrefill) -> None:
        self.given, self.model = given, given.model.build()
        self.native: NativeModel = pop_ext.load(self.model, given.plan)
        self.prompts = [tokens(self.model, s.tokens, seed=i) for i, s in enumerate(given.sequences)]
        self.pasts = [self.past_of(s, i) for i, s in enumerate(given.sequences)]
        capacity = 2 + max(s.start + s.past + s.tokens for s in given.sequences)
        self.call = self.op_call(capacity)
        spec = self.native.spec
        shape = (spec.num_layers, len(self.prompts), spec.num_kv_heads, capacity, spec.head_dim)
        self.buffers, self.keys, self.values = LAYOUTS[given.layout](*shape, self.native.dtype)
        self.call |= {"key_cache": self.keys, "value_cache": self.values, "window_only": given.window_only}
        self.fill()

    def past_of(self, sequence: Sequence, i: int) -> Any:
        """Return the oracle's cache of the past positions; None without any."""
        if sequence.past == 0:
            return None
        ids = tokens(self.model, 1, sequence.past, seed=50 + i)
        return run_oracle(self.model, self.given.plan, ids).cache

    def op_call(self, capacity: int) -> dict[str, Any]:
        drawn = self.given.sequences
        names = {"past": "past", "start": "start", "boundary": "boundary", "logits_to_keep": "keep"}
        lengths = {argument: [getattr(s, field) for s in drawn] for argument, field in names.items()}
        call = op_call(self.native, self.prompts, capacity=capacity, **lengths)
        call["input"] = INPUTS[self.given.input](self.model, call["input"])
        for name in ("cos", "sin", "cos_local", "sin_local"):
            if name in call:
                call[name] = ROPES[self.given.rope](call[name])
        if self.given.scattered:
            generator = torch.Generator().manual_seed(3)
            slots = [torch.randperm(capacity, generator=generator, device="cpu") for _ in drawn]
            call["slot_table"] = torch.stack(slots).to(torch.int32)
        return call

    def slots(self, i: int) -> Tensor:
        """Return the slots of all positions of a sequence."""
        sequence = self.given.sequences[i]
        positions = torch.arange(sequence.past + sequence.tokens, device="cpu")
        return self.call["slot_table"][i, positions].long() if self.given.scattered else positions + sequence.start

    def fill(self) -> None:
        for i, past in enumerate(self.pasts):
            for number, layer in enumerate(past.layers if past is not None else ()):
                slots = self.slots(i)[: layer.keys.shape[2]]
                self.keys[number][i][:, slots], self.values[number][i][:, slots] = layer.keys[0], layer.values[0]

    def first_written(self, i: int, layer: int) -> int:
        """Return the first new position whose K and V a call writes: not always the first with `window_only`."""
        sequence, window = self.given.sequences[i], self.native.spec.window[layer]
        if not (self.given.window_only and window and layer in self.given.plan.omit):
            return sequence.past
        context = sequence.tokens - max(sequence.boundary, sequence.keep)
        return sequence.past + max(0, context - (window - 1))

    def expected(self, i: int, low: bool) -> tuple[Result, Result | None]:
        """Return what the oracle computes for a sequence; in low precision also in float32."""
        sequence, ids = self.given.sequences[i], self.prompts[i][None]
        call = {"boundary": sequence.boundary, "logits_to_keep": sequence.keep}
        theirs = run_oracle(self.model, self.given.plan, ids, past_key_values=self.pasts[i], **call)
        if not low:
            return theirs, None
        past = float32_cache(self.pasts[i])
        return theirs, run_oracle(float32_twin(self.model), self.given.plan, ids, past_key_values=past, **call)


def assert_op_equals_oracle(given: OpPrefill) -> None:
    """Compare the rows that a call returns, and K and V of every layer and position, with the oracle.

    The sequences are compared together: one alone may have too few elements to compare two rounding errors.
    """
    run = Run(given)
    hidden, batch = run_op(run.call), range(len(given.sequences))
    low = given.model.dtype != torch.float32
    expected = [run.expected(i, low) for i in batch]

    def compare(actual: Tensor, name: str, of: Callable[[int, Result], Tensor]) -> None:
        theirs = torch.cat([of(i, result) for i, (result, _) in enumerate(expected)])
        if low:
            truth = torch.cat([of(i, result) for i, (_, result) in enumerate(expected) if result is not None])
            assert_low_precision(actual, theirs, truth, name)
        else:
            assert_close_fp32(actual, theirs, name)

    compare(hidden, "hidden states", lambda i, result: result.hidden_states[0])
    for layer in range(given.model.layers):
        first = [run.first_written(i, layer) for i in batch]
        for kind, cache in (("keys", run.keys[layer]), ("values", run.values[layer])):
            name = f"{kind}, layer {layer}"
            for i in batch:
                skipped = run.slots(i)[given.sequences[i].past : first[i]]
                assert (cache[i][:, skipped] == SENTINEL).all(), f"{name}: a skipped slot was written"
            written = torch.cat([cache[i][:, run.slots(i)[first[i] :]].transpose(0, 1) for i in batch])
            compare(
                written,
                name,
                lambda i, result, layer=layer, kind=kind, first=first: getattr(result.cache.layers[layer], kind)[
                    0, :, first[i] :
                ].transpose(0, 1),
            )
    assert_nothing_else_changed(run)


def assert_nothing_else_changed(run: Run) -> None:
    """Check that all but the new positions is as before the call. Ends the run: it overwrites the caches."""
    for caches in (run.keys, run.values):
        for cache in caches:
            for i in range(len(run.prompts)):
                cache[i][:, run.slots(i)[run.given.sequences[i].past :]] = SENTINEL
    after = [buffer.clone() for buffer in run.buffers]
    for buffer in run.buffers:
        buffer.fill_(SENTINEL)
    run.fill()
    for buffer, kept in zip(run.buffers, after, strict=True):
        assert torch.equal(buffer, kept), "a slot that the call does not name was written"
