"""`pop-ext calibrate` and `fit`: an option that the others leave without effect is an error, which names both."""

from __future__ import annotations

import inspect
from pathlib import Path

import models
import pop_ext
import pytest
import torch
from model_folder import save_tiny_llama
from pop_ext.cli.app import app
from pop_ext.methods.defaults import LEARNING_RATE, STEPS
from pop_ext.methods.importance import Importance
from pop_ext.plans.plan import Plan
from transformers import AutoTokenizer
from typer.testing import CliRunner

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
LIMITS = "--max-loss or --max-kl or --max-recall-drop"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("given", "error"),
    [
        # Values that equal the defaults: what counts is that they were given.
        ("--method ridge", f"--method: expected it only with {LIMITS}"),
        ("--prompts 48", f"--prompts: expected it only with {LIMITS}"),
        ("--time-lengths 1024", f"--time-lengths: expected it only with {LIMITS}"),
        ("--highest 3", f"--highest: expected it only with {LIMITS}"),
        ("--int8 --count 2", f"--int8: expected it only with {LIMITS}"),
        ("--by-importance", f"--by-importance: expected it only with {LIMITS}"),
        ("--by-importance --count 2", f"--by-importance: expected it only with {LIMITS}"),
        ("--budget-tokens 2048", "--budget-tokens: expected it only with --budget-ms or --speedup"),
        ("--budget-tokens 64 --count 2", "--budget-tokens: expected it only with --budget-ms or --speedup"),
        ("--max-kl 1 --count 2", "expected one of them, got --count and --max-kl"),
        ("--max-loss 1 --budget-ms 2", "expected one of them, got --budget-ms and --max-loss"),
        ("--max-loss 1 --speedup 2", "expected one of them, got --speedup and --max-loss"),
        ("--max-recall-drop 1 --budget-tokens 2048", "got --budget-tokens and --max-recall-drop"),
        ("--max-loss 1 --free", "--free: expected it beside --max-loss only with --by-importance, got it without"),
        ("--max-kl 1 --branches", "--branches: expected it beside --max-kl only with --by-importance, got it without"),
        ("--max-kl 1 --method unfitted --samples 9", "--samples: expected it beside --method unfitted only with"),
        ("--max-kl 1 --recompute", "--recompute: expected it beside --max-kl only with --by-importance"),
    ],
)
def test_calibrate_refuses_an_option_that_it_would_not_read(tmp_path, given, error):
    base = ("calibrate", tmp_path / "no-model", "--text", tmp_path / "no.txt", "-o", tmp_path / "o")
    result = run(*base, *given.split())
    assert result.exit_code == 2
    assert error in result.stderr
    assert not (tmp_path / "o").exists()


TINY = "--tokens 40 --samples 4 --prompts 4 --pays-from= --time-lengths= --dtype float32 --boundary 1"


@pytest.mark.parametrize("how", ["", "--by-importance"])
@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("--max-recall-drop 0.01", "--max-recall-drop: expected at least 0.25 with 4 retrieval tasks"),
        ("--max-recall-drop 0.01", "a larger --prompts than 4"),
        ("--max-loss -1", "--max-loss: expected more than 0, got -1.0"),
        ("--max-loss 1 --method best", "--method: expected one of unfitted, ridge, distill, got 'best'"),
        ("--max-loss 1 --boundary 40", "--boundary: expected fewer rows than the 40 of --tokens, got [40]"),
        ("--max-loss 1 --tokens 1984", "--text: expected enough for two held-out prompts of 2048 tokens"),
        ("--max-loss 1 --int8", "--time-lengths: expected a length to time with int8=True, got []"),
        ("--max-loss 1 --highest 12", "--highest: expected an integer in 1...11, got 12"),
    ],
)
def test_an_error_of_a_budget_names_the_option_and_leaves_no_folder(tmp_path, given, error, how):
    text = DEMO / "heldout" / "modulefinder.py.txt"
    result = run(
        "calibrate", DEMO / "model", "--text", text, "-o", tmp_path / "o", *TINY.split(), *given.split(), *how.split()
    )
    assert result.exit_code == 2
    assert error in result.stderr
    assert not (tmp_path / "o").exists()


