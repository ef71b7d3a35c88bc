"""Plant faults of synchronisation in the CUDA kernels, and record what catches each.

A mutant is a copy of ``cuda/`` with one text replaced. Its kernel is compiled under the shim and linked with the checks
of ``build/shim``. What may catch it, in this order:

- ``checks``: the kernel's checks on fibers, in which asynchronous copies and products come as late as they may;
- ``races``: the same checks on threads under ThreadSanitizer;
- ``machine code``: ``scripts/check_sass.py``, for kernels with an early launch; needs nvcc.

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
from dataclasses import dataclass
from pathlib import Path

import check_sass
import cuda_tools

ROOT = cuda_tools.ROOT
BUILD = ROOT / "build" / "shim"
PAGE = ROOT / "docs" / "notes" / "cuda.md"
BEGIN, END = "<!-- mutants: written by scripts/cuda_mutants.py -->\n", "<!-- end of mutants -->\n"
SECONDS = 240
"""Of a run; a longer one counts as a deadlock."""


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # of cuda/, which has `old` exactly once
    old: str
    new: str
    unit: str  # the .cu file that is compiled
    checks: tuple[str, ...]  # of cuda_checks
    why_not: str = ""  # why nothing here can catch it; empty: something must


NORM = ("rms_norm.cu", ("rms_norm",))
ATTENTION = ("attention.cu", ("attention of boundary rows", "attention of many rows"))
FUSED = ("kv_project_sm90.cu", ("kv_project_sm90",))
MMA = ("skinny_mma.cu", ("skinny_mma",))
WAITS = "  wait_for_kernels_in_front();\n  let_kernel_behind_start();\n"

MUTANTS = (
    Mutant(
        "attention: barrier between loaded K and the scores removed",
        "attention.cu",
        "    __syncthreads();  // K is loaded; V and the probabilities may be overwritten\n",
        "",
        *ATTENTION,
    ),
    Mutant(
        "attention: barrier between the scores and the next K removed",
        "attention.cu",
        "    __syncthreads();  // the scores are stored; K may be overwritten\n",
        "",
        *ATTENTION,
    ),
    Mutant(
        "attention: barrier between V and its use removed",
        "attention.cu",
        "    __syncthreads();  // the probabilities are stored and V is loaded\n",
        "",
        *ATTENTION,
    ),
    Mutant(
        "attention: barrier before the sums take the place of K removed",
        "attention.cu",
        "  __syncthreads();  // K and V may be overwritten\n",
        "",
        *ATTENTION,
    ),
    Mutant(
        "attention: wait for the copy of the first K removed",
        "attention.cu",
        "    if (is_first) {\n      __pipeline_wait_prior(1);",
        "    if (is_first) {",
        *ATTENTION,
    ),
    Mutant(
        "attention: wait for the copy of V removed, last tile",
        "attention.cu",
        "    if (is_last) {\n      __pipeline_wait_prior(0);",
        "    if (is_last) {",
        *ATTENTION,
    ),
    Mutant(
        "attention: wait for the copy of V one group short",
        "attention.cu",
        "    } else {\n      __pipeline_wait_prior(1);\n    }",
        "    } else {\n      __pipeline_wait_prior(2);\n    }",
        *ATTENTION,
    ),
    Mutant(
        "attention: barrier before partial outputs are added removed, merge",
        "attention.cu",
        "  __syncthreads();\n  T* out = static_cast<T*>(p.out)",
        "  T* out = static_cast<T*>(p.out)",
        *ATTENTION,
    ),
    Mutant(
        "attention: __syncwarp before a running maximum is overwritten removed",
        "attention_tile.cuh",
        "  __syncwarp();  // all lanes have read tile.max; a shuffle orders no memory\n",
        "",
        *ATTENTION,
    ),
    Mutant("sum over a block: barrier removed", "launch.cuh", "= value;\n  __syncthreads();\n", "= value;\n", *NORM),
    Mutant(
        "rms_norm: two sums over a block share their memory",
        "rms_norm.cu",
        "    delta_rstd = rms_scale(block_sum(sum, partial_delta), p.width, p.eps);\n  }\n  float sum = 0.0f;\n"
        "#pragma unroll\n",
        "    delta_rstd = rms_scale(block_sum(sum, partial), p.width, p.eps);\n  }\n  float sum = 0.0f;\n"
        "#pragma unroll\n",
        *NORM,
    ),
    Mutant(
        "rms_norm: wait for kernels in front removed",
        "rms_norm.cu",
        WAITS + "  const Row<T> row(p);\n  const int width",
        "  let_kernel_behind_start();\n  const Row<T> row(p);\n  const int width",
        *NORM,
    ),
    Mutant(
        "gated_act: read before the wait for kernels in front",
        "gated_act.cu",
        WAITS,
        "  const float early = to_float(static_cast<const T*>(p.up)[threadIdx.x % p.width]);\n"
        + WAITS
        + "  if (early == 12345.0f) return;\n",
        "gated_act.cu",
        ("gated_act",),
    ),
    Mutant(
        "gated_act: next kernel let start before the wait",
        "gated_act.cu",
        WAITS,
        "  let_kernel_behind_start();\n  wait_for_kernels_in_front();\n",
        "gated_act.cu",
        ("gated_act",),
    ),
    Mutant(
        "skinny_gemm: rows of `a` read before the wait",
        "skinny_gemm.cu",
        "  if (k < end) load_ahead();\n  wait_for_kernels_in_front();",
        "  if (k < end) load_ahead();\n  if (k < end && to_float(*a) == 12345.0f) sums[0] = 1.0f;\n"
        "  wait_for_kernels_in_front();",
        "skinny_gemm.cu",
        ("skinny_gemm",),
    ),
    Mutant(
        "skinny_gemm: barrier before the sums are added removed",
        "skinny_gemm.cu",
        "  __syncthreads();\n",
        "",
        "skinny_gemm.cu",
        ("skinny_gemm",),
    ),
    Mutant(
        "skinny_mma: barrier before the sums are overwritten removed",
        "skinny_mma.cu",
        "    if (first > 0) __syncthreads();  // the sums before have been read\n",
        "",
        *MMA,
    ),
    Mutant(
        "skinny_mma: two words of a fragment exchanged",
        "skinny_mma.cu",
        "{low[2 * half], high[2 * half], low[2 * half + 1], high[2 * half + 1]}",
        "{low[2 * half], low[2 * half + 1], high[2 * half], high[2 * half + 1]}",
        *MMA,
    ),
    Mutant(
        "route: __syncwarp removed",
        "route.cu",
        "  __syncwarp();  // lane 0 wrote the weights\n",
        "",
        "route.cu",
        ("route",),
    ),
    Mutant(
        "group_rows: barrier removed",
        "route.cu",
        "  own[threadIdx.x] = equal;\n  __syncthreads();\n",
        "  own[threadIdx.x] = equal;\n",
        "route.cu",
        ("route",),
    ),
    Mutant(
        "kv_project_sm90: __syncwarp before a stage is released removed",
        "kv_project_sm90.cu",
        "  __syncwarp();  // all lanes have read it\n",
        "",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: producer does not wait for an empty stage",
        "kv_project_sm90.cu",
        "      sm90::barrier_wait(&ring.empty[at.stage], at.parity ^ 1);\n",
        "",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: consumers do not wait for a full stage",
        "kv_project_sm90.cu",
        "    sm90::barrier_wait(&ring.full[at.stage], at.parity);\n",
        "",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: stage released while its products may run",
        "kv_project_sm90.cu",
        "sm90::multiply_wait<1>();",
        "sm90::multiply_wait<2>();",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: wait for the last products removed",
        "kv_project_sm90.cu",
        "  sm90::multiply_wait<0>();\n",
        "",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: fence before the products removed",
        "kv_project_sm90.cu",
        "    sm90::multiply_fence();\n",
        "",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: fence behind the new barriers removed",
        "kv_project_sm90.cu",
        "    sm90::barrier_init_fence();\n",
        "",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: first cluster barrier removed",
        "kv_project_sm90.cu",
        "  sm90::cluster_sync();\n  const int group",
        "  const int group",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: last cluster barrier removed",
        "kv_project_sm90.cu",
        "so neither block may exit first.\n  sm90::cluster_sync();\n",
        "so neither block may exit first.\n",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: accumulators not tied to the end of the products",
        "kv_project_sm90.cu",
        "  sm90::multiply_done(sums);\n",
        "",
        *FUSED,
        why_not="the compiler may read an accumulator early, and here it need not: only the results of a GPU show it",
    ),
    Mutant(
        "wait for kernels in front does not order memory for the compiler",
        "launch.cuh",
        'asm volatile("griddepcontrol.wait;" ::: "memory");',
        'asm volatile("griddepcontrol.wait;");',
        "gated_act.cu",
        ("gated_act",),
        why_not="the compiler may move a load over the wait, and in this kernel does not; if it did, `make sass` would "
        "say so",
    ),
)


# ---- Building and running ----


def planted(mutant: Mutant, folder: Path) -> Path:
    """Copy the kernels' sources with the fault into a folder, and return the file to compile."""
    (folder / "cuda").mkdir()
    for pattern in ("*.cu", "*.cuh", "*.h"):
        for source in (ROOT / "cuda").glob(pattern):
            shutil.copy(source, folder / "cuda")
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


