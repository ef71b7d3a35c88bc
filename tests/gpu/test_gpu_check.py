"""scripts/gpu_check.sh reports what happened and runs every stage. Tested here as a dry run, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import gpu_check  # noqa: E402

from bench import cli  # noqa: E402
from bench.shapes import SHAPES  # noqa: E402


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DRY_RUN": "1", "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [str(ROOT / "scripts" / "gpu_check.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_failed_stage_is_reported_and_the_next_runs(tmp_path):
    done = check(str(tmp_path), "plot", "build")  # nothing to draw yet
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert done.returncode == 1, done.stdout + done.stderr
    assert [stage["name"] for stage in summary["stages"]] == ["plot", "build"]
    assert summary["failed"] == ["plot"]
    assert summary["stages"][1]["exit_code"] == 0
    assert summary["stages"][1]["seconds"] > 0
    assert summary["dry_run"] is True
    assert "torch" in summary["versions"]
    assert "=== plot" in (tmp_path / "log.txt").read_text()


def test_a_profile_is_measured_and_drawn(tmp_path):
    done = check(str(tmp_path), "profile", "plot")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "plot.png").stat().st_size > 1000
    stages = {
        stage["name"]
        for item in json.loads((tmp_path / "profile.json").read_text())["profiles"]
        for stage in item["stages"]
    }
    assert {"qkv", "attention", "mlp", "kv_project", "boundary"} <= stages
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.txt", "plot.png", "profile.json", "summary.json"]


def test_tests_are_counted(tmp_path):
    done = check(str(tmp_path), "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    [stage] = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert stage["counts"]["tests"] > stage["counts"]["skipped"] > 0
    assert stage["counts"]["failures"] == stage["counts"]["errors"] == 0


@pytest.mark.parametrize("arguments", [[], ["out"], ["--out", "build"], ["out", "build", "speed"]])
def test_bad_arguments_are_refused(arguments, capsys):
    assert gpu_check.main(arguments) == 2
    assert "expected" in capsys.readouterr().err


def test_a_slow_command_is_ended_with_what_it_started(tmp_path):
    run = gpu_check.Run(tmp_path, dry=True)
    run.stage("plot", lambda run, stage: stall(run))
    [stage] = run.stages
    assert stage.exit_code == gpu_check.TIMED_OUT
    assert stage.seconds < 5
    assert "ended: the stage's time was up" in (tmp_path / "log.txt").read_text()


def stall(run: gpu_check.Run) -> int:
    run.deadline -= gpu_check.DRY_PATIENCE * gpu_check.LIMITS["plot"] - 0.5
    return run.command("sh", "-c", "sleep 60 & sleep 60")


def test_help_names_every_run_and_stage(capsys):
    assert gpu_check.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in [*gpu_check.RUNS, *gpu_check.STAGES])


@pytest.mark.parametrize("run", gpu_check.RUNS)
def test_a_run_fits_into_nine_minutes(run):
    assert set(gpu_check.LIMITS) == set(gpu_check.STAGES)
    assert sum(gpu_check.LIMITS[stage] for stage in gpu_check.RUNS[run]) < 9 * 60


def test_a_run_is_its_stages_and_a_machine_without_matplotlib_draws_nothing(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.setattr(
        gpu_check, "STAGES", {name: (lambda run, stage: ran.append(stage.name) or 0) for name in gpu_check.STAGES}
    )
    assert gpu_check.main([str(tmp_path), "end-to-end", "build"]) == 0
    assert ran == list(gpu_check.RUNS["end-to-end"])
    run = gpu_check.Run(tmp_path, dry=True)
    monkeypatch.setattr(run, "python", lambda *argv: 1 if argv == ("-c", "import matplotlib") else pytest.fail("drawn"))
    assert gpu_check.plot(run, gpu_check.Stage("plot", 1)) == 0


def test_a_machine_whose_nvidia_smi_prints_nothing_builds_for_all_architectures(tmp_path, monkeypatch):
    run, commands = gpu_check.Run(tmp_path, dry=False), []
    monkeypatch.setattr(gpu_check, "output", lambda *argv: "")
    monkeypatch.setattr(run, "command", lambda *argv: commands.append(argv) or 0)
    assert gpu_check.build(run, gpu_check.Stage("build", 1)) == 0
    assert not any("ARCHITECTURES" in option for command in commands for option in command)


def test_every_bench_names_known_models_and_options(tmp_path, monkeypatch):
    documented = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
    run, commands = gpu_check.Run(tmp_path, dry=False), []
    monkeypatch.setattr(run, "python", lambda *argv: commands.append(argv) or 0)
    measured = [name for name in gpu_check.STAGES if name.startswith(("bench-", "kernel-", "profile"))]
    for name in measured:
        assert gpu_check.STAGES[name](run, gpu_check.Stage(name, 100)) == 0
    arms = set()
    for script, *arguments in commands:
        options = cli.parser().parse_args(arguments)
        assert script == "bench/run.py"
        assert set(options.model) <= SHAPES.keys()
        names = {name for text in options.tune for name in cli.parse_options(text)}
        assert all(f"| `{name}` | CUDA |" in documented for name in names)
        arms |= names | ({"--cuda-graphs"} if options.cuda_graphs else set())
    assert {"early_launch", "residual_in_product", "qkv_in_one_product", "grouped_experts", "--cuda-graphs"} <= arms
    assert {"skinny_mma_rows", "fused_kv_project", "kv_project_halves"} <= arms
    assert len(commands) == len(measured) == 7


@pytest.mark.parametrize(("name", "has_arms"), [("bench-8b-batch", True), ("bench-moe", True), ("profile", False)])
def test_a_dry_run_has_an_arm_under_an_option_where_the_stage_has_some(name, has_arms, tmp_path, monkeypatch):
    run, commands = gpu_check.Run(tmp_path, dry=True), []
    monkeypatch.setattr(run, "python", lambda *argv: commands.append(argv) or 0)
    assert gpu_check.STAGES[name](run, gpu_check.Stage(name, 100)) == 0
    [(_, *arguments)] = commands
    options = cli.parser().parse_args(arguments)
    assert options.tune == (["gemm_blocks=0"] if has_arms else [])
    assert cli._problem(options) is None


def test_the_stage_that_may_run_out_of_time_is_the_last():
    assert gpu_check.RUNS["end-to-end"][-2:] == ("plot", "bench-moe")


def test_files_that_failed_on_a_gpu_begin_their_groups():
    firsts = {Path(group[0]).stem for group in gpu_check.test_groups(8)}
    assert {Path(name).name for name in gpu_check.FAILED_BEFORE} <= firsts


def test_every_test_file_is_in_one_group():
    files = [file for group in gpu_check.test_groups(8) for file in group]
    assert sorted(files) == sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").glob("*/test_*.py"))