def test_prompts_too_short_for_a_task_name_the_option(tmp_path):
    text, options = DEMO / "heldout" / "modulefinder.py.txt", (*TINY.split(), "--max-loss", "1", "--method", "distill")
    result = run("calibrate", DEMO / "model", "--text", text, "-o", tmp_path / "o", *options)
    assert result.exit_code == 2
    assert "pop-ext: --tokens: expected at least" in result.stderr
    assert not (tmp_path / "o").exists()


def test_warnings_are_a_line_each_and_an_older_plan_is_named(tmp_path):
    text = DEMO / "heldout" / "modulefinder.py.txt"
    options = TINY.replace("--samples 4", "--method unfitted --highest 1").split()
    base = ("calibrate", DEMO / "model", "--text", text, "--text", text, "-o", tmp_path, *options)
    found = run(*base, "--max-kl", 9)
    assert found.exit_code == 0, found.stderr
    assert "pop-ext: warning: of 2 texts 1 are copies, and left out: modulefinder.py.txt\n" in found.stderr
    assert "Only 4 prompts judged the plan" in found.stdout
    assert len({one.sha256 for one in Plan.from_pretrained(tmp_path).card.texts}) == 1
    none = run(*base, "--max-kl", 1e-9)
    assert none.exit_code == 1
    assert f"pop-ext: warning: no plan within the budget was found, and {tmp_path} still holds an older" in none.stderr
    assert len(Plan.from_pretrained(tmp_path).omit) == 1


def test_a_reason_on_the_screen_names_the_option(tmp_path):
    text, options = DEMO / "heldout" / "modulefinder.py.txt", TINY.replace("--samples 4", "--method unfitted").split()
    found = run("calibrate", DEMO / "model", "--text", text, "-o", tmp_path, *options, "--highest", 1, "--max-kl", 9)
    assert "not measured: recall drop: the texts make no retrieval tasks (--tokens: expected" in found.stdout


@pytest.mark.parametrize("command", ["calibrate", "fit"])
def test_sequences_beyond_the_positions_of_the_model_are_refused(tmp_path, command):
    Plan.last(12).save(tmp_path / "plan.json")
    plan = (tmp_path / "plan.json",) if command == "fit" else ()
    text = DEMO / "heldout" / "modulefinder.py.txt"
    result = run(command, DEMO / "model", *plan, "--text", text, "-o", tmp_path / "o.json", "--tokens", 2049)
    assert result.exit_code == 2
    assert "--tokens: expected at most the 2048 that the model takes, got 2049" in result.stderr


def test_scores_of_other_texts_in_the_folder_are_named(tmp_path):
    options = ("--max-kl", "9", "--by-importance", *TINY.split(), "--method", "unfitted", "-o", tmp_path / "o")
    texts = (DEMO / "heldout" / "modulefinder.py.txt", DEMO / "heldout" / "pprint.py.txt")
    assert run("calibrate", DEMO / "model", "--text", texts[0], *options).exit_code == 0
    result = run("calibrate", DEMO / "model", "--text", texts[1], *options)
    assert result.exit_code == 2
    assert (
        f"--out: expected no importance.json of other texts or settings in the folder, got {tmp_path}" in result.stderr
    )


@pytest.mark.cpu
def test_calibrate_with_int8_says_whether_it_pays_and_writes_it_on_the_card(tmp_path):
    text, options = DEMO / "heldout" / "modulefinder.py.txt", TINY.replace("--samples 4", "--method unfitted").split()
    options[options.index("--time-lengths=")] = "--time-lengths=32,48"
    more = ("--highest", 1, "--max-kl", 9, "--int8")
    found = run("calibrate", DEMO / "model", "--text", text, "-o", tmp_path, *options, *more)
    assert found.exit_code == 0, found.stderr
    card = Plan.from_pretrained(tmp_path).card
    assert [(row.of, row.tokens) for row in card.int8] == [
        (of, tokens) for of in ("full depth", "the plan") for tokens in (32, 48)
    ]
    assert {row.prompts for row in card.int8} == {4}
    assert [line for line in found.stdout.splitlines() if line.startswith("int8, ")] == [
        f"int8, {row}" for row in card.int8
    ]
    assert "## 8-bit integers" in (tmp_path / "README.md").read_text()


