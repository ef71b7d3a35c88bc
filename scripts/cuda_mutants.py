"""Plant faults of synchronisation in the CUDA kernels, and record what catches each.

A mutant is a copy of ``cuda/`` with one text replaced (``planted_cuda_faults.py``). Its kernel is compiled under the
shim and linked with the checks of ``build/shim``. What may catch it, in this order:

- ``checks``: the kernel's checks on fibers, in which asynchronous copies and products come as late as they may;
- ``races``: the same checks on threads under ThreadSanitizer;
- ``machine code``: ``scripts/check_sass.py``, for kernels with an early launch; needs nvcc.

The same is first done with an unchanged copy, for every kernel and its checks: all must pass there, else no mutant is
tried. A run that does not end in time says nothing about the fault, and is printed as a timeout.

``make cuda-mutants`` compares the result with the table in ``docs/notes/cuda.md``, and fails if it differs::

    python scripts/cuda_mutants.py              # all mutants; builds of the shim must be up to date
    python scripts/cuda_mutants.py --only fence # those whose name has this text; the table is not compared
    python scripts/cuda_mutants.py --write      # write the table
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import check_sass
import cuda_tools
from planted_cuda_faults import MUTANTS, Mutant

ROOT = cuda_tools.ROOT
BUILD = ROOT / "build" / "shim"
PAGE = ROOT / "docs" / "notes" / "cuda.md"
BEGIN, END = "<!-- mutants: written by scripts/cuda_mutants.py -->\n", "<!-- end of mutants -->\n"
SECONDS = 240
"""Of a run of the checks; one that takes longer is a timeout, which is not counted as caught."""

TARGETS = (("cuda_checks", "checks"), ("cuda_races", "races"))
TIMEOUT, NOTHING = "timeout", "nothing"


# ---- Building and running ----


def copy_sources(folder: Path) -> None:
    """Copy the kernels' sources into a folder."""
    (folder / "cuda").mkdir()
    for pattern in ("*.cu", "*.cuh", "*.h"):
        for source in (ROOT / "cuda").glob(pattern):
            shutil.copy(source, folder / "cuda")


def planted(mutant: Mutant, folder: Path) -> Path:
    """Copy the kernels' sources with the fault into a folder, and return the file to compile."""
    copy_sources(folder)
    path = folder / "cuda" / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name}: expected its text once in {mutant.file}, got it {text.count(mutant.old)} times"
        )
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return folder / "cuda" / mutant.unit


def linked(source: Path, unit: str, target: str, folder: Path) -> Path:
    """Compile a source in the place of `unit` of a target of the shim, link it, and return the program."""

    def commands(output: str) -> list[list[str]]:
        done = subprocess.run(
            ["ninja", "-C", str(BUILD), "-t", "commands", output], capture_output=True, text=True, check=True
        )
        return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("ninja:")]

    unit_object = f"CMakeFiles/{'pop_cuda' if target == 'cuda_checks' else target}.dir/cuda/{unit}.o"
    compile_command = [part for part in commands(unit_object)[-1] if part not in ("-MD",)]
    for option in ("-MT", "-MF"):
        at = compile_command.index(option)
        del compile_command[at : at + 2]
    own_object = folder / f"{target}.o"
    compile_command[compile_command.index("-o") + 1] = str(own_object)
    compile_command[-1] = str(source)
    compile_command[1:1] = [f"-I{folder}"]
    subprocess.run(compile_command, cwd=BUILD, check=True, capture_output=True)
    link = commands(target)[-1]
    link = link[link.index("&&") + 1 :] if "&&" in link[:3] else link
    link = link[: link.index("&&")] if "&&" in link else link
    program = folder / target
    link[link.index("-o") + 1] = str(program)
    at = link.index("-o")
    link = [str(own_object) if part == unit_object else part for part in link]
    if str(own_object) not in link:
        link[at:at] = [str(own_object)]  # before the archive, whose own object is then not needed
    subprocess.run(link, cwd=BUILD, check=True, capture_output=True)
    return program


