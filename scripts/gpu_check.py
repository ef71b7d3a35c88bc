"""Test and measure on a machine with an NVIDIA GPU, offline: ``scripts/gpu_check.sh OUT checks``.

Each of three runs takes less than nine minutes and is of use by itself:

    checks       build, tests, sanitizer
    kernels      build, kernel-table, profile
    end-to-end   build, bench-8b, bench-8b-batch, bench-1b, bench-phi, plot, bench-moe

The stages, each with a time limit; after a failed stage the next one still runs:

    build            build the package in place, for this GPU's architecture only, and the kernel checks
    tests            the suite with --device cuda; test files that failed on a GPU before go first
    sanitizer        the kernel checks, plain and under compute-sanitizer: memcheck, racecheck, synccheck, initcheck
    kernel-table     each kernel of Llama-3.1-8B, relative to the peak that bounds it
    profile          a native prefill of it, stage by stage
    bench-8b         Llama-3.1-8B against Hugging Face's sdpa, batch 1, with backend options, fp8 and graphs as arms
    bench-8b-batch   the same at batch 8, whose boundary has 8 rows
    bench-1b         Llama-3.2-1B, batch 1 and 8, with graphs as arms
    bench-phi        Phi-3-mini, q, k and v from one product and from three
    plot             plot the results of the stages before it, where matplotlib is installed
    bench-moe        Qwen1.5-MoE-A2.7B, experts one by one and grouped; last, since 28.6 GB of weights may take too long

``scripts/gpu_check.sh OUT build tests`` runs only these two stages. The folder OUT gets log.txt, summary.json,
clocks.csv (clocks, power and temperature, once a second), a JSON file of each stage that measures, and plot.png. The
exit status is 0 if every stage succeeded. Without a GPU, or with DRY_RUN=1, the same stages run on a CPU with a tiny
model, as a test of this script: their figures mean nothing. A stage with arms under options has one there, under an
option of the CPU. The options of the GPU, fp8 and graphs do not run, nor do the build and the sanitizer.
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
    "tests": 170,
    "sanitizer": 230,
    "kernel-table": 200,
    "profile": 150,
    "bench-8b": 160,
    "bench-8b-batch": 120,
    "bench-1b": 55,
    "bench-phi": 35,
    "plot": 12,
    "bench-moe": 45,
}
"""Time limits of the stages in seconds."""

RUNS = {
    "checks": ("build", "tests", "sanitizer"),
    "kernels": ("build", "kernel-table", "profile"),
    "end-to-end": ("build", "bench-8b", "bench-8b-batch", "bench-1b", "bench-phi", "plot", "bench-moe"),
}
"""Stages of each run; the limits of a run are together below nine minutes."""

FAILED_BEFORE = ("gpu/test_cuda_paths", "ops/test_attention_op", "hf/test_bad_input", "hf/test_vision")
"""Test files that failed on a GPU and have not run there since."""

PROCESSES = 14  # of pytest, on 16 cores: the tests spend most of their time on the host
TIMED_OUT = 124
DRY_PATIENCE = 4  # factor of the limits in a dry run, whose machine may be slow
GRACE = 5  # seconds between asking a command to stop and killing it
TOOLKIT = "/usr/local/cuda/bin"
RACY = (
    "attention of boundary rows",
    "attention of many rows",
    "rms_norm",
    "skinny_gemm",
    "skinny_mma",
    "kv_project_sm90",
)
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

    def watch_clocks(self) -> subprocess.Popen[bytes] | None:
        """Start logging clocks, power and temperature of the GPU; None without one."""
        tool = self.found("nvidia-smi")
        if self.dry or tool is None:
            return None
        query = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
        with (self.out / "clocks.csv").open("wb") as stream:
            return subprocess.Popen(
                [tool, f"--query-gpu={query}", "--format=csv", "--loop=1"], stdout=stream, stderr=subprocess.DEVNULL
            )

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
    capability = ((output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader") or "").split() or [""])[0]
    options = ["-DPOP_INPLACE=ON", "-DPOP_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    if capability:
        architecture = capability.replace(".", "") + ("a" if capability == "9.0" else "")
        options.append(f"-DPOP_CUDA_ARCHITECTURES={architecture}-real")
    else:
        run.say("nvidia-smi names no compute capability: built for all architectures")
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
    """Divide the test files into groups of about equal size. Those that failed before begin their groups."""
    groups: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count

    def first_of_all(file: Path) -> tuple[bool, int]:
        return any(str(file).endswith(f"{name}.py") for name in FAILED_BEFORE), file.stat().st_size

    for file in sorted((ROOT / "tests").glob("*/test_*.py"), key=first_of_all, reverse=True):
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
    for name, only in (("memcheck", ()), ("racecheck", RACY), ("synccheck", RACY), ("initcheck", ())):
        codes.append(run.command(tool, "--tool", name, "--error-exitcode", "3", checks, *only))
    stage.counts = {"runs": len(codes), "failed": sum(code != 0 for code in codes)}
    return max(codes, key=abs)


def bench(name: str, model: str, *arguments: str) -> Callable[[Run, Stage], int]:
    """Return a stage that runs the bench once, with a budget that leaves time for loading."""
    tiny = ["--model", "demo", "--lengths", "24", "--repeats", "1", "--warmup", "1", "--count", "4"]
    small = [flag for flag in ("--kernels", "--profile", "--no-cases") if flag in arguments]
    small += ["--tune", "gemm_blocks=0"] if "--tune" in arguments else []

    def work(run: Run, stage: Stage) -> int:
        where = ["--quiet", "--json", str(run.out / f"{name}.json")]
        if run.dry:
            return run.python("bench/run.py", *tiny, *small, *where)
        budget = str(int(stage.limit * 0.75))
        return run.python("bench/run.py", "--device", "cuda", "--model", model, "--budget", budget, *arguments, *where)

    return work


def plot(run: Run, stage: Stage) -> int:
    if run.python("-c", "import matplotlib") != 0:
        run.say("no matplotlib here: bench/plot.py draws the figure from the JSON files elsewhere")
        return 0
    reports = [run.out / f"{name}.json" for name in (*BENCHES, "profile")]
    there = [str(path) for path in reports if path.exists()]
    return run.python("bench/plot.py", str(run.out / "plot.png"), *there)


SHORT = ("--lengths", "2048", "512", "--batch", "1")

LENGTHS = ("--lengths", "2048", "512", "8192", "2047", "1000")
"""Lengths of the bench, the most important first: those beyond the budget are left out, which the output says."""

OPTIONS = ("early_launch=1", "residual_in_product=0", "sdpa_rows=0", "sdpa_rows=512", "kv_project_kib=24576")

ARMS = ("--no-compile", "--fp8", "--cuda-graphs", "--tune", *OPTIONS)  # ends with options: more may follow
"""Arms of the bench beside Hugging Face's eager model, native at full depth, and pruned."""