@pytest.mark.cpu
def test_calibrate_with_int8_of_a_model_that_cannot_have_it_is_one_line(tmp_path):
    save_tiny_llama(tmp_path / "model")
    models.mixtral().save_pretrained(tmp_path / "model")
    text, options = DEMO / "heldout" / "modulefinder.py.txt", ("--max-loss", 1, "--int8", "-o", tmp_path / "o")
    result = run("calibrate", tmp_path / "model", "--text", text, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("pop-ext: --int8: expected a model without experts")
    assert not (tmp_path / "o").exists()


def test_a_path_in_an_error_stays_as_it_is(tmp_path):
    text = tmp_path / "trial.md"
    text.write_bytes(b"\xff")
    result = run("calibrate", DEMO / "model", "--text", text, "-o", tmp_path / "o", "--max-loss", 1)
    assert result.stderr == f"pop-ext: {text}: expected UTF-8, got byte 0xff at offset 0\n"


@pytest.mark.parametrize(("limit", "says"), [("100", True), ("0.0001", False)])
def test_calibrate_says_that_more_layers_were_not_tried(tmp_path, limit, says):
    text = DEMO / "heldout" / "modulefinder.py.txt"
    options = ("--max-loss", limit, "--method", "unfitted", *TINY.replace("--samples 4", "").split())
    result = run("calibrate", DEMO / "model", "--text", text, "-o", tmp_path / "o", *options)
    assert ("more than 6 layers were not tried (--highest)" in result.stdout) == says


@pytest.mark.parametrize("given", ["--tasks 96", "--steps 120", "--seed 0", "--learning-rate 0.0003", "--resume st.pt"])
def test_fit_refuses_settings_of_a_training_with_a_ridge(tmp_path, given):
    Plan.last(12).save(tmp_path / "plan.json")
    text = DEMO / "heldout" / "pprint.py.txt"
    options = ("--text", text, "-o", tmp_path / "out.json", "--samples", 3, "--tokens", 32, *given.split())
    result = run("fit", DEMO / "model", tmp_path / "plan.json", *options)
    assert result.exit_code == 2
    assert f"{given.split()[0]}: expected it with --method distill only" in result.stderr


def test_the_help_of_fit_states_the_defaults_of_the_function():
    defaults = inspect.signature(pop_ext.fit).parameters
    assert (defaults["steps"].default, defaults["learning_rate"].default) == (STEPS, LEARNING_RATE)


def test_a_plan_by_importance_within_a_limit_scores_branches_and_reads_the_texts_once(tmp_path, monkeypatch):
    text = DEMO / "heldout" / "modulefinder.py.txt"
    read, real = [], type(AutoTokenizer.from_pretrained(DEMO / "model")).__call__

    def count(self, content, *arguments, **named):
        read.append(len(content))
        return real(self, content, *arguments, **named)

    monkeypatch.setattr(type(AutoTokenizer.from_pretrained(DEMO / "model")), "__call__", count)
    options = ["--tokens", 40, "--samples", 4, "--prompts", 4, "--pays-from=", "--time-lengths=", "--dtype", "float32"]
    options += ["--method", "unfitted", "--max-kl", 0.2, "--by-importance", "--branches", "--recompute"]
    result = run("calibrate", DEMO / "model", "--text", text, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    scores = Importance.load(tmp_path / "out" / "importance.json")
    assert scores.attention is not None
    assert read.count(len(text.read_text())) == 1
    omit = Plan.from_pretrained(tmp_path / "out").omit
    assert torch.equal(torch.tensor(omit), torch.arange(omit[0], omit[-1] + 1))


def test_a_free_choice_within_a_limit_takes_the_layers_of_lowest_importance(tmp_path):
    text = DEMO / "heldout" / "modulefinder.py.txt"
    options = ("--max-kl", "0.5", "--by-importance", "--free", *TINY.split(), "--method", "unfitted", "-o", tmp_path)
    result = run("calibrate", DEMO / "model", "--text", text, *options)
    assert result.exit_code == 0, result.stderr
    plan, scores = Plan.from_pretrained(tmp_path), Importance.load(tmp_path / "importance.json")
    assert plan.omit == scores.plan(len(plan.omit), contiguous=False).omit
