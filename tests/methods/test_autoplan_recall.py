"""Recall in `autoplan`: limits that a few tasks cannot show, and the measurement that needs no limit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from pop_ext import Plan
from pop_ext.methods import candidates
from pop_ext.methods.autoplan import Trial, autoplan
from pop_ext.methods.quality_judge import LOSS, RECALL_DROP, QualityJudge
from pop_ext.plans.card_markdown import render
from transformers import AutoTokenizer

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
TRIAL = Trial(tokens=90, continuation=8, prompts=6, samples=6, batch_size=3)
UNTIMED = {"pays_from": (), "time_lengths": ()}


@pytest.fixture
def easy(model, text, monkeypatch):
    """Tasks of one token, of which the demo model answers four of six."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(DEMO / "model")(text)["input_ids"])[-400:]
    tasks = []
    for number in range(6):
        prompt = ids[number * 60 : number * 60 + 50]
        with torch.no_grad():
            best = model(prompt[None]).logits[0, -1].topk(2).indices
        tasks.append((prompt, best[int(number < 2), None]))
    made = []
    monkeypatch.setattr(candidates, "make_tasks", lambda *arguments: made.append(arguments) or tasks)
    return tasks, made


# Limits that cannot be kept


@pytest.mark.parametrize(("errors", "limit", "least"), [(1.0, 0.16, 0.1667), (2.0, 0.3, 0.3334)])
def test_a_limit_under_the_error_of_one_answer_is_refused_before_the_texts_are_read(model, errors, limit, least):
    trial = dataclasses.replace(TRIAL, errors=errors)
    expected = rf"max_recall_drop: expected at least {least} with 6 retrieval tasks, .* got {limit};.* trial\.prompts"
    with pytest.raises(ValueError, match=expected):
        autoplan(model, [Path("no such file")], max_recall_drop=limit, trial=trial)


def test_the_smallest_limit_that_is_named_can_be_kept():
    lossless = candidates.Figure.of_answers([0.0] * 6)
    least = 0.1667
    assert lossless.upper(1.0) <= least
    candidates.check_recall_limit({RECALL_DROP: least}, 6, TRIAL)
    candidates.check_recall_limit({RECALL_DROP: 1e-9}, 6, dataclasses.replace(TRIAL, errors=0.0))
    candidates.check_recall_limit({LOSS: 1e-9}, 6, TRIAL)


def test_a_limit_that_too_few_tasks_can_show_is_refused_before_the_model_runs(model, text, easy, monkeypatch):
    monkeypatch.setattr(candidates, "QualityJudge", lambda *_: pytest.fail("the model ran"))
    trial = dataclasses.replace(TRIAL, prompts=100)
    with pytest.raises(ValueError, match=r"max_recall_drop: expected at least 0\.1667 with 6 .* than 100"):
        autoplan(model, [text], max_recall_drop=0.1, trial=trial)


# Without a limit


def test_recall_of_the_plan_that_was_found_is_on_the_card_without_a_limit(model, text, easy, monkeypatch):
    tasks, made = easy
    judged = []
    answers = QualityJudge._answers

    def count(self, plan, title):
        judged.extend([len(plan.omit)] * bool(self._tasks.pairs))
        return answers(self, plan, title)

    monkeypatch.setattr(QualityJudge, "_answers", count)
    found = autoplan(model, [text], max_kl=0.3, method="unfitted", highest=6, trial=TRIAL, **UNTIMED)
    (row,) = [row for row in found.card.quality if row.name == RECALL_DROP]
    expected = QualityJudge(model, tasks[:1], tasks, [], 3, False).measure(found.plan)[RECALL_DROP]
    assert (row.value, row.error, row.prompts) == (expected.value, expected.error, 6)
    assert row.against == "full depth, which answers 0.67"
    assert found.recall == pytest.approx(4 / 6)
    assert found.card.asked == {"max_kl": 0.3}
    assert found.card.not_measured == {}
    assert len(found.tried) > 1
    assert all(RECALL_DROP not in tried.figures for tried in found.tried)
    assert judged[:2] == [0, len(found.plan.omit)]  # the rest is of this test
    assert len(judged) == 4
    assert len(made) == 1


def test_the_plan_is_written_before_recall_is_measured(model, text, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(candidates, "make_tasks", stop)
    with pytest.raises(KeyboardInterrupt):
        autoplan(model, [text], max_kl=9.0, method="unfitted", highest=1, trial=TRIAL, save=tmp_path, **UNTIMED)
    card = Plan.from_pretrained(tmp_path).card
    assert [row.name for row in card.quality] == ["loss", "kl"]
    assert card.not_measured == {RECALL_DROP: "the run was stopped before"}


def test_texts_that_make_no_tasks_leave_recall_unmeasured_and_the_card_says_so(model, text, tmp_path):
    trial = dataclasses.replace(TRIAL, tokens=30)
    found = autoplan(model, [text], max_kl=9.0, method="unfitted", highest=1, trial=trial, save=tmp_path, **UNTIMED)
    why = found.card.not_measured[RECALL_DROP]
    assert why.startswith("the texts make no retrieval tasks (trial.tokens: expected at least ")
    assert found.recall is None
    assert Plan.from_pretrained(tmp_path).card == found.card
    assert f"The recall drop was **not measured**: {why}." in (tmp_path / "README.md").read_text()


def test_a_model_that_answers_nothing_has_no_recall_to_lose(model, text, easy):
    tasks, _ = easy
    tasks[:] = tasks[:2]
    found = autoplan(model, [text], max_loss=9.0, method="unfitted", highest=1, trial=TRIAL, **UNTIMED)
    assert found.card.not_measured == {RECALL_DROP: "the model answers none of 2 retrieval tasks at full depth"}
    assert found.recall == 0.0
    assert [row.name for row in found.card.quality] == ["loss", "kl"]
    assert "not measured" in render(found.card)


def test_a_limit_on_recall_measures_it_in_the_search(model, text, easy):
    found = autoplan(model, [text], max_recall_drop=0.6, method="unfitted", highest=1, trial=TRIAL, **UNTIMED)
    assert found.card is not None
    (row,) = [row for row in found.card.quality if row.name == RECALL_DROP]
    assert row.against == "full depth, which answers 0.67"
    assert not math.isnan(row.error)
    assert found.card.not_measured == {}
    assert RECALL_DROP in found.tried[0].figures
