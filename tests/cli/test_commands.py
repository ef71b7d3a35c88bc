"""`pop-ext calibrate`, `fit`, `eval` and `report` on a tiny model with a tokenizer."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pop_ext
import pytest
from model_folder import save_tiny_llama
from pop_ext import Plan
from pop_ext.cli import html_report
from pop_ext.cli.app import app
from pop_ext.cli.options import find_files, parse_numbers
from pop_ext.evaluation import read_texts
from pop_ext.evaluation.prompts import texts_before_holdout
from transformers import AutoTokenizer
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def files(tmp_path):
    """Two texts to calibrate on, and one to evaluate on."""
    for name, letter in (("a", "x"), ("b", "y"), ("eval", "z")):
        (tmp_path / f"{name}.txt").write_text(f"def square({letter}):\n    return {letter} * {letter}\n" * 8)
    return [tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "eval.txt"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def texts(paths):
    """The option --text once per path."""
    return [word for path in paths for word in ("--text", path)]


def calibrate(folder, files, out, *options):
    common = ("--tokens", 32, "--samples", 6, "--pays-from", "16,64")
    return run("calibrate", folder, *texts(files[0]), "-o", out, *common, *options)


QUICK = ("--counts", "1-2", "--boundary", "1,4", "--lengths", "24,48", "--continuation", 6, "--samples", 3)
QUICK += ("--greedy", 3, "--recall", "32", "--time-lengths", "16,32", "--repeats", 3)


def evaluate(folder, files, out, *options):
    return run("eval", folder, "--text", files[1], "-o", out, *QUICK, *options)


def test_calibrate_writes_plan_importance_and_figure(folder, files, tmp_path):
    result = calibrate(folder, files, tmp_path / "out" / "plan.json", "--count", 2, "--json", "--boundary", 3)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    plan, imp = Plan.load(report["plan"]), pop_ext.methods.importance.Importance.load(report["importance"])
    assert plan.omit == imp.plan(2).omit == tuple(report["omit"])
    assert plan.boundary == 3
    assert plan.min_tokens in (16, 64, 65)
    assert plan.origin.method == "gates, contiguous"
    assert plan.origin.samples == imp.samples == 6
    assert report["prefill"] == list(imp.prefill)
    assert Path(report["plots"][0]).read_bytes().startswith(b"\x89PNG")
    printed = calibrate(folder, files, tmp_path / "out" / "plan.json", "--count", 2, "--free")
    assert printed.exit_code == 0, printed.output
    for text in ("continuation", "omitted", "(6 samples)", "plan.json"):
        assert text in printed.stdout


def test_calibrate_within_a_budget_reports_the_measured_times(folder, files, tmp_path):
    options = ("--budget-ms", 60000, "--budget-tokens", 20, "--pays-from", "", "--json")
    result = calibrate(folder, files, tmp_path / "plan.json", *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["omit"] == []
    assert report["budget"]["seconds"] == 60
    assert set(report["budget"]["measured_seconds"]) >= {"0", "5"}
    assert "the fewest within 60 s" in Plan.load(tmp_path / "plan.json").origin.method


def test_fit_distils_on_texts_and_tasks(tmp_path, monkeypatch):
    folder = save_tiny_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}({i * 7}): return {i * i + 3}\n" for i in range(200)))
    seen, fit = {}, pop_ext.fit
    monkeypatch.setattr(pop_ext, "fit", lambda *args, **options: (seen.update(options), fit(*args, **options))[1])
    make, made, tokenizer = pop_ext.evaluation.retrieval_pairs, [], AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(
        pop_ext.evaluation,
        "retrieval_pairs",
        lambda *args, **options: (made.append(args[0]), make(*args, **options))[1],
    )
    Plan(6, (4, 5)).save(tmp_path / "plan.json")
    out, state = tmp_path / "distilled.json", tmp_path / "state.pt"
    options = ("--method", "distill", "--tasks", 9, "--steps", 4, "--learning-rate", 1e-3, "--seed", 3)
    common = ("--text", text, "-o", out, "--samples", 10, "--tokens", 200, *options, "--resume", state)
    result = run("fit", folder, tmp_path / "plan.json", *common)
    assert result.exit_code == 0, result.output
    assert (seen["steps"], seen["learning_rate"], seen["seed"], seen["resume"]) == (4, 1e-3, 3, state)
    assert [len(prompt) for prompt, _ in seen["tasks"]] == [200] * 9
    report = Plan.load(out).projections.report
    assert (report.method, report.tasks) == ("distill", 8)
    assert "KL of held-out text" in result.stdout
    assert state.exists()
    # Tasks are made from what stands before the held-out sequences.
    whole = read_texts([text], tokenizer)
    rest = texts_before_holdout(whole, tokenizer, 200, 10, 2).plain
    assert [ids.tolist() for ids in made[0].plain] == [ids.tolist() for ids in rest]
    assert 0 < len(rest[0]) < len(whole.plain[0]) - 400
    short = run("fit", folder, tmp_path / "plan.json", *common, "--tokens", 40)
    assert short.exit_code == 2
    assert "--tokens: expected at least" in short.stderr
    for option, value in (("--steps", 4), ("--learning-rate", 0.1), ("--seed", 1), ("--resume", state)):
        refused = run("fit", folder, tmp_path / "plan.json", *common[: -len(options) - 2], option, value)
        assert refused.exit_code == 2, refused.output


def test_fit_holds_out_the_last_sequences_and_saves_the_plan(folder, files, tmp_path, monkeypatch):
    seen, fit = {}, pop_ext.fit

    def watched(model, plan, batches, **options):
        seen.update(options, plan=plan, batches=batches)
        return fit(model, plan, batches, **options)

    monkeypatch.setattr(pop_ext, "fit", watched)
    Plan(6, (4, 5)).save(tmp_path / "plan.json")
    out = tmp_path / "fitted" / "plan.json"
    common = (*texts(files[0]), "-o", out, "--samples", 10, "--tokens", 32)
    result = run("fit", folder, tmp_path / "plan.json", *common, "--json")
    assert result.exit_code == 0, result.output
    report, fitted = json.loads(result.stdout), Plan.load(out)
    assert fitted.projections.layers == (4, 5)
    assert seen["plan"] == Plan(6, (4, 5)) == fitted.replace(projections=None)
    assert [list(ids.shape) for ids in seen["batches"]] == [[1, 32]] * 8
    assert [list(ids.shape) for ids in seen["holdout"]] == [[1, 32]] * 2
    assert seen["progress"] is False
    assert report["held_out"] == report["fit"]["holdout"] == 2
    assert report["fit"]["losses"] == [list(row) for row in fitted.projections.report.to_dict()["losses"]]
    printed = run("fit", folder, tmp_path / "plan.json", *common).stdout
    for text in (
        "8 sequences, 2 held out",
        "original projections",
        "chosen",
        str(out),
        str(out.with_suffix(".safetensors")),
    ):
        assert text in printed


def test_eval_measures_every_arm_and_draws_the_figures(folder, files, tmp_path):
    result = evaluate(folder, files, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    arms = [row["arm"] for row in report["rows"] if row["set"] == "recall"]
    assert arms == [
        "full",
        *(f"pop {layers} b{rows}" for layers in ("5", "4-5") for rows in (1, 4)),
        *(f"no-kv {layers} b{rows}" for layers in ("5", "4-5") for rows in (1, 4)),
        *("no-boundary 5", "no-boundary 4-5", "dropped 5", "dropped 4-5"),
    ]
    assert {(row["set"], row["length"]) for row in report["rows"]} == {("text", 24), ("text", 48), ("recall", 32)}
    exact = next(row for row in report["rows"] if row["arm"] == "pop 5 b1")
    assert exact["delta_loss"][0] == pytest.approx(0, abs=1e-4)  # no row reads the last layer's context rows
    names = {Path(path).stem for path in report["plots"]}
    assert names == {"cost", "frontier", "lengths", "recall", "ttft"}
    printed = evaluate(folder, files, tmp_path / "out")
    assert printed.exit_code == 0, printed.output
    for text in ("3 text prompts of 24 tokens", "pop 4-5 b4", "dropped 4-5", "exact"):
        assert text in printed.stdout


def test_eval_measures_retrieval_and_second_turns_and_prints_times(folder, files, tmp_path):
    longer = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    options = ("--retrieval", 240, "--second-turn", 250, "--counts", 2, "--boundary", 1, "--kinds", "pop,no-kv")
    result = evaluate(longer, files, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    found = pop_ext.evaluation.Evaluation.load(tmp_path / "out" / "evaluation.json")
    rows = {(row["set"], row["length"]): row for row in found.summary() if row["kind"] == "pop"}
    assert {("retrieval", 240), ("second turn", 250)} <= rows.keys()
    assert rows["retrieval", 240].keys() >= {"exact", "delta_exact", "kl"}
    assert not [row for row in found.summary() if row["kind"] == "no-kv" and row["set"] == "second turn"]
    for text in ("3 retrieval prompts of 240 tokens", "3 second turn prompts of 250", "exact", "KL"):
        assert text in result.stdout
    times = result.stdout.partition("time to first token")[2]
    for text in ("Hugging Face full", "native full", "pop 4-5 b1", "16 tokens", "times as"):
        assert text in times


def test_eval_takes_saved_plans_and_refuses_a_folder_of_other_prompts(folder, files, tmp_path):
    Plan(6, (1, 2)).save(tmp_path / "one.json")
    Plan(6, (3,)).save(tmp_path / "two.json")
    plans = ("--plan", tmp_path / "one.json", "--plan", tmp_path / "two.json")
    how = ("--lengths", 24, "--samples", 2, "--recall", "", "--time-lengths", "", "--greedy", 0, "--continuation", 4)
    base = ("eval", folder, "--text", files[1], *plans, "-o", tmp_path / "out", "--kinds", "pop")
    result = run(*base, *how, "--json")
    assert result.exit_code == 0, result.output
    assert [row["arm"] for row in json.loads(result.stdout)["rows"]] == ["full", "pop 1-2 b1", "pop 3 b1"]
    other = run(*base, *how[:-1], 5)
    assert other.exit_code == 2
    assert "resume: expected texts and continuations (--text, --continuation)" in other.stderr


def test_eval_of_a_single_prompt_has_null_for_its_standard_errors(folder, files, tmp_path):
    options = ("--samples", 1, "--counts", 1, "--recall", "", "--time-lengths", "", "--kinds", "pop", "--json")
    result = evaluate(folder, files, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    [value, error] = json.loads(result.stdout, parse_constant=pytest.fail)["rows"][0]["loss"]
    assert value > 0
    assert error is None


def test_eval_times_the_plans_of_earlier_calls_again_with_its_own(folder, files, tmp_path):
    out = tmp_path / "out"
    for count, lengths in ((1, "16,32"), (2, "16")):
        options = ("--counts", count, "--boundary", 1, "--time-lengths", lengths, "--kinds", "pop", "--json")
        assert evaluate(folder, files, out, *options).exit_code == 0
    timed = [(time["arm"], time["tokens"]) for time in json.loads((out / "evaluation.json").read_text())["timings"]]
    assert sorted(timed) == sorted(
        [(arm, 16) for arm in ("Hugging Face full", "native full", "pop 5 b1", "pop 4-5 b1")]
        + [(arm, 32) for arm in ("Hugging Face full", "native full", "pop 5 b1")]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--counts", "x"], "--counts: expected numbers like 1,2,4 or 1-6, got 'x'"),
        (["--counts", "6"], "expected an integer in 0...5, got 6"),
        (["--lengths", "4000"], "pop-ext: --lengths: expected at most"),
        (["--recall", "0"], "pop-ext: --recall: expected integers from 2, got [0]"),
        (["--retrieval", "8"], "pop-ext: --retrieval: expected"),
        (["--second-turn", "8"], "pop-ext: --second-turn: expected"),
        (["--kinds", "none"], "kinds: expected of full, pop"),
    ],
)
def test_bad_options_of_eval_are_one_line_and_status_2(folder, files, tmp_path, options, message):
    result = run("eval", folder, "--text", files[1], "-o", tmp_path / "out", "--recall", "", "--lengths", 24, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_two_ways_to_choose_the_layers_are_refused(folder, files, tmp_path):
    result = calibrate(folder, files, tmp_path / "plan.json", "--count", 2, "--speedup", 1.2)
    assert result.exit_code == 2
    assert "--count and --speedup: expected one of them" in result.stderr


def test_a_report_is_one_page_that_needs_no_network(folder, files, tmp_path):
    out = tmp_path / "out"
    assert evaluate(folder, files, out, "--json").exit_code == 0
    assert calibrate(folder, files, out / "plan.json", "--count", 2, "--json").exit_code == 0
    stage = {"name": "mlp", "seconds": 0.002, "share": 0.5, "flops": 1e9, "bytes": 1e6, "share_of_peak": 0.8}
    profile = {"model": "m", "dtype": "float32", "arm": "pop 2/6", "tokens": 64, "seconds": 0.004, "stages": [stage]}
    (out / "bench.json").write_text(json.dumps({"cases": [], "profiles": [profile]}))
    (out / "other.json").write_text("[1]")
    fitting = (*texts(files[0]), "-o", out / "fitted.json", "--samples", 10, "--tokens", 32)
    assert run("fit", folder, out / "plan.json", *fitting).exit_code == 0
    fitted = Plan.load(out / "fitted.json").projections.report
    result = run("report", out, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report["from"]) >= {"evaluation.json", "plan.json", "plan.importance.json", "bench.json", "cost.png"}
    assert "other.json" not in report["from"]
    page = Path(report["page"]).read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 7  # five of eval, importance, stages
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert not re.search(r"(https?:)?//\w", re.sub(r'base64,[^"]+', "", page))
    assert "prefers-color-scheme: dark" in page
    for text in (
        "pop 4-5 b4",
        "first token, to full depth",
        "<small>(",
        "Importance of layers",
        "Fitted projections: ridge towards the original projections, lambda",
        f"{fitted.sequences} sequences, {fitted.tokens} tokens",
        "original projections</td>",
        f"{fitted.residuals[5][1]:.1%}",
        "500.0 GFLOP/s",
        "80 %",
    ):
        assert text in page, text


def test_a_report_escapes_the_contents_of_files(tmp_path):
    members = {"omit": [1], "num_layers": 2, "origin": {"method": "<script>"}}
    (tmp_path / "<b>.json").write_text(json.dumps(members))
    (tmp_path / '"><i>.png').write_bytes(b"")
    assert run("report", tmp_path).exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<b>" not in page
    assert "<i>" not in page


def test_a_report_without_jinja2_says_what_to_install(tmp_path, monkeypatch):
    Plan(6, (4, 5)).save(tmp_path / "plan.json")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = run("report", tmp_path)
    assert result.exit_code == 2
    assert result.stderr == "pop-ext: report: expected jinja2: pip install 'pop_ext[cli]'\n"


def test_a_folder_without_results_is_named(tmp_path):
    result = run("report", tmp_path)
    assert result.exit_code == 2
    assert "expected results of calibrate, eval or bench, got none" in result.stderr


@pytest.mark.parametrize(
    ("text", "said"), [('{"facts": ', "expected JSON"), ('{"gates": {}, "origin": 1}', "expected a result as")]
)
def test_a_report_names_the_file_it_cannot_read(tmp_path, text, said):
    (tmp_path / "broken.json").write_text(text)
    result = run("report", tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path / 'broken.json'}: {said}" in result.stderr


def test_without_matplotlib_eval_keeps_results_and_reports_missing_figures(folder, files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = evaluate(folder, files, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plots"] == []
    assert "no figures: plot: expected matplotlib: pip install 'pop_ext[plot]'" in result.stderr


def test_numbers_are_parsed_from_lists_and_ranges():
    assert parse_numbers("--x", "1-3, 8") == [1, 2, 3, 8]
    assert parse_numbers("--x", " ") == []
    assert parse_numbers("--x", "5") == [5]


def test_a_pattern_stands_for_its_files_sorted(files, tmp_path):
    (a, b), other = files
    (tmp_path / "c.txt").mkdir()  # a folder is no text
    assert find_files("--text", [str(other), f"{tmp_path}/[ab].txt"]) == [other, a, b]
    assert find_files("--text", [f"{tmp_path.parent}/**/{tmp_path.name}/*.txt"]) == [a, b, other]
    assert find_files("--text", ["absent.txt"]) == [Path("absent.txt")]  # reading it fails with its name
    (tmp_path / "[1].txt").write_text("x")
    assert find_files("--text", [f"{tmp_path}/[1].txt"]) == [tmp_path / "[1].txt"]
    with pytest.raises(ValueError, match=r"--text: expected a pattern that matches a file, got '.*\*\.none'"):
        find_files("--text", [f"{tmp_path}/*.none"])


def test_eval_takes_a_pattern_of_texts(folder, files, tmp_path):
    result = run(
        "eval", folder, "--text", f"{tmp_path}/*al.txt", "-o", tmp_path / "out", *QUICK, "--counts", 1, "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["texts"] == [str(files[1])]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("x.json", lambda path: path.symlink_to("/dev/zero"), "expected JSON (expected a file of at most"),
        ("x.png", lambda path: path.symlink_to("/dev/zero"), "expected a file of at most"),
        ("x.json", os.mkfifo, "expected JSON (expected a file, got a pipe"),
        ("x.json", lambda path: path.write_text("[" * 100_000), "expected JSON (maximum recursion depth exceeded"),
    ],
    ids=["device", "device as figure", "pipe", "nested"],
)
def test_a_report_refuses_files_without_an_end_by_name(tmp_path, monkeypatch, name, make, said):
    monkeypatch.setattr(html_report, "LIMIT", 1 << 24)
    Plan(6, (4, 5)).save(tmp_path / "plan.json")
    make(tmp_path / name)
    result = run("report", tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path / name}: {said}" in result.stderr
