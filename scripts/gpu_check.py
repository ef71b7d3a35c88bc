"""Test and measure on a machine with an NVIDIA GPU, offline, within nine minutes: ``scripts/gpu_check.sh OUT``.

The stages run in this order, each with a time limit; after a failed stage the next one still runs:

    build      build the package in place, for this GPU's architecture only, and the kernel checks
    tests      the suite with --device cuda
    sanitizer  the kernel checks, plain and under compute-sanitizer: memcheck, racecheck
    bench-8b   Llama-3.1-8B against Hugging Face's sdpa, eager and compiled, on random weights
    bench-1b   Llama-3.2-1B against Hugging Face's sdpa
    kernels    each kernel, relative to the peak that bounds it
    profile    a native prefill, stage by stage
    plot       plot the results of the stages before it

``scripts/gpu_check.sh OUT build tests`` runs only these two. The folder OUT gets log.txt, summary.json, bench-8b.json,
bench-1b.json, kernels.json, profile.json and plot.png. The exit status is 0 if every stage succeeded. Without a GPU, or
with DRY_RUN=1, the same stages run on a CPU with tiny models, as a test of this script: their figures mean nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {
    "build": 110,
    "tests": 110,
    "sanitizer": 60,
    "bench-8b": 125,
    "bench-1b": 50,
    "kernels": 35,
    "profile": 30,
    "plot": 15,
}
"""Time limits of the stages in seconds; together below nine minutes."""

PROCESSES = 14  # of pytest, on 16 cores: the tests spend most of their time on the host
TIMED_OUT = 124
DRY_PATIENCE = 4  # factor of the limits in a dry run, whose machine may be slow
GRACE = 5  # seconds between asking a command to stop and killing it
TOOLKIT = "/usr/local/cuda/bin"
RACY = ("attention of boundary rows", "attention of many rows", "rms_norm", "skinny_gemm", "kv_project_sm90")
"""The kernel checks whose kernels use shared memory."""


@dataclass
class Stage:
    """The outcome of a stage."""

    name: str
    limit: float
    seconds: float = 0.0
    exit_code: int = 0
    counts: dict[str, int] = field(default_factory=dict)


class Run:
    """A run of the script."""

    def __init__(self, out: Path, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.build = ROOT / "build" / "gpu"
        self.log = (out / "log.txt").open("a", encoding="utf-8")
        self.deadline = 0.0
        self.stages: list[Stage] = []
        path = os.environ.get("PATH", "")
        in_place = "" if dry else str(ROOT / "python")  # a dry run builds nothing there and uses the installed package
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{path}:{TOOLKIT}",
            "PYTHONPATH": os.pathsep.join(filter(None, [in_place, os.environ.get("PYTHONPATH", "")])),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def stage(self, name: str, work: Callable[[Run, Stage], int]) -> None:
        """Run a stage, and write the summary so far."""
        stage = Stage(name, LIMITS[name] * (DRY_PATIENCE if self.dry else 1))
        self.stages.append(stage)
        self.say(f"=== {name}")
        started = time.monotonic()
        self.deadline = started + stage.limit
        try:
            stage.exit_code = work(self, stage)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self.say(f"{type(error).__name__}: {error}")
            stage.exit_code = 1
        stage.seconds = round(time.monotonic() - started, 1)
        self.say(f"--- {name}: exit code {stage.exit_code}, {stage.seconds} s {stage.counts or ''}")
        text = json.dumps(self.summary(), indent=1) + "\n"
        (self.out / "summary.json").write_text(text, encoding="utf-8")

    def say(self, line: str) -> None:
        print(line, flush=True)
        print(line, file=self.log, flush=True)

    def command(self, *argv: str) -> int:
        """Run a command within the stage's remaining time. Log its output, and print the end of it."""
        return self.together([argv])

    def together(self, commands: Sequence[Sequence[str]]) -> int:
        """Run commands in parallel, and log their outputs in order. Return 0, or the exit status of one that failed."""
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, str(number)) for number in range(len(commands))]
            processes = [self.start(argv, file) for argv, file in zip(commands, files, strict=True)]
            codes = [self.wait(process) for process in processes]
            for argv, file, code in zip(commands, files, codes, strict=True):
                lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
                head = "$ " + " ".join(argv)
                end = ["ended: the stage's time was up"] if code == TIMED_OUT else []
                print("\n".join([head, *lines, *end]), file=self.log, flush=True)
                print("\n".join([head, *lines[-12:], *end]), flush=True)
        return next((code for code in codes if code != 0), 0)

    def start(self, argv: Sequence[str], file: Path) -> subprocess.Popen[bytes]:
        with file.open("wb") as stream:
            return subprocess.Popen(
                argv, cwd=ROOT, env=self.environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        try:
            return process.wait(max(0.1, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            end_group(process)
            return TIMED_OUT

    def python(self, *argv: str) -> int:
        return self.command(sys.executable, *argv)

    def found(self, tool: str) -> str | None:
        return shutil.which(tool, path=self.environment["PATH"])

    def summary(self) -> dict[str, Any]:
        return {
            "dry_run": self.dry,
            "commit": output("git", "rev-parse", "HEAD"),
            "modified": bool(output("git", "status", "--porcelain", "--untracked-files=no")),
            "gpu": None
            if self.dry
            else output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
            "python": sys.version.split()[0],
            "versions": json.loads(output(sys.executable, "-c", VERSIONS) or "{}"),
            "stages": [vars(stage) for stage in self.stages],
            "failed": [stage.name for stage in self.stages if stage.exit_code != 0],
        }


GPU_QUERY = ("--query-gpu=name,driver_version", "--format=csv,noheader")
VERSIONS = """
import importlib.metadata as m, json
names = ("torch", "transformers", "triton", "flash-attn")
found = {name: m.version(name) for name in names if any(d.name == name for d in m.distributions(name=name))}
print(json.dumps(found))
"""


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a command with all that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(GRACE)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            process.wait()
            return


def output(*argv: str) -> str | None:
    """Return a command's output; None if it fails."""
    try:
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# The stages


def build(run: Run, stage: Stage) -> int:
    if run.dry:
        return run.python("-c", "import pop_ext; print(pop_ext.__version__)")
    capability = (output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader") or "").splitlines()[0]
    architecture = capability.strip().replace(".", "") + ("a" if capability.strip() == "9.0" else "")
    options = [
        "-DPOP_INPLACE=ON",
        "-DPOP_CUDA=ON",
        f"-DPOP_CUDA_ARCHITECTURES={architecture}-real",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    return (
        run.command("cmake", "-G", "Ninja", "-S", ".", "-B", str(run.build), *options)
        or run.command("cmake", "--build", str(run.build), "--target", "_ops", "_core", "cuda_checks")
        or run.python("-m", "pop_ext", "info")
    )


def tests(run: Run, stage: Stage) -> int:
    selection = ["--device", "cuda", "-m", "not cpu"]
    groups = test_groups(PROCESSES)
    if run.dry:
        selection, groups = (
            ["-k", "restore_on_error or stream"],
            [["tests/ops/test_op_prefill.py", "tests/gpu/test_cuda_streams.py"]],
        )
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder, f"{number}.xml") for number in range(len(groups))]
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *selection]
        code = run.together(
            [[*pytest, f"--junitxml={report}", *group] for report, group in zip(reports, groups, strict=True)]
        )
        stage.counts = test_counts([report for report in reports if report.exists()])
    return code


def test_groups(count: int) -> list[list[str]]:
    """Divide the test files into groups of about equal size."""
    groups: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count
    for file in sorted((ROOT / "tests").glob("*/test_*.py"), key=lambda file: file.stat().st_size, reverse=True):
        smallest = sizes.index(min(sizes))
        groups[smallest].append(str(file.relative_to(ROOT)))
        sizes[smallest] += file.stat().st_size
    return groups


def test_counts(reports: Sequence[Path]) -> dict[str, int]:
    """Count tests, failures, errors and skips in JUnit reports."""
    suites = [suite for report in reports for suite in ElementTree.parse(report).getroot().iter("testsuite")]
    names = ("tests", "failures", "errors", "skipped")
    return {name: sum(int(suite.get(name, 0)) for suite in suites) for name in names}


def sanitizer(run: Run, stage: Stage) -> int:
    if run.dry:
        run.say("no GPU: `make shim` runs the kernel checks on a CPU, and under ThreadSanitizer")
        return 0
    checks = str(run.build / "cuda_checks")
    codes = [run.command(checks)]
    tool = run.found("compute-sanitizer")
    if tool is None:
        run.say("compute-sanitizer: expected it on PATH or in the toolkit, found none")
        return 1
    codes.append(run.command(tool, "--tool", "memcheck", "--error-exitcode", "3", checks))
    codes.append(run.command(tool, "--tool", "racecheck", "--error-exitcode", "3", checks, *RACY))
    stage.counts = {"runs": len(codes), "failed": sum(code != 0 for code in codes)}
    return max(codes, key=abs)


def bench(name: str, model: str, *arguments: str) -> Callable[[Run, Stage], int]:
    """Return a stage that runs the bench once, with a budget that leaves time for loading."""
    tiny = ["--model", "demo", "--lengths", "24", "--repeats", "1", "--warmup", "1", "--count", "4"]
    small = [flag for flag in ("--kernels", "--profile", "--no-cases") if flag in arguments]

    def work(run: Run, stage: Stage) -> int:
        where = ["--quiet", "--json", str(run.out / f"{name}.json")]
        if run.dry:
            return run.python("bench/run.py", *tiny, *small, *where)
        budget = str(int(stage.limit * 0.75))
        return run.python("bench/run.py", "--device", "cuda", "--model", model, "--budget", budget, *arguments, *where)

    return work


def plot(run: Run, stage: Stage) -> int:
    reports = [run.out / f"{name}.json" for name in ("bench-8b", "bench-1b", "profile")]
    there = [str(path) for path in reports if path.exists()]
    return run.python("bench/plot.py", str(run.out / "plot.png"), *there)


LENGTHS = ("--lengths", "2048", "8192", "512", "32768", "--batch", "1", "8")
"""Lengths of the bench, the most important first: those beyond the budget are left out, which the output says."""

STAGES: dict[str, Callable[[Run, Stage], int]] = {
    "build": build,
    "tests": tests,
    "sanitizer": sanitizer,
    "bench-8b": bench(
        "bench-8b",
        "llama-3.1-8b",
        *LENGTHS,
        *("--compile", "--compile-lengths", "2048", "--tune", "early_launch=1", "fused_kv_project=1"),
    ),
    "bench-1b": bench("bench-1b", "llama-3.2-1b", *LENGTHS),
    "kernels": bench("kernels", "llama-3.1-8b", "--lengths", "2048", "512", "--kernels", "--no-cases"),
    "profile": bench("profile", "llama-3.1-8b", "--lengths", "2048", "8192", "--profile", "--no-cases"),
    "plot": plot,
}


def main(arguments: list[str]) -> int:
    """Run the stages. Return 0; 1 if a stage failed; 2 for bad arguments."""
    if not arguments or arguments[0].startswith("-"):
        print("expected: scripts/gpu_check.sh OUT [stage ...]", file=sys.stderr)
        return 2
    names = arguments[1:] or list(STAGES)
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        print(f"expected stages of {', '.join(STAGES)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    out = Path(arguments[0]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    dry = os.environ.get("DRY_RUN") == "1" or output("nvidia-smi") is None
    run = Run(out, dry)
    if dry:
        run.say("dry run on a CPU: its figures mean nothing")
    for name in names:
        run.stage(name, STAGES[name])
    return 1 if any(stage.exit_code != 0 for stage in run.stages) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
