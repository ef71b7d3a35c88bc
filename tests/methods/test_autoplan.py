"""Plans within a budget of quality: the split of texts, the judge, the whole on the demo model, the command."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import ClassVar

import pop_ext
import pytest
import torch
from pop_ext import Plan, env_info
from pop_ext.cli.budget import plan_folder
from pop_ext.methods import autoplan as module
from pop_ext.methods import candidates
from pop_ext.methods.autoplan import Trial, autoplan
from pop_ext.methods.defaults import LEARNING_RATE, STEPS
from pop_ext.methods.distill import Judgement, Training
from pop_ext.methods.fit_arguments import LAMBDAS
from pop_ext.methods.fitting import Fitting
from pop_ext.methods.held_out import split_texts, token_counts
from pop_ext.methods.quality_judge import KL, LOSS, RECALL_DROP, Figure, QualityJudge
from pop_ext.plans.origin import config_hash, weights_hash
from transformers import AutoModelForCausalLM

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
TRIAL = Trial(tokens=40, continuation=8, prompts=6, samples=6, batch_size=3)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# The split


def test_parts_are_contiguous_share_no_token_and_lose_none(tokenizer, text):
    split = split_texts([text, text[:3000]], tokenizer, 0.25, 48)
    for whole, first, last in zip((text, text[:3000]), split.calibration.plain, split.held_out.plain, strict=True):
        ids = encode(tokenizer, whole)
        assert [*first, *last] == ids
        assert len(last) == max(48, round(0.25 * len(ids)))
    roles = [(source.name, source.role, source.tokens) for source in split.sources]
    assert roles == [
        (f"text {number}", role, len(part))
        for number in (1, 2)
        for role, part in (
            ("calibration", split.calibration.plain[number - 1]),
            ("held-out", split.held_out.plain[number - 1]),
        )
    ]
    assert token_counts(split.sources, "held-out") == sum(len(ids) for ids in split.held_out.plain)


def test_a_text_too_short_to_cut_only_calibrates(tokenizer, text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(tokenizer.decode(encode(tokenizer, text)[:60]))
    split = split_texts([short, text], tokenizer, 0.25, 48)
    assert (len(split.calibration.plain), len(split.held_out.plain)) == (2, 1)
    assert [(source.name, source.role) for source in split.sources[:2]] == [
        ("short.txt", "calibration"),
        ("text 2", "calibration"),
    ]


def test_texts_that_cannot_be_split_are_refused(tokenizer, text, tmp_path):
    with pytest.raises(ValueError, match=r"texts: expected a text of at least 96 tokens, .* got \d+ in the longest"):
        split_texts([text[:100]], tokenizer, 0.25, 48)
    with pytest.raises(ValueError, match="texts: expected at least one text, got none"):
        split_texts([], tokenizer, 0.25, 48)
    with pytest.raises(TypeError, match="texts: expected a list of texts or paths, got str"):
        split_texts(text, tokenizer, 0.25, 48)
    with pytest.raises(TypeError, match="texts: expected strings or paths, got int"):
        split_texts([3], tokenizer, 0.25, 48)
    with pytest.raises(ValueError, match=r"texts: expected plain texts.*a\.jsonl"):
        split_texts([tmp_path / "a.jsonl"], tokenizer, 0.25, 48)


# The judge


def pairs_of(tokenizer, text, count, prompt=30, answer=5):
    ids = torch.tensor(encode(tokenizer, text))
    step = prompt + answer
    return [(ids[at : at + prompt], ids[at + prompt : at + step]) for at in range(0, count * step, step)]


def test_figures_equal_those_of_plain_pytorch(model, tokenizer, text):
    pairs = pairs_of(tokenizer, text, 5)
    plan = Plan.last(12, 5, boundary=3)
    figures = QualityJudge(model, pairs, pairs[:4], [], 2, False).measure(plan)
    losses, kls, drops = [], [], []
    with torch.no_grad():
        for prompt, answer in pairs:
            ids = torch.cat([prompt, answer[:-1]])[None]
            full = model(ids).logits[0, len(prompt) - 1 :].log_softmax(-1)
            rows, _ = pop_ext.reference.prefill(model, ids, plan, len(answer), boundary=3 + len(answer) - 1)
            own = rows[0].log_softmax(-1)
            losses.append(float((full - own).gather(1, answer[:, None]).mean()))
            kls.append(float((full.exp() * (full - own)).sum(-1).mean()))
            hits = [bool((logits.argmax(-1) == answer).all()) for logits in (full, own)]
            drops.append(float(hits[0]) - float(hits[1]))
    for name, values in ((LOSS, losses), (KL, kls), (RECALL_DROP, drops[:4])):
        expected = Figure.of_answers(values) if name == RECALL_DROP else Figure.of(values)
        assert figures[name].value == pytest.approx(expected.value, abs=2e-4)
        assert figures[name].error == pytest.approx(expected.error, abs=2e-4)
        assert figures[name].prompts == len(values)


def test_full_depth_costs_nothing(model, tokenizer, text):
    judge = QualityJudge(model, pairs_of(tokenizer, text, 3), [], [4], 3, False)
    figures = judge.measure(Plan(12, (), min_tokens=9999))
    assert figures[LOSS].value == 0.0
    assert figures[KL].value == pytest.approx(0.0, abs=1e-4)
    assert judge.recall is None
    assert RECALL_DROP not in figures


def test_tasks_are_not_run_for_a_plan_whose_loss_is_over_its_limit(model, tokenizer, text):
    pairs = pairs_of(tokenizer, text, 3)
    judge = QualityJudge(model, pairs, pairs, [], 3, False)
    deep = Plan.last(12, 9)
    assert RECALL_DROP not in judge.measure(deep, {LOSS: 1e-6}, 1.0)
    assert RECALL_DROP in judge.measure(deep, {LOSS: 1e6, RECALL_DROP: 1e-6}, 1.0)


# The whole


@pytest.fixture(scope="module")
def found(model, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    told = []
    result = autoplan(
        model,
        [text],
        max_loss=0.2,
        max_kl=0.3,
        boundary=2,
        highest=6,
        trial=TRIAL,
        save=folder,
        pays_from=(16,),
        time_lengths=(32,),
        progress=lambda *done: told.append(done),
    )
    return result, folder, told


def test_the_plan_keeps_its_limits_and_the_card_says_so(found, model):
    result, _, _ = found
    best = next(tried for tried in result.tried if tried.plan.projections == result.plan.projections and tried.within)
    assert 1 <= len(result.plan.omit) <= 6
    assert result.plan.boundary == 2
    assert best.figures[LOSS].upper(1.0) <= 0.2
    assert best.figures[KL].upper(1.0) <= 0.3
    card = result.card
    assert card is result.plan.card
    assert card.asked == {"max_loss": 0.2, "max_kl": 0.3}
    assert (card.config_hash, card.weights_hash) == (config_hash(model.config), weights_hash(model))
    assert {row.name: (row.value, row.prompts) for row in card.quality} == {
        name: (figure.value, 6) for name, figure in best.figures.items()
    }
    assert [text.role for text in card.texts] == ["calibration", "held-out"]
    assert [row.tokens for row in card.speed] == [32]
    assert result.plan.min_tokens in (16, 17)
    assert result.plan.origin.method == "deepest; the most within max_loss 0.2, max_kl 0.3"


def test_the_hardware_is_what_the_model_lies_on(found, monkeypatch):
    assert re.fullmatch(r".+, \d+ threads?, float32 on cpu", found[0].card.speed[0].hardware)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert env_info.hardware(torch.device("cuda", 1), torch.bfloat16) == "GPU 1, bfloat16"


def test_a_wider_boundary_is_taken_only_where_it_saves_more(model, text, monkeypatch):
    least = {1: 1, 2: 1, 3: 4, 4: 8, 5: 99}  # number of layers -> smallest boundary within the budget

    def measure(self, plan, given, errors):
        kept = plan.boundary >= least[len(plan.omit)]
        return {LOSS: Figure(0.0, 0.0, 6), KL: Figure(0.1 if kept else 1.0, 0.0, 6)}

    monkeypatch.setattr(QualityJudge, "measure", measure)
    how = {"max_kl": 0.3, "method": "unfitted", "highest": 5, "trial": TRIAL, "pays_from": (), "time_lengths": ()}

    def found(boundary):
        result = autoplan(model, [text], boundary=boundary, **how)
        return len(result.plan.omit), result.plan.boundary

    assert found(1) == (2, 1)
    assert found((8, 1, 4)) == (4, 8)
    wide = TRIAL.tokens - 1  # saves next to nothing
    assert found((1, wide)) == (2, 1)
    assert found((8, 1)) == (4, 8)
    monkeypatch.setitem(least, 1, 4)
    monkeypatch.setitem(least, 2, 4)
    assert found((1, 4)) == (3, 4)
    # With boundary 8, 6 layers save less than 5 do with boundary 1, but 7 save more; boundary 4 keeps no limit.
    least |= {**dict.fromkeys((1, 2, 3, 4, 5), 1), 6: 8, 7: 8, 8: 99}
    how["highest"] = 8
    assert found((1, 8)) == (7, 8)
    assert found((1, 4, 8)) == (7, 8)


@pytest.mark.parametrize(
    ("chosen", "error", "expected"),
    [
        (Plan(12, (3, 4)), ValueError, "choose: expected a plan that omits 1 of 12 layers, got one of 2 of 12"),
        (Plan(6, (3,)), ValueError, "choose: expected a plan that omits 1 of 12 layers, got one of 1 of 6"),
        ([3], TypeError, "choose: expected a pop_ext.Plan, got list"),
    ],
)
def test_a_choice_of_other_plans_than_asked_is_refused(model, text, chosen, error, expected):
    with pytest.raises(error, match=expected):
        autoplan(model, [text], max_kl=9.0, method="unfitted", highest=1, choose=lambda _: chosen, trial=TRIAL)


def test_every_candidate_is_kept_and_told(found):
    result, _, told = found
    assert told == [(number, None) for number in range(1, len(result.tried) + 1)]
    fitted = [tried for tried in result.tried if tried.fit == "ridge"]
    assert fitted
    assert all(tried.plan.projections is not None for tried in fitted)


def test_the_saved_folder_is_run_by_enable_beside_the_checkpoint(found, model, recwarn):
    result, folder, _ = found
    same = Plan.from_pretrained(folder)
    assert (same, same.card) == (result.plan, result.card)
    other = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    (folder / "checkpoint").mkdir()
    folder.joinpath("checkpoint", "pop_ext").symlink_to(folder)
    other.config._name_or_path = str(folder / "checkpoint")
    assert pop_ext.load(other).plan == result.plan
    assert not [warning for warning in recwarn if warning.category is pop_ext.NoPlanWarning]


def test_the_plan_is_written_before_anything_is_timed(model, text, tmp_path, monkeypatch):
    def fail(*arguments, **named):
        assert Plan.from_pretrained(tmp_path).card.quality
        raise KeyboardInterrupt

    monkeypatch.setattr("pop_ext.methods.latency.shortest_paying", fail)
    with pytest.raises(KeyboardInterrupt):
        autoplan(model, [text], max_kl=5.0, method="unfitted", highest=1, trial=TRIAL, save=tmp_path)
    assert len(Plan.from_pretrained(tmp_path).omit) == 1


def test_no_layer_within_the_budget_gives_the_full_plan(model, text, tmp_path):
    result = autoplan(
        model, [text], max_kl=1e-9, method="unfitted", highest=2, trial=TRIAL, save=tmp_path, progress=False
    )
    assert (result.plan, result.card) == (Plan(12, ()), None)
    assert {tried.count for tried in result.tried} == {1}
    assert not list(tmp_path.iterdir())


def test_a_choice_of_layers_is_used(model, text):
    asked = []

    def choose(count):
        asked.append(count)
        return Plan(12, range(3, 3 + count))

    result = autoplan(
        model,
        [text],
        max_kl=9.0,
        method="unfitted",
        highest=2,
        choose=choose,
        trial=TRIAL,
        pays_from=(),
        time_lengths=(),
    )
    assert result.plan.omit == (3, 4)
    assert asked == [1, 2]
    assert (result.plan.min_tokens, result.card.speed) == (0, ())


def test_recall_is_limited_and_measured(model, text, monkeypatch):
    limits = []

    def measure(self, plan, given, errors):
        limits.append(dict(given))
        return {LOSS: Figure(0.0, 0.0, 6), KL: Figure(0.0, 0.0, 6), RECALL_DROP: Figure(len(plan.omit) / 10, 0.01, 6)}

    monkeypatch.setattr(QualityJudge, "measure", measure)
    monkeypatch.setattr(QualityJudge, "recall", 0.5)
    result = autoplan(
        model,
        [text],
        max_recall_drop=0.25,
        method="unfitted",
        highest=6,
        trial=dataclasses.replace(TRIAL, tokens=90),
        pays_from=(),
        time_lengths=(),
    )
    assert len(result.plan.omit) == 2
    assert limits[0] == {RECALL_DROP: 0.25}
    assert result.recall == 0.5


def test_a_drop_of_all_that_full_depth_answers_is_refused(model, text, monkeypatch):
    monkeypatch.setattr(QualityJudge, "recall", 0.125)
    with pytest.raises(ValueError, match=r"max_recall_drop: expected less than 0\.125, .* got 0\.2"):
        autoplan(model, [text], max_recall_drop=0.2, trial=dataclasses.replace(TRIAL, tokens=90))


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        ({}, ValueError, "max_loss, max_kl, max_recall_drop: expected at least one of them, got none"),
        ({"max_loss": 0}, ValueError, "max_loss: expected more than 0, got 0"),
        ({"max_kl": "x"}, TypeError, "max_kl: expected a number, got 'x'"),
        (
            {"max_kl": 0.1, "method": "least"},
            ValueError,
            "method: expected one of unfitted, ridge, distill, got 'least'",
        ),
        ({"max_kl": 0.1, "highest": 12}, ValueError, r"highest: expected an integer in 1\.\.\.11, got 12"),
        ({"max_kl": 0.1, "boundary": (1, 0)}, ValueError, r"boundary: expected an int >= 1, or .* got \(1, 0\)"),
        ({"max_kl": 0.1, "boundary": 1.5}, TypeError, "boundary: expected an int or a sequence of ints, got float"),
        ({"max_kl": 0.1, "boundary": 999}, ValueError, "boundary: expected fewer rows than the .* got 999"),
    ],
)
def test_bad_arguments_are_named(model, text, change, error, expected):
    with pytest.raises(error, match=expected):
        autoplan(model, [text], trial=TRIAL, **change)


class Recorded(Fitting):
    """A fitting that keeps what is asked of it."""

    made: ClassVar[list[Recorded]] = []

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.made.append(self)
        self.fits = []

    def read(self, batches, advance):
        self.batches = list(batches)
        super().read(self.batches, advance)

    def fitted(self, number, advance, say):
        self.fits.append(len(self.plans[number].omit))
        return super().fitted(number, advance, say)


@pytest.fixture
def fittings(monkeypatch):
    monkeypatch.setattr("pop_ext.methods.fit.Fitting", Recorded)
    monkeypatch.setattr(Recorded, "made", [])
    return Recorded.made


def test_each_fit_gets_its_sequences_and_distill_the_tasks_for_training(model, text, monkeypatch, fittings):
    def candidate_of(judge, stages, highest):
        assert judge(1, "quick ridge", ()).within
        judge(1, "ridge", ())
        return judge(1, "distill", ())

    monkeypatch.setattr(module, "search", candidate_of)
    monkeypatch.setattr(candidates, "QUICK_SHARE", 2)
    monkeypatch.setattr("pop_ext.methods.fitting.distill", lambda model, plan, start, *_: (start, [Judgement(0, 0.0)]))
    trial = dataclasses.replace(TRIAL, tokens=60, samples=17)
    autoplan(model, [text], max_kl=9.0, method="distill", boundary=1, trial=trial, pays_from=(), time_lengths=())
    quick, ridge, distill = fittings
    assert [len(fitting.batches) for fitting in fittings] == [9, 17, 17]
    assert (quick.ridges, ridge.ridges) == ((0.1,), LAMBDAS)
    assert (quick.tasks, quick.training, ridge.tasks, ridge.training) == ([], None, [], None)
    assert distill.training == Training(STEPS, LEARNING_RATE, 0)
    assert {len(prompt) for prompt, _ in distill.tasks} == {60}


def test_one_reading_serves_the_candidates_of_a_stage_and_of_wider_boundaries(model, text, fittings, monkeypatch):
    least = {1: 1, 2: 1, 3: 1, 4: 8, 5: 99}  # number of layers -> smallest boundary within the budget

    def measure(self, plan, given, errors):
        kept = plan.projections is not None and plan.boundary >= least[len(plan.omit)]
        return {LOSS: Figure(0.0, 0.0, 6), KL: Figure(0.1 if kept else 1.0, 0.0, 6)}

    monkeypatch.setattr(QualityJudge, "measure", measure)
    how = {"max_kl": 0.3, "highest": 5, "trial": TRIAL, "pays_from": (), "time_lengths": (), "boundary": (1, 8)}
    found = autoplan(model, [text], **how)
    assert (len(found.plan.omit), found.plan.boundary) == (4, 8)
    assert [([len(plan.omit) for plan in one.plans], one.fits) for one in fittings] == [
        ([1, 3, 4], [3, 4]),  # quick ridge
        ([3, 4, 5], [4, 3, 5]),  # ridge: 4 with boundary 1, 3 because it was found, 4 and 5 with boundary 8
    ]
    alone = pop_ext.fit(model, Plan.last(12, 4), fittings[1].batches)
    assert torch.equal(alone.projections.matrices[9], found.plan.projections.matrices[9])


def test_the_fit_reads_the_first_part_and_the_judge_the_last(model, tokenizer, text, monkeypatch, fittings):
    seen = {"calibration": [], "held-out": []}

    class Recording(QualityJudge):
        def __init__(self, model, texts, tasks, *how):
            seen["held-out"] += [torch.cat(pair) for pair in texts]
            super().__init__(model, texts, tasks, *how)

    monkeypatch.setattr(candidates, "QualityJudge", Recording)
    autoplan(model, [text], max_kl=9.0, highest=1, trial=TRIAL, pays_from=(), time_lengths=())
    seen["calibration"] = [row for fitting in fittings for batch in fitting.batches for row in batch]
    split = split_texts([text], tokenizer, TRIAL.holdout, TRIAL.window)
    for role, parts in (("calibration", split.calibration.plain), ("held-out", split.held_out.plain)):
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        windows = [window[int(begins) :].tolist() for window in seen[role]]
        whole = parts[0].tolist()
        assert windows
        assert all(any(whole[at : at + len(w)] == w for at in range(len(whole))) for w in windows)


# The command


def test_the_command_finds_saves_and_prints_the_plan(tmp_path, capsys):
    from pop_ext.cli.app import app
    from typer.testing import CliRunner

    base = ["calibrate", DEMO / "model", "--text", DEMO / "heldout" / "modulefinder.py.txt", "--dtype", "float32"]
    sizes = [
        "--tokens",
        40,
        "--prompts",
        8,
        "--pays-from",
        16,
        "--time-lengths",
        32,
        "--method",
        "unfitted",
    ]

    def run(*more):
        return CliRunner().invoke(app, [str(word) for word in (*base, *sizes, "--method", "unfitted", *more)])

    result = run("-o", tmp_path / "out", "--max-kl", 0.05)
    assert result.exit_code == 0, result.stderr
    plan = Plan.from_pretrained(tmp_path / "out")
    assert plan.card.asked == {"max_kl": 0.05}
    assert [row.prompts for row in plan.card.quality] == [8, 8]
    for shown in ("unfitted", "costs: kl", "gains: ", str(tmp_path / "out" / "card.json")):
        assert shown in result.stdout
    assert "layers, unfitted, boundary 1: loss" in result.stderr

    report = json.loads(run("-o", tmp_path / "again" / "plan.json", "--max-kl", 0.05, "--json").stdout)
    assert report["omit"] == list(plan.omit)
    assert report["plan"] == str(tmp_path / "again" / "plan.json")
    assert report["card"]["asked"] == {"max_kl": 0.05}

    none = run("-o", tmp_path / "none", "--max-kl", 1e-9)
    assert none.exit_code == 1
    assert "not even one layer" in none.stderr
    assert not (tmp_path / "none").exists()

    for wrong, text in (
        (("-o", tmp_path / "x.json", "--max-kl", 1), "--out: expected a folder, or a file plan.json"),
        (("-o", tmp_path / "x", "--max-kl", 1, "--count", 2), "--count and --max-loss, --max-kl, --max-recall-drop"),
    ):
        refused = run(*wrong)
        assert refused.exit_code == 2
        assert text in refused.stderr


def test_a_foreign_readme_is_refused_before_the_search(model, tokenizer, text, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("# Mine")
    monkeypatch.setattr("pop_ext.methods.autoplan.search", lambda *_: pytest.fail("searched"))
    with pytest.raises(ValueError, match=r"folder: expected no other README\.md"):
        autoplan(model, [text], max_loss=1.0, tokenizer=tokenizer, save=tmp_path)


def test_one_held_out_prompt_is_refused(model, tokenizer, text):
    trial = dataclasses.replace(TRIAL, prompts=1)
    with pytest.raises(ValueError, match="texts: expected enough for two held-out prompts of 48 tokens"):
        autoplan(model, [text], max_loss=1.0, tokenizer=tokenizer, trial=trial)


def test_a_folder_may_have_a_dot_in_its_name(tmp_path):
    assert plan_folder(tmp_path / "Llama-3.2-1B") == tmp_path / "Llama-3.2-1B"
    assert plan_folder(tmp_path / "new" / "plan.json") == tmp_path / "new"
