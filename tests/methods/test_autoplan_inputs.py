"""What `autoplan` refuses, leaves out or warns of: texts, few prompts, positions, tokenizers, an older plan."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pop_ext
import pytest
import torch
from pop_ext import Plan
from pop_ext.evaluation.prompts import Texts, calibration_batches, read_texts, text_sets, texts_outside
from pop_ext.methods import candidates
from pop_ext.methods.autoplan import Trial, autoplan
from pop_ext.methods.held_out import split_texts
from pop_ext.methods.plan_search import Candidate
from pop_ext.methods.quality_judge import QualityJudge
from pop_ext.plans.card import PlanCard
from pop_ext.plans.card_markdown import render

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
TRIAL = Trial(tokens=40, continuation=8, prompts=8, samples=6, batch_size=4)
QUICK = {"max_kl": 9.0, "method": "unfitted", "highest": 1, "boundary": 1, "pays_from": (), "time_lengths": ()}


# Texts


def test_copies_of_a_text_are_left_out_and_named(model, tokenizer, text, tmp_path):
    (tmp_path / "copy.txt").write_text(text)
    with pytest.warns(UserWarning, match=r"of 4 texts 2 are copies, and left out: text 2, copy\.txt") as caught:
        found = autoplan(model, [text, text, tmp_path / "copy.txt", text[:5000]], trial=TRIAL, **QUICK)
    assert [warning.filename for warning in caught] == [__file__]
    assert [(one.name, one.role) for one in found.card.texts] == [
        ("text 1", "calibration"),
        ("text 1", "held-out"),
        ("text 4", "calibration"),
        ("text 4", "held-out"),
    ]


def test_copies_of_a_file_are_read_once(tokenizer, text, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(text)
    with pytest.warns(UserWarning, match="of 3 texts 2 are copies"):
        found = read_texts([tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "a.txt"], tokenizer)
    assert len(found.plain) == 1


def test_half_a_surrogate_pair_is_refused_by_name(tokenizer, text, tmp_path):
    with pytest.raises(ValueError, match="text 2: expected Unicode, got half a surrogate pair at offset 3"):
        split_texts([text, "abc\ud800"], tokenizer, 0.25, 48)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\\ud800", "continuation": "b"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: expected Unicode, got half .* at offset 1"):
        read_texts([tmp_path / "a.jsonl"], tokenizer)


class Beyond:
    """A tokenizer that gives one id too many for the model."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, *arguments, **named):
        found = self.tokenizer(*arguments, **named)
        found["input_ids"][-1] = 4096
        return found

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def test_a_tokenizer_with_ids_beyond_the_vocabulary_is_refused(model, tokenizer, text):
    with pytest.raises(ValueError, match="tokenizer: expected ids from 0 to 4095, those of the .*, got 4096"):
        autoplan(model, [text], tokenizer=Beyond(tokenizer), trial=TRIAL, **QUICK)
    ids = torch.tensor([5, 4096, 7, 8])
    sets = text_sets(Texts((), ((ids, ids),)), tokenizer, [4], 2, 2)
    with pytest.raises(ValueError, match="sets: expected ids from 0 to 4095, .* got 4096"):
        pop_ext.evaluation.evaluate(model, sets, [Plan.last(12, 2)])


# Few prompts


def test_fewer_prompts_than_asked_are_warned_of_and_too_few_are_on_the_card(model, text, tmp_path):
    asked = dataclasses.replace(TRIAL, prompts=48)
    with pytest.warns(UserWarning, match="the texts hold out 3 prompts of 48 tokens, fewer than the 48"):
        found = autoplan(model, [text[:800]], trial=asked, save=tmp_path, **QUICK)
    note = "Only 3 prompts judged the plan: under 8 its figures and their errors say little."
    assert found.card.notes == (note,)
    assert Plan.from_pretrained(tmp_path).card == found.card
    assert f"**{note}**" in render(found.card)


def test_as_many_prompts_as_asked_give_no_warning(model, text):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = autoplan(model, [text], trial=TRIAL, **QUICK)
    assert found.card.notes == ()


def test_notes_of_a_card_are_texts():
    with pytest.raises(ValueError, match=r"card\.notes: expected str, got int 3"):
        PlanCard.from_json('{"num_layers": 2, "omit": [1], "boundary": 1, "notes": [3]}')


# Positions


def test_windows_beyond_the_positions_of_the_model_are_refused(model, text, monkeypatch):
    monkeypatch.setattr(model.config, "max_position_embeddings", 64)
    trial = dataclasses.replace(TRIAL, tokens=60)
    with pytest.raises(ValueError, match=r"trial\.tokens: expected .* at most the 64 tokens .*, got 60 \+ 8"):
        autoplan(model, [Path("no such file")], trial=trial, **QUICK)
    found = autoplan(model, [text], trial=dataclasses.replace(TRIAL, tokens=63, continuation=1), **QUICK)
    assert "expected at most" in found.card.not_measured["recall drop"]  # an answer has no room


