"""``Decision``: what runs a call of an enabled model, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pop_ext.plans.plan import Plan

Products = Literal["fp8", "int8"]
"""The 8-bit products of a native prefill: of 8-bit floats (e4m3) or of 8-bit integers (docs/fp8.md)."""


@dataclass(frozen=True)
class Decision:
    """Report what runs a call of an enabled model, and why. ``str()`` of it is a sentence.

    Attributes:
        backend: "native", "reference" or "stock".
        rule: name of the rule that decided, for programs: "prefill", "decode", "labels", "mask", ...
        reason: one sentence, for people.
        declined: whether the stock forward runs the call although it is or may be a prefill. ``strict=True`` raises
            then. False for a decode step, for example.
        plan: the plan of the enabled model.
        tokens: real new tokens of each sequence; empty for "stock".
        boundary: rows of each sequence that run at full depth; empty for "stock".
        logits_to_keep: rows that get logits; 0 for "stock".
        products: "fp8" or "int8" if a native prefill computes its products in 8 bits; else None.
    """

    backend: str
    rule: str
    reason: str
    declined: bool
    plan: Plan
    tokens: tuple[int, ...] = ()
    boundary: tuple[int, ...] = ()
    logits_to_keep: int = 0
    products: Products | None = None

    @property
    def fp8(self) -> bool:
        """Whether a native prefill computes its products in 8-bit floats."""
        return self.products == "fp8"

    @property
    def int8(self) -> bool:
        """Whether a native prefill computes its products in 8-bit integers."""
        return self.products == "int8"

    @property
    def native(self) -> bool:
        """Whether the native runtime runs the call."""
        return self.backend == "native"

    def __str__(self) -> str:
        if self.backend == "stock":
            return f"stock forward: {self.reason}"
        pruned = sum(tokens - boundary for tokens, boundary in zip(self.tokens, self.boundary, strict=True))
        depth = (
            f"{pruned} of them omit {len(self.plan.omit)} of {self.plan.num_layers} layers"
            if self.plan.omit and pruned > 0
            else f"all of them run all {self.plan.num_layers} layers"
        )
        products = {"fp8": " in 8-bit floats", "int8": " in 8-bit integers", None: ""}[self.products]
        return (
            f"{self.backend} prefill{products}: {self.reason}; "
            f"{len(self.tokens)} sequence(s), {sum(self.tokens)} new tokens, {depth}"
        )


class Decline(Exception):
    """Raised where the stock forward must run a call.

    Attributes:
        rule, reason, declined: as in ``Decision``.
    """

    def __init__(self, rule: str, reason: str, declined: bool = True) -> None:
        super().__init__(reason)
        self.rule = rule
        self.reason = reason
        self.declined = declined

    def decision(self, plan: Plan) -> Decision:
        """Return the ``Decision`` that reports this."""
        return Decision("stock", self.rule, self.reason, self.declined, plan)
