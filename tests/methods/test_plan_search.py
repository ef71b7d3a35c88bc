"""The search for the most layers within a budget: bisection, stages, and the split of texts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from pop_ext import Plan
from pop_ext.methods.plan_search import STAGES, Candidate, search
from pop_ext.methods.quality_judge import KL, LOSS, RECALL_DROP, Figure, within


class Judge:
    """Within the budget up to a count for each stage; records what is asked."""

    def __init__(self, **limits: int) -> None:
        self.limits, self.asked, self.soon = limits, [], []

    def __call__(self, count: int, stage: str, soon: Sequence[int]) -> Candidate:
        self.asked.append((count, stage))
        self.soon.append(sorted({count, *soon}))
        kl = count / (1 + ("unfitted", "quick ridge", "ridge", "distill").index(stage))
        figures = {KL: Figure(kl, 0.0, 9)}
        return Candidate(Plan.last(40, count), stage, figures, count <= self.limits[stage], 0.0, count)


@pytest.mark.parametrize("least", range(21))
def test_bisection_finds_the_largest_count_of_a_stage(least):
    judge = Judge(unfitted=least)
    found = search(judge, STAGES["unfitted"], 20)
    assert (found.count if found else 0) == least
    assert len(judge.asked) <= math.ceil(math.log2(21))
    assert len(set(judge.asked)) == len(judge.asked)


@pytest.mark.parametrize(
    ("unfitted", "quick", "distill", "count", "fit"),
    [
        (3, 8, 10, 10, "distill"),
        (3, 8, 8, 8, "distill"),  # the ridge's count, fitted better
        (3, 8, 0, 8, "quick ridge"),  # distill over the budget: the ridge stays
        (3, 3, 3, 3, "distill"),
        (3, 0, 0, 3, "unfitted"),
        (0, 0, 2, 2, "distill"),
        (0, 15, 20, 19, "distill"),  # at most four further
    ],
)
def test_each_stage_starts_from_the_count_of_the_cheaper_one(unfitted, quick, distill, count, fit):
    judge = Judge(**{"unfitted": unfitted, "quick ridge": quick, "distill": distill})
    found = search(judge, STAGES["distill"], 20)
    assert (found.count, found.fit) == (count, fit)
    assert [stage for _, stage in judge.asked] == sorted(
        (stage for _, stage in judge.asked), key=STAGES["distill"].index
    )
    assert all(tried >= unfitted for tried, stage in judge.asked if stage == "quick ridge")


def test_no_count_within_the_budget_gives_none():
    assert search(Judge(**{"unfitted": 0, "quick ridge": 0, "distill": 0}), STAGES["distill"], 20) is None


def test_the_fit_of_the_last_stage_must_not_have_more_kl():
    class Worse(Judge):
        def __call__(self, count, stage, soon):
            found = super().__call__(count, stage, soon)
            kl = {"unfitted": 3.0, "quick ridge": 1.0, "distill": 2.0}[stage]
            return Candidate(found.plan, stage, {KL: Figure(kl, 0.0, 9)}, found.within, 0.0, found.saved)

    judge = Worse(**{"unfitted": 1, "quick ridge": 6, "distill": 6})
    assert search(judge, STAGES["distill"], 9).fit == "quick ridge"


def test_the_ridge_on_all_sequences_tries_at_most_two_layers_more():
    judge = Judge(**{"unfitted": 2, "quick ridge": 7, "ridge": 20})
    assert search(judge, STAGES["ridge"], 20).count == 9
    assert [count for count, stage in judge.asked if stage == "ridge"] == [8, 9]


def test_one_reading_may_serve_two_steps_of_the_quick_ridge_and_all_of_the_last_stage():
    judge = Judge(**{"unfitted": 2, "quick ridge": 7, "ridge": 20})
    search(judge, STAGES["ridge"], 20)
    asked = dict(zip(judge.asked, judge.soon, strict=True))
    assert asked[8, "ridge"] == [7, 8, 9, 10, 11]
    quick = [(count, soon) for (count, stage), soon in asked.items() if stage == "quick ridge"]
    assert quick[0] == (11, [6, 11, 16])  # 2...20
    for (count, soon), (after, _) in itertools.pairwise(quick):
        assert count in soon
        assert after in soon


def test_figures_are_means_with_standard_errors():
    figure = Figure.of([1.0, 2.0, 3.0, 6.0])
    assert (figure.value, figure.prompts) == (3.0, 4)
    assert figure.error == pytest.approx(math.sqrt(14 / 3) / 2)
    assert math.isnan(Figure.of([1.0]).error)


def test_the_error_of_lost_answers_is_at_least_one_answer():
    assert Figure.of_answers([0.0] * 20) == Figure(0.0, 0.05, 20)
    assert Figure.of_answers([1.0, -1.0] * 10) == Figure.of([1.0, -1.0] * 10)
    assert Figure.of_answers([1.0]).error == 1.0


def test_a_limit_holds_for_the_mean_plus_its_standard_errors():
    figures = {LOSS: Figure(0.01, 0.005, 9), RECALL_DROP: Figure(0.0, 0.02, 9)}
    assert within(figures, {LOSS: 0.015}, 1.0)
    assert not within(figures, {LOSS: 0.0149}, 1.0)
    assert within(figures, {LOSS: 0.0149}, 0.0)
    assert not within(figures, {LOSS: 0.0149}, 2.0)
    assert not within(figures, {LOSS: 0.02, RECALL_DROP: 0.01}, 1.0)
    assert not within({LOSS: figures[LOSS]}, {LOSS: 0.02, RECALL_DROP: 0.5}, 1.0)  # not measured
    assert not within({LOSS: Figure(0.0, math.nan, 1)}, {LOSS: 1.0}, 1.0)  # no error is known of one prompt
    assert within({LOSS: Figure(0.0, math.nan, 1)}, {LOSS: 1.0}, 0.0)
