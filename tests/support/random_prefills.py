"""Random calls of a prefill, as strategies of hypothesis, and their comparison with the oracle.

A `Prefill` is a model, a plan and one or more turns over one cache of the Hugging Face side. An `OpPrefill` is one call
of torch.ops.pop.prefill over caches of any strides.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pop_ext
import torch
from against_oracle import Result, float32_cache, run_oracle
from cache_kinds import KINDS, new_cache
from hypothesis import strategies as st
from models import float32_twin, pad, tokens
from pop_ext import Plan
from random_models import RandomModel, least_tokens, models, plans
from tolerance import assert_close_fp32, assert_low_precision, compare_caches
from torch import Tensor
from transformers import DynamicCache

CAPACITY = 128
"""Of static caches: more than the turns of a prefill have."""


@dataclass(frozen=True)
class Turn:
    """One call.

    Attributes:
        lengths: new tokens of each sequence.
        before: columns of padding before each sequence; the rest of the padding comes after it.
        columns: new tokens of each sequence, padding included.
        keep: logits_to_keep, one for all sequences or one for each.
        boundary: likewise; None: the plan's.
        shift: added to the positions; None: they are counted.
        embeds: pass embeddings instead of ids.
    """

    lengths: tuple[int, ...]
    before: tuple[int, ...]
    columns: int
    keep: int | tuple[int, ...]
    boundary: int | tuple[int, ...] | None
    shift: int | None
    embeds: bool

    def mask(self) -> Tensor:
        """Return the mask of the new columns, [batch, columns]."""
        mask = torch.zeros(len(self.lengths), self.columns, dtype=torch.long)
        for i, (first, length) in enumerate(zip(self.before, self.lengths, strict=True)):
            mask[i, first : first + length] = 1
        return mask


@dataclass(frozen=True)
class Prefill:
    model: RandomModel
    plan: Plan
    cache: str
    turns: tuple[Turn, ...]


@st.composite
def per_sequence(draw: st.DrawFn, lengths: tuple[int, ...]) -> int | tuple[int, ...]:
    """Draw an int for all sequences or one for each, at most their lengths."""
    if draw(st.booleans()):
        return draw(st.integers(1, min(lengths)))
    return tuple(draw(st.integers(1, length)) for length in lengths)


@st.composite
def turns(draw: st.DrawFn, batch: int, side: str, least: int) -> Turn:
    """Draw a turn. `side` says where padding is: "none", "left", "right" or "mixed"."""
    lengths = (draw(st.integers(least, 40)),) * batch
    if side != "none":
        lengths = lengths[:1] + tuple(draw(st.integers(1, 40)) for _ in range(batch - 1))
    columns = max(lengths) + (draw(st.integers(0, 3)) if side == "mixed" else 0)
    room = [columns - length for length in lengths]
    before = {
        "left": lambda: tuple(room),
        "right": lambda: (0,) * batch,
        "none": lambda: (0,) * batch,
        "mixed": lambda: tuple(draw(st.integers(0, columns_left)) for columns_left in room),
    }[side]()
    return Turn(
        lengths=lengths,
        before=before,
        columns=columns,
        keep=draw(per_sequence(lengths)),
        boundary=draw(st.one_of(st.none(), per_sequence(lengths))),
        shift=draw(st.one_of(st.none(), st.none(), st.integers(0, 20))),
        embeds=draw(st.integers(0, 3)) == 3,
    )


@st.composite
def prefills(draw: st.DrawFn) -> Prefill:
    """Draw a model, a plan, and one or two turns over a cache of any kind.

    A cache that keeps only windows refuses holes: there, only the first turn is padded, on the left.

    Left out: DynamicCache(config) of a window of one token. transformers keeps the last `window - 1` positions there as
    `[-0:]`, that is all of them, and the native path has no K and V of those that no later token sees.
    """
    model = draw(models())
    plan = draw(plans(model.layers))
    cache = draw(st.sampled_from(KINDS if model.window != 1 else [kind for kind in KINDS if "config" not in kind]))
    batch = draw(st.integers(1, 4))
    sides = st.sampled_from(("none", "left", "right", "mixed") if cache == "DynamicCache()" else ("none", "left"))
    least = least_tokens(model)
    given = [draw(turns(batch, draw(sides), least))]
    if (model.dtype == torch.float32 or cache == "DynamicCache()") and draw(st.booleans()):
        given.append(draw(turns(batch, draw(sides) if cache == "DynamicCache()" else "none", least)))
    return Prefill(model, plan, cache, tuple(given))


def call_of(turn: Turn, model: torch.nn.Module, past: Tensor, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Return ids [batch, columns] and the other arguments of a turn after the mask of the past [batch, columns]."""
    ids = tokens(model, len(turn.lengths), turn.columns, seed=seed)
    mask = torch.cat([past, turn.mask()], dim=1)
    call: dict[str, Any] = {"attention_mask": mask}
    call["logits_to_keep"] = turn.keep if isinstance(turn.keep, int) else list(turn.keep)
    if turn.boundary is not None:
        call["boundary"] = turn.boundary if isinstance(turn.boundary, int) else list(turn.boundary)
    if turn.shift is not None:
        counted = (mask.cumsum(1) - 1).clamp(min=0)[:, past.shape[1] :]
        call["position_ids"] = counted + turn.shift
    return ids, call