def fails(program: Path, checks: tuple[str, ...]) -> bool:
    """Return True if a check fails, crashes, reports a race or does not end."""
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    try:
        done = subprocess.run(
            [str(program), *checks], capture_output=True, timeout=SECONDS, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def fails_in_machine_code(source: Path, folder: Path) -> bool:
    """Return True if scripts/check_sass.py has anything to say about the kernels of a file."""
    kernels = check_sass.early_sources(source.parent).get(source)
    if kernels is None:
        return False
    fatbin = folder / "mutant.fatbin"
    os.environ["NVCC_PREPEND_FLAGS"] = f"-I{folder}"  # before the folders of the checkout
    cuda_tools.compile_kernels(source, fatbin, ["90a"])
    return check_sass.check(check_sass.parse(cuda_tools.disassemble(fatbin)), kernels)[1] > 0


def caught_by(mutant: Mutant) -> str:
    """Return what catches a mutant, the quickest first; "nothing" if nothing does."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = planted(mutant, folder)
        for target, what in (("cuda_checks", "checks"), ("cuda_races", "races")):
            if fails(linked(source, mutant.unit, target, folder), mutant.checks):
                return what
        if fails_in_machine_code(source, folder):
            return "machine code"
    return "nothing"


# ---- The table ----


def table(results: dict[str, str]) -> str:
    """Return the table for the page."""
    lines = ["| fault | caught by |", "|---|---|"]
    for mutant in MUTANTS:
        found = results[mutant.name]
        lines.append(f"| {mutant.name} | {found}{f': {mutant.why_not}' if found == 'nothing' else ''} |")
    caught = sum(found != "nothing" for found in results.values())
    return "\n".join([*lines, "", f"{caught} of {len(MUTANTS)} are caught.", ""])


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
    results = {}
    for mutant in MUTANTS:
        if arguments.only not in mutant.name:
            continue
        results[mutant.name] = caught_by(mutant)
        print(f"{results[mutant.name]:12} {mutant.name}", flush=True)
    failed = [m.name for m in MUTANTS if results.get(m.name) == "nothing" and not m.why_not]
    print(*(f"FAILED: nothing catches {name}" for name in failed), sep="\n")
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
