"""``pop-ext bench``: hands over to ``bench/run.py`` of a checkout; the wheel does not carry it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import typer

from pop_ext.cli import shared
from pop_ext.cli.shared import JsonOption

_TREE = Path(__file__).resolve().parents[3]  # of a package that lies in its source tree


def bench(context: typer.Context, as_json: JsonOption = False) -> None:
    """Time prefill by Hugging Face and by pop_ext, interleaved; --profile takes it apart by stages.

    All arguments but --json go to bench/run.py of a checkout, whose README lists them: this one's where the package
    lies in its source tree, else that of the working directory.
    """
    with shared.errors():
        command = [sys.executable, str(_script()), *context.args]
    if not as_json:
        raise typer.Exit(subprocess.run(command, check=False).returncode)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        # What it prints is for people: to standard error, so that standard output is JSON and nothing else.
        status = subprocess.run([*command, "--json", str(path)], check=False, stdout=2).returncode
        if path.exists():
            print(path.read_text(encoding="utf-8"))
    raise typer.Exit(status)


def _script() -> Path:
    for root in (_TREE, Path.cwd()):
        if (root / "bench" / "run.py").is_file() and (root / "python" / "pop_ext").is_dir():
            return root / "bench" / "run.py"
    raise FileNotFoundError(
        f"bench: expected a checkout of pop_ext as the working directory, got {Path.cwd()}: the bench is not part of "
        "the installed package; in a checkout it is bench/run.py"
    )