def assert_turn(ours: Result, theirs: Result, truth: Result | None, mask: Tensor) -> None:
    """Compare a turn with the oracle; in low precision with `truth`, the oracle in float32."""
    for name in ("logits", "hidden_states"):
        if truth is None:
            assert_close_fp32(getattr(ours, name), getattr(theirs, name), name)
        else:
            assert_low_precision(getattr(ours, name), getattr(theirs, name), getattr(truth, name), name)
    compare_caches(ours.cache, theirs.cache, mask=mask, oracle_fp32=None if truth is None else truth.cache)


def assert_prefill_equals_oracle(prefill: Prefill) -> None:
    """Run each turn natively and through the oracle, over a cache each, and compare.

    In low precision the second turn continues the oracle's cache: else the errors of two turns would add up.
    """
    model = prefill.model.build()
    native = pop_ext.load(model, prefill.plan)
    low = prefill.model.dtype != torch.float32
    cache, oracle_cache = new_cache(prefill.cache, model, CAPACITY), DynamicCache()
    past = torch.zeros(len(prefill.turns[0].lengths), 0, dtype=torch.long)
    for number, turn in enumerate(prefill.turns):
        ids, call = call_of(turn, model, past, number)
        past = call["attention_mask"]
        if turn.embeds:
            call["inputs_embeds"], ids = model.get_input_embeddings()(ids).detach(), None
        if low and number > 0:
            cache = copy.deepcopy(oracle_cache)
        out = native.prefill(ids, **call, past_key_values=cache)
        ours = Result(out.logits, out.hidden_states, out.past_key_values)
        theirs = run_oracle(model, prefill.plan, ids, **call, past_key_values=oracle_cache)
        truth = None
        if low:
            call["past_key_values"] = float32_cache(oracle_cache)
            if ids is None:
                call["inputs_embeds"] = call["inputs_embeds"].float()
            truth = run_oracle(float32_twin(model), prefill.plan, ids, **call)
        assert_turn(ours, theirs, truth, past)
        cache, oracle_cache = ours.cache, theirs.cache


@dataclass(frozen=True)
class EnabledCall:
    """A forward of an enabled model: each sequence's tokens, padded on the left, and logits of the last rows of all."""

    model: RandomModel
    plan: Plan
    cache: str
    lengths: tuple[int, ...]
    keep: int


@st.composite
def enabled_calls(draw: st.DrawFn) -> EnabledCall:
    model = draw(models())
    lengths = draw(st.lists(st.integers(least_tokens(model), 40), min_size=1, max_size=4))
    keep = draw(st.integers(1, min(lengths)))
    plan = draw(plans(model.layers))
    return EnabledCall(model, plan, draw(st.sampled_from(KINDS)), tuple(lengths), keep)


@torch.no_grad()
def assert_enabled_equals_oracle(given: EnabledCall) -> None:
    """Compare logits: short sequences (`min_tokens`) and calls that are declined run at full depth, as in the oracle.

    Positions are given, since the stock forward counts padding if they are not.
    """
    model = given.model.build()
    ids, mask = pad([tokens(model, n, seed=i) for i, n in enumerate(given.lengths)], "left")
    call = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "logits_to_keep": given.keep}
    pop_ext.enable(model, given.plan)
    try:
        cache = new_cache(given.cache, model, CAPACITY)
        logits = model(ids, past_key_values=cache, use_cache=True, **call).logits
        decision = pop_ext.last_call(model)
    finally:
        pop_ext.disable(model)
    stock = decision is None or decision.backend == "stock"  # None: a call of one column looks like a step of decode
    if stock:
        assert max(given.lengths) == 1 or all(n < given.plan.min_tokens for n in given.lengths), decision
    boundary = [n if stock or n < given.plan.min_tokens else min(given.plan.boundary, n) for n in given.lengths]
    theirs = run_oracle(model, given.plan, ids, boundary=boundary, **call)
    if given.model.dtype == torch.float32:
        assert_close_fp32(logits, theirs.logits, "logits")
    else:
        truth = run_oracle(float32_twin(model), given.plan, ids, boundary=boundary, **call)
        assert_low_precision(logits, theirs.logits, truth.logits, "logits")