# Limits on recall


def test_a_limit_that_every_plan_keeps_is_refused_at_once(model):
    with pytest.raises(ValueError, match="max_recall_drop: expected less than 1, .* got 1.5"):
        autoplan(model, [Path("no such file")], max_recall_drop=1.5, trial=TRIAL)


def test_a_limit_above_full_depth_is_refused_before_the_texts_run(model, text, monkeypatch):
    ran = []
    rows = QualityJudge._rows
    monkeypatch.setattr(QualityJudge, "_rows", lambda self, plan, *more: ran.append(more[1]) or rows(self, plan, *more))
    monkeypatch.setattr(QualityJudge, "recall", 0.125)
    with pytest.raises(ValueError, match=r"max_recall_drop: expected less than 0\.125"):
        autoplan(model, [text], max_recall_drop=0.5, trial=dataclasses.replace(TRIAL, tokens=90))
    assert ran == ["full depth, tasks"]


# An older plan


def test_an_older_plan_that_stays_in_the_folder_is_named(model, text, tmp_path):
    before = Plan.last(12, 4)
    before.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=rf"no plan within the budget was found, and {tmp_path} still holds an older"):
        found = autoplan(model, [text], trial=TRIAL, save=tmp_path, **{**QUICK, "max_kl": 1e-9})
    assert found.plan.omit == ()
    assert Plan.from_pretrained(tmp_path) == before


# Tasks of a training


@pytest.mark.parametrize("count", [5, 17])
def test_tasks_share_no_text_with_the_sequences_that_judge_the_training(model, tokenizer, text, count, monkeypatch):
    made = {}

    def make(texts, tokenizer, trial, kind, *limit):
        made[kind] = texts
        return []

    monkeypatch.setattr(candidates, "make_tasks", make)
    trial = dataclasses.replace(TRIAL, samples=count)
    split = split_texts([text[:3000], text[3000:]], tokenizer, trial.holdout, trial.window)
    run = candidates.Candidates(model, tokenizer, split, trial, {"kl": 9.0}, "distill", [1], None, 1, False)
    fitting = None

    class Held(candidates.Fitting):
        def fitted(self, *arguments):
            nonlocal fitting
            fitting = self
            raise KeyboardInterrupt

    monkeypatch.setattr("pop_ext.methods.fit.Fitting", Held)
    with pytest.raises(KeyboardInterrupt):
        run.candidate(1, "distill")
    held = [example.ids[0] for example in fitting._judges[0]]
    assert len(held) == max(1, count // 8)
    left = [part.tolist() for part in made["training"].plain]
    for ids in held:
        run_of = ids[1:25].tolist()
        assert not any(run_of == part[at : at + 24] for part in left for at in range(len(part)))
    assert sum(map(len, left)) >= sum(map(len, split.calibration.plain)) - len(held) * trial.window


def test_texts_outside_sequences_keep_every_other_token(tokenizer, text):
    ids = torch.arange(10, 110)
    texts = Texts((ids, ids + 100), ())
    batches = calibration_batches(texts, tokenizer, 21, 99, batch=1)
    left = texts_outside(texts, tokenizer, 21, 99, [1, len(batches) - 1])
    assert [part.tolist() for part in left.plain]
    kept = torch.cat(left.plain).tolist()
    gone = {int(one) for index in (1, len(batches) - 1) for one in batches[index][0]} - {tokenizer.bos_token_id}
    assert sorted(kept) == sorted(set(torch.cat(texts.plain).tolist()) - gone)


# Inference mode


@pytest.mark.parametrize("method", ["ridge", "distill"])
def test_a_search_and_a_fit_run_inside_inference_mode(model, text, method):
    plan, ids = Plan.last(12, 2), torch.randint(0, 4096, (4, 40), generator=torch.Generator().manual_seed(0))
    more = {"steps": 2, "tasks": [(ids[0, :20], ids[0, 20:23])] * 2} if method == "distill" else {}
    expected = pop_ext.fit(model, plan, [ids], method=method, lambdas=[0.1], **more)
    with torch.inference_mode():
        if more:
            more["tasks"] = [(prompt.clone(), answer.clone()) for prompt, answer in more["tasks"]]
        found = pop_ext.fit(model, plan, [ids.clone()], method=method, lambdas=[0.1], **more)
        assert isinstance(autoplan(model, [text], trial=TRIAL, **QUICK).chosen, Candidate)
    assert found == expected
