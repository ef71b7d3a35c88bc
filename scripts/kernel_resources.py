"""Write docs/results/kernel-resources.md: shared memory and registers of every CUDA kernel, and what devices allow.

Registers and static shared memory are what ptxas reports. Dynamic shared memory is what the launchers ask for: their
code is compiled for the CPU (tests/gpu/cuda_shim) and run with the limit of each architecture. Needs nvcc, takes some
minutes, and no GPU::

    python scripts/kernel_resources.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import check_sass
import cuda_tools

ROOT = cuda_tools.ROOT
SHIM = ROOT / "tests" / "gpu" / "cuda_shim"
PAGE = ROOT / "docs" / "results" / "kernel-resources.md"

# Bytes of shared memory that a block can be given (cudaDevAttrMaxSharedMemoryPerBlockOptin), from the table of compute
# capabilities in the CUDA programming guide.
LIMITS = {"80": 166_912, "86": 101_376, "89": 101_376, "90a": 232_448, "100": 232_448, "120": 101_376}

HEAD_DIMS = (64, 80, 96, 128, 192, 256)  # in the table; the launcher takes any multiple of 8 up to 256
KV_PROJECT = """#include <cstdio>
#include "cuda/kv_project_sm90.cu"
int main() { std::printf("%zu", pop::cuda::kSharedBytes); }
"""


class Tile(NamedTuple):
    """A tile of attention.cu that some call gets on a device with `limit` bytes of shared memory per block."""

    limit: int
    dtype: str
    head_dim: int
    queries: int
    bytes: int


class Use(NamedTuple):
    """What ptxas reports of one form of a kernel."""

    kernel: str  # with its template arguments
    architecture: str
    registers: int
    shared: int
    spilled: int


# ---- Dynamic shared memory, of launchers that run on the CPU ----


def run_on_shim(source: Path, *arguments: str) -> str:
    """Compile a program that includes a .cu file as C++, and return what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program")
        flags = [
            "-std=c++20",
            "-O0",
            "-DPOP_CUDA_SHIM",
            "-Wno-unknown-pragmas",
            f"-I{SHIM}",
            f"-I{ROOT}/cpp",
            f"-I{ROOT}",
        ]
        files = [source, SHIM / "cuda_shim.cpp", SHIM / "device_shim.cpp"]
        subprocess.run(["c++", *flags, "-o", program, *files], check=True)
        return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def attention_tiles(limits: Iterable[int]) -> list[Tile]:
    """Return every tile that attention.cu may launch under each limit, for all dtypes and widths of heads."""
    lines = run_on_shim(SHIM / "attention_tiles.cpp", *map(str, sorted(set(limits)))).splitlines()
    rows = (line.split() for line in lines)
    return [Tile(int(limit), dtype, int(dim), int(queries), int(size)) for limit, dtype, dim, queries, size in rows]