BENCHES = ("bench-8b", "bench-8b-batch", "bench-1b", "bench-phi", "bench-moe")

_EIGHT, _ONE = "llama-3.1-8b", "llama-3.2-1b"
_PHI, _MOE = "phi-3-mini-4k-instruct", "qwen1.5-moe-a2.7b"

STAGES: dict[str, Callable[[Run, Stage], int]] = {
    "build": build,
    "tests": tests,
    "sanitizer": sanitizer,
    "kernel-table": bench(
        "kernel-table", _EIGHT, "--lengths", "2048", "512", "8192", "--boundary", "1", "--kernels", "--no-cases"
    ),
    "profile": bench("profile", _EIGHT, "--lengths", "2048", "512", "8192", "--profile", "--no-cases"),
    "bench-8b": bench("bench-8b", _EIGHT, *LENGTHS, "--batch", "1", *ARMS, "fused_kv_project=2,kv_project_halves=1"),
    "bench-8b-batch": bench("bench-8b-batch", _EIGHT, *LENGTHS, "--batch", "8", *ARMS, "skinny_mma_rows=64"),
    "bench-1b": bench("bench-1b", _ONE, *LENGTHS, "--batch", "1", "8", "--no-compile", "--cuda-graphs"),
    "bench-phi": bench("bench-phi", _PHI, *SHORT, "--no-compile", "--tune", "qkv_in_one_product=0"),
    "plot": plot,
    "bench-moe": bench("bench-moe", _MOE, *SHORT, "--no-compile", "--tune", "grouped_experts=1"),
}


def main(arguments: list[str]) -> int:
    """Run the stages. Return 0; 1 if a stage failed; 2 for bad arguments."""
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    known = f"{', '.join(RUNS)} (runs) or {', '.join(STAGES)} (stages)"
    if len(arguments) < 2 or arguments[0].startswith("-"):
        print(f"expected: scripts/gpu_check.sh OUT and then of {known}", file=sys.stderr)
        return 2
    unknown = [name for name in arguments[1:] if name not in STAGES and name not in RUNS]
    if unknown:
        print(f"expected {known}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    named = [stage for name in arguments[1:] for stage in RUNS.get(name, (name,))]
    out = Path(arguments[0]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    dry = os.environ.get("DRY_RUN") == "1" or output("nvidia-smi") is None
    run = Run(out, dry)
    if dry:
        run.say("dry run on a CPU: its figures mean nothing")
    clocks = run.watch_clocks()
    try:
        for name in dict.fromkeys(named):
            run.stage(name, STAGES[name])
    finally:
        if clocks is not None:
            clocks.terminate()
            clocks.wait()
    return 1 if any(stage.exit_code != 0 for stage in run.stages) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