def outcome(program: Path, checks: tuple[str, ...]) -> str:
    """Return "passed", "failed" (a wrong result, a crash or a race) or "timeout"."""
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    try:
        done = subprocess.run(
            [str(program), *checks], capture_output=True, timeout=SECONDS, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return TIMEOUT
    return "passed" if done.returncode == 0 else "failed"


def fails_in_machine_code(source: Path, folder: Path) -> bool:
    """Return True if scripts/check_sass.py has anything to say about the kernels of a file."""
    kernels = check_sass.early_sources(source.parent).get(source)
    if kernels is None:
        return False
    fatbin = folder / "mutant.fatbin"
    os.environ["NVCC_PREPEND_FLAGS"] = f"-I{folder}"  # before the folders of the checkout
    cuda_tools.compile_kernels(source, fatbin, ["90a"])
    return check_sass.check(check_sass.parse(cuda_tools.disassemble(fatbin)), kernels)[1] > 0


def outcomes(source: Path, unit: str, checks: tuple[str, ...], folder: Path) -> Iterator[tuple[str, str]]:
    """Yield what looks at a source, the quickest first, and its outcome."""
    for target, what in TARGETS:
        yield what, outcome(linked(source, unit, target, folder), checks)
    yield "machine code", "failed" if fails_in_machine_code(source, folder) else "passed"


def fails_unchanged(mutants: Iterable[Mutant]) -> list[str]:
    """Return what does not pass for the kernels as they are, of all that the mutants need."""
    found = []
    for unit, checks in dict.fromkeys((mutant.unit, mutant.checks) for mutant in mutants):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            copy_sources(folder)
            for what, result in outcomes(folder / "cuda" / unit, unit, checks, folder):
                if result != "passed":
                    found.append(f"{what} of {unit} ({', '.join(checks)}): {result}")
    return found


def caught_by(mutant: Mutant) -> str:
    """Return what catches a mutant, the quickest first; else "timeout" if a run did not end in time, or "nothing"."""
    otherwise = NOTHING
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what, result in outcomes(planted(mutant, folder), mutant.unit, mutant.checks, folder):
            if result == "failed":
                return what
            if result == TIMEOUT:
                print(f"{TIMEOUT:12} {mutant.name}: {what} did not end within {SECONDS} s", flush=True)
                otherwise = TIMEOUT
    return otherwise


# ---- The table ----


def table(results: dict[str, str]) -> str:
    """Return the table for the page."""
    lines = ["| fault | caught by |", "|---|---|"]
    for mutant in MUTANTS:
        found = results[mutant.name]
        lines.append(f"| {mutant.name} | {found}{f': {mutant.why_not}' if found == NOTHING else ''} |")
    caught = sum(found not in (NOTHING, TIMEOUT) for found in results.values())
    return "\n".join([*lines, "", f"{caught} of {len(MUTANTS)} are caught.", ""])


def uncaught(mutant: Mutant, found: str) -> bool:
    """Return True if something should have caught a mutant, or if a timeout leaves that open."""
    return found == TIMEOUT or (found == NOTHING and not mutant.why_not)


def on_page() -> str:
    """Return the table that the page has."""
    text = PAGE.read_text(encoding="utf-8")
    return text.partition(BEGIN)[2].partition(END)[0]


def main() -> int:
    """Try the mutants, print what catches each, and compare it with the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="a part of the names of the mutants to try")
    parser.add_argument("--write", action="store_true", help="write the table into docs/notes/cuda.md")
    arguments = parser.parse_args()
    if cuda_tools.find_nvcc() is None or cuda_tools.find_cuobjdump() is None:
        print(f"expected nvcc, cuobjdump and nvdisasm: {cuda_tools.HOW_TO_INSTALL}")
        return 1
    chosen = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
    if unchanged := fails_unchanged(chosen):
        print(*(f"FAILED: without a fault: {what}" for what in unchanged), "no mutant was tried", sep="\n")
        return 1
    results = {}
    for mutant in chosen:
        results[mutant.name] = caught_by(mutant)
        print(f"{results[mutant.name]:12} {mutant.name}", flush=True)
    failed = [f"{results[m.name]}: {m.name}" for m in chosen if uncaught(m, results[m.name])]
    print(*(f"FAILED: {line}" for line in failed), sep="\n")
    if not arguments.only and arguments.write:
        text = PAGE.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        PAGE.write_text(before + BEGIN + table(results) + END + rest.partition(END)[2], encoding="utf-8")
    elif not arguments.only and on_page() != table(results):
        print(f"FAILED: the table of {PAGE.relative_to(ROOT)} differs; --write writes it")
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