def kv_project_bytes() -> int:
    """Return the dynamic shared memory of kv_project_sm90_kernel."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kv_project.cpp")
        source.write_text(KV_PROJECT, encoding="utf-8")
        return int(run_on_shim(source))


# ---- Registers and static shared memory ----

ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores")
USED = re.compile(r"Used (\d+) registers")
STATIC = re.compile(r"(\d+) bytes smem")


def parse_uses(text: str) -> list[Use]:
    """Return what `ptxas -v` has printed of each kernel."""
    found: list[Use] = []
    kernel = architecture = ""
    spilled = 0
    for line in text.splitlines():
        if match := ENTRY.search(line):
            kernel, architecture = check_sass.demangle(match[1]), match[2]
        elif match := SPILLS.search(line):
            spilled = int(match[1])
        elif match := USED.search(line):
            shared = STATIC.search(line)
            found.append(Use(kernel, architecture, int(match[1]), int(shared[1]) if shared else 0, spilled))
    return found


def compiled_uses() -> list[Use]:
    """Compile every kernel for every architecture, and return what each uses."""
    uses = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "cuda").glob("*.cu")):
            print(f"compiling {source.name}", file=sys.stderr)
            uses += parse_uses(cuda_tools.compile_kernels(source, Path(folder, "out"), LIMITS, "-Xptxas=-v"))
    return [use for use in uses if use.kernel.startswith("kv_project") <= (use.architecture == "90a")]


# ---- Tables ----


def capability(architecture: str) -> str:
    digits = architecture.rstrip("af")
    return f"{digits[:-1]}.{digits[-1]}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def largest_tiles(tiles: list[Tile]) -> str:
    """Return the table of limits: the largest tile of queries for each dtype and width of heads."""
    largest: dict[tuple[int, str, int], Tile] = {}
    for tile in tiles:
        key = tile.limit, tile.dtype, tile.head_dim
        if key not in largest or largest[key].queries < tile.queries:
            largest[key] = tile
    rows = []
    for architecture, limit in LIMITS.items():
        for name, dtype in (("float32", "f32"), ("16 bits", "bf16")):
            chosen = [largest[limit, dtype, head_dim] for head_dim in HEAD_DIMS]
            rows.append([capability(architecture), f"{limit:,}", name, *(f"{t.queries}: {t.bytes:,}" for t in chosen)])
    head = ["compute capability", "limit", "elements", *(f"head_dim {head_dim}" for head_dim in HEAD_DIMS)]
    return table(head, rows)


def bytes_of_tiles(tiles: list[Tile]) -> str:
    """Return the table of dynamic shared memory: bytes of each tile of attention_kernel."""
    size = {(tile.dtype, tile.queries, tile.head_dim): tile.bytes for tile in tiles}
    rows = [
        [name, str(queries), *(f"{size[dtype, queries, head_dim]:,}" for head_dim in HEAD_DIMS)]
        for name, dtype in (("float32", "f32"), ("16 bits", "bf16"))
        for queries in (4, 8, 16, 32)
    ]
    return table(["elements", "queries", *(f"head_dim {head_dim}" for head_dim in HEAD_DIMS)], rows)


def by_numbers(name: str) -> list[tuple[int, str]]:
    """Return a key for sorting that orders the numbers in names by value."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def registers(uses: list[Use]) -> str:
    """Return the table of registers: forms of attention_kernel one by one, of other kernels the most of all forms."""
    groups: dict[tuple[str, bool], list[Use]] = defaultdict(list)
    for use in uses:
        plain = use.kernel.partition("<")[0]
        alone = plain == "attention_kernel"
        groups[use.kernel if alone else plain, alone].append(use)
    rows = []
    for (name, _), group in sorted(groups.items(), key=lambda item: by_numbers(item[0][0])):
        cells = []
        for architecture in LIMITS:
            here = [use for use in group if use.architecture == architecture]
            spilled = max((use.spilled for use in here), default=0)
            most = str(max((use.registers for use in here), default="-"))
            cells.append(f"{most} (spills {spilled} bytes)" if spilled else most)
        forms = len({use.kernel for use in group})
        rows.append([f"`{name}`", str(forms), f"{max(use.shared for use in group):,}", *cells])
    return table(["kernel", "forms", "static shared memory", *map(capability, LIMITS)], rows)


def spilling(uses: list[Use]) -> str:
    """Return a clause that says which architectures have kernels that spill."""
    found = [capability(a) for a in LIMITS if any(use.spilled and use.architecture == a for use in uses)]
    return f"so one for {', '.join(found)} would fail" if found else "none of these do"


def nvcc_version() -> str:
    """Return the version of nvcc."""
    text = subprocess.run([cuda_tools.find_nvcc() or "nvcc", "--version"], check=True, capture_output=True, text=True)
    return re.search(r"V([\d.]+)", text.stdout)[1]  # type: ignore[index]


def page(tiles: list[Tile], kv_project: int, uses: list[Use]) -> str:
    """Return the text of the page."""
    return f"""# Resources of the kernels

Shared memory and registers of every CUDA kernel, beside what the devices allow. `python scripts/kernel_resources.py`
writes this page; no GPU is involved. A test compares the bytes with what the launchers ask for.

## Tiles of attention

Of the kernels that run on all architectures, only `attention_kernel` asks for dynamic shared memory. Its launcher takes
tiles of up to 32 queries, but none that needs more than the device gives a block
(`cudaDevAttrMaxSharedMemoryPerBlockOptin`). The largest tile for a head size, and its bytes:

{largest_tiles(tiles)}

Every tile:

{bytes_of_tiles(tiles)}

`kv_project_sm90_kernel` asks for {kv_project:,} bytes. It runs on compute capability 9.0 alone, where the limit is
{LIMITS["90a"]:,}; a `static_assert` compares them. A launch that asks for more than the device has fails with a message
that names the kernel, the bytes and the limit (`cuda/launch.cuh`).

## Registers and static shared memory

Registers per thread by compute capability, compiled with nvcc {nvcc_version()}, and bytes per block: the most of all
forms (template arguments) of a kernel. The default build has code for all of these. A build fails where a kernel
spills registers; {spilling(uses)}.

{registers(uses)}
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(attention_tiles(LIMITS.values()), kv_project_bytes(), compiled_uses()), encoding="utf-8")


if __name__ == "__main__":
    main()
