"""Try whether products in 8-bit integers pay for a plan: their time and their loss beside native prefills without."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pop_ext import env_info
from pop_ext.evaluation.ablations import group_by_shape
from pop_ext.evaluation.arms import logits_after_prefill
from pop_ext.evaluation.prompts import Pair
from pop_ext.evaluation.timing import SpeedRange
from pop_ext.hf.load import load
from pop_ext.hf.loaded import check_option_supported, check_runs_without_int8
from pop_ext.hf.modules import input_device
from pop_ext.hf.native_model import NativeModel
from pop_ext.hf.weight_map import describe
from pop_ext.methods.calibration import longest_input
from pop_ext.methods.latency import random_ids, seconds_of
from pop_ext.methods.quality_judge import Figure
from pop_ext.plans.card import CardInt8
from pop_ext.plans.plan import Plan
from pop_ext.utils.progress import Progress, reporting

MOST_LOSS = 0.01
"""Loss that int8 may add, in nats a token."""
ROUNDS, WARM_UPS = 9, 2
"""Timed rounds at each length, after those that warm up."""
INT8 = "int8"
"""The verdict that int8 pays."""


def check_int8_possible(model: Any, lengths: Sequence[int]) -> None:
    """Check, before anything runs, that ``try_int8`` can run.

    Raises:
        UnsupportedModelError: The model has no native form, or none with int8. It is a ValueError.
        ValueError: There is no length to time.
    """
    check_option_supported("int8", describe(model))
    check_runs_without_int8(model)
    limit = longest_input(model)
    if not any(limit is None or length <= limit for length in lengths):
        raise ValueError(f"time_lengths: expected a length to time with int8=True, got {list(lengths)}")


def try_int8(
    model: Any, plan: Plan, pairs: Sequence[Pair], lengths: Sequence[int], batch_size: int, progress: Progress
) -> tuple[CardInt8, ...]:
    """Compare native prefills with and without int8, at full depth and under a plan.

    Losses are paired by prompt. The continuation is read at full depth by the stock model, as in decode. Times are
    paired by round: both prefills of a round follow each other, in an order that alternates.

    Args:
        model: Stock model with a native form that can have int8 products.
        plan: The plan, with its fit if it has one.
        pairs: Held-out (prompt, continuation).
        lengths: Prompt lengths to time; those that the model does not take are left out.
        batch_size: Prompts per forward.
        progress: Shows the prompts and rounds.

    Returns:
        One verdict for full depth and one for the plan, for each length.
    """
    limit = longest_input(model)
    lengths = [length for length in lengths if limit is None or length <= limit]
    found: list[CardInt8] = []
    depth = Plan(plan.num_layers, ())
    total = 2 * (len(pairs) + len(lengths) * (WARM_UPS + ROUNDS))
    hardware = env_info.hardware(input_device(model), model.dtype)
    with torch.no_grad(), reporting(progress, "int8", total) as advance:
        for name, one in (("full depth", depth), ("the plan", plan.replace(min_tokens=0))):
            natives = load(model, one), load(model, one, int8=True)
            losses = []
            for own in zip(*(_losses(native, pairs, batch_size) for native in natives), strict=True):
                losses.append(own[1] - own[0])
                advance(1)
            loss = Figure.of(losses)
            for length in lengths:
                speed = _speed(*natives, length, advance)
                error = None if math.isnan(loss.error) else loss.error
                found.append(
                    CardInt8(
                        tokens=length,
                        of=name,
                        verdict=verdict(speed, loss),
                        speedup=speed.median,
                        speedup_low=speed.low,
                        speedup_high=speed.high,
                        loss=loss.value,
                        error=error,
                        most_loss=MOST_LOSS,
                        prompts=loss.prompts,
                        isa=env_info.int8_isa(),
                        hardware=hardware,
                    )
                )
            del natives  # before the next two allocate their copies
    return tuple(found)


def verdict(speed: SpeedRange, loss: Figure) -> str:
    """Say whether int8 pays: "int8", or why not.

    It pays if it was faster in three of four rounds at least, and if the added loss, its mean plus one standard error,
    is at most ``MOST_LOSS``.
    """
    reasons = []
    if not speed.low > 1:
        reasons.append("slower" if speed.high < 1 else "not faster beyond noise")
    if not loss.upper(1.0) <= MOST_LOSS:
        reasons.append(f"loss not shown to be within {MOST_LOSS:g} nats a token")
    return INT8 if not reasons else f"no int8: {', '.join(reasons)}"


def _losses(native: NativeModel, pairs: Sequence[Pair], batch_size: int) -> Iterator[float]:
    """Yield the loss of each continuation, in nats a token, in groups of equal shape."""
    device = input_device(native.model)
    for group in group_by_shape(list(pairs), batch_size):
        context, target = (torch.stack([pairs[index][part] for index in group]).to(device) for part in (0, 1))
        logits = logits_after_prefill(native.model, native.prefill, context, target)
        log_p = logits.float().log_softmax(-1).gather(-1, target[..., None])
        yield from (-log_p.double().mean((1, 2))).tolist()


def _speed(plain: NativeModel, int8: NativeModel, tokens: int, advance: Any) -> SpeedRange:
    """Return the quartiles over rounds of the time without int8 by the time with it."""
    ids = random_ids(plain.spec.vocab_size, 1, tokens, plain.device)
    ratios = []
    for number in range(WARM_UPS + ROUNDS):
        both = (plain, int8) if number % 2 else (int8, plain)
        seconds = {native is int8: seconds_of(native, ids) for native in both}
        if number >= WARM_UPS:
            ratios.append(seconds[False] / seconds[True])
        advance(1)
    return SpeedRange.of(ratios)
