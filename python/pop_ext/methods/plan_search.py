"""Search the largest number of omitted layers within a budget of quality, with the cheap estimates first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pop_ext.methods.quality_judge import KL, Figure
from pop_ext.plans.plan import Plan

UNFITTED, QUICK, RIDGE, DISTILL = "unfitted", "quick ridge", "ridge", "distill"
STAGES = {UNFITTED: (UNFITTED,), RIDGE: (UNFITTED, QUICK, RIDGE), DISTILL: (UNFITTED, QUICK, DISTILL)}
"""Method -> the stages of its search, in order of cost. The quick ridge fits on some of the calibration sequences."""
REACH = {RIDGE: 2, DISTILL: 4}
"""Third stage -> how many counts above the quick ridge's answer it tries."""
AHEAD = 4
"""The third stage's texts are read for as many counts above that answer: wider boundaries may ask for them."""


@dataclass(frozen=True)
class Candidate:
    """A plan that the search has judged.

    Attributes:
        plan: The plan, with the projections of its fit.
        fit: "unfitted", "quick ridge", "ridge" or "distill".
        figures: Held-out figures by name.
        within: True if all limits are kept.
        seconds: Time of fit and measurement.
        saved: Layers that the rows of a prompt skip, on average over the rows of a prompt as long as the judged ones.
    """

    plan: Plan
    fit: str
    figures: Mapping[str, Figure]
    within: bool
    seconds: float
    saved: float

    @property
    def count(self) -> int:
        """Number of omitted layers."""
        return len(self.plan.omit)


Judge = Callable[[int, str, Sequence[int]], Candidate]
"""Function from (number of layers, stage, further numbers) to a judged candidate. The stage may ask for the further
numbers soon, so that one reading of the texts may serve them, too."""


def search(judge: Judge, stages: Sequence[str], highest: int) -> Candidate | None:
    """Find the plan that omits the most layers within the limits, by bisection in each stage.

    Each stage starts from the count that the one before has found, because a better fit costs no quality. The search
    assumes that within a stage a larger count costs more. The third stage looks only ``REACH`` counts further. At the
    end the count that was found is judged with the last stage's fit, too. Of the
    candidates that save the most, the one with the lowest KL wins.

    Args:
        judge: What judges candidates.
        stages: Fits in order of cost, of ``STAGES``.
        highest: Largest number of layers to try.

    Returns:
        The candidate, or None if not even one layer can be omitted.
    """
    found: dict[tuple[int, str], Candidate] = {}

    def candidate(count: int, stage: str, soon: Sequence[int] = ()) -> Candidate:
        if (count, stage) not in found:
            found[count, stage] = judge(count, stage, soon)
        return found[count, stage]

    low = 0
    for number, stage in enumerate(stages):
        high = highest if number < 2 else min(highest, low + REACH.get(stage, 0))
        last = range(max(low, 1), min(highest, low + AHEAD) + 1)  # low: if no larger count keeps the limits
        while low < high:
            middle = (low + high + 1) // 2
            if candidate(middle, stage, last if number == 2 else _next_steps(low, high)).within:
                low = middle
            else:
                high = middle - 1
    if low > 0:
        candidate(low, stages[-1])
    kept = [tried for tried in found.values() if tried.within]
    return max(kept, key=lambda tried: (tried.saved, -tried.figures[KL].value), default=None)


def _next_steps(low: int, high: int) -> list[int]:
    """Return the counts that a bisection from ``low`` to ``high`` may ask for in its next two steps."""
    middle = (low + high + 1) // 2
    ends = [(low, high), (middle, high), (low, middle - 1)]
    return [(below + above + 1) // 2 for below, above in ends if below < above]
