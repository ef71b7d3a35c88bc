"""Check in machine code that kernels with an early launch wait for the kernel in front of them.

``launch_early`` (cuda/launch.cuh) starts a kernel before the one in front has ended. Such a kernel must, on every path
from its first instruction to its wait (``griddepcontrol.wait``, in SASS ``ACQBULK``),

- touch no global memory, except for loads of weights that its source names, and whose number is checked;
- not exit, since an exit counts as the trigger of a thread;
- not let the next kernel start (``griddepcontrol.launch_dependents``, in SASS ``PREEXIT``).

The compiler moves instructions, so the source does not show this. Early kernels are all kernels of the files that call
``launch_early``. A comment ``// check_sass: some_kernel loads 4 weights early`` names loads of weights::

    python scripts/check_sass.py              # compiles what has changed into build/sass; needs nvcc
    python scripts/check_sass.py LIBRARY ...  # of a build with CUDA kernels: libraries, objects, fatbins or cubins

Prints a line for each kernel and architecture, and a reason for each violation; exit status 1 if there is any.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cuda_tools

ROOT = cuda_tools.ROOT
ARCHITECTURES = ("90a", "100", "120")
FIRST_WITH_EARLY_LAUNCHES = 90

MARKER = re.compile(r"// check_sass: (\w+) loads (\d+) weights early")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\(")
EARLY_CALL = re.compile(r"\blaunch_(?:early|as)\s*\(")
DEFINES_LAUNCHES = "launch.cuh"

# ---- Which kernels are launched early ----


def included_text(path: Path, folder: Path, seen: set[Path]) -> str:
    """Return the text of a file and of those that it includes from `folder`, but not of launch.cuh."""
    if path in seen or path.name == DEFINES_LAUNCHES or not path.is_file():
        return ""
    seen.add(path)
    text = path.read_text(encoding="utf-8")
    names = re.findall(r'#include "(?:cuda/)?([\w./]+)"', text)
    return "".join([text, *(included_text(folder / name, folder, seen) for name in names)])


def early_sources(folder: Path) -> dict[Path, dict[str, int]]:
    """Return the files that call launch_early, and of each its kernels: name -> loads of weights before the wait."""
    found = {}
    for path in sorted(folder.rglob("*.cu")):
        text = included_text(path, folder, set())
        code = COMMENT.sub("", text)
        if not EARLY_CALL.search(code):
            continue
        kernels = KERNEL.findall(code)
        if len(kernels) != code.count("__global__"):
            raise ValueError(f"{path}: expected the name of each of {code.count('__global__')} kernels, got {kernels}")
        loads = {name: int(count) for name, count in MARKER.findall(text)}
        if unknown := loads.keys() - set(kernels):
            raise ValueError(f"{path}: expected markers of its kernels {kernels}, got one of {sorted(unknown)}")
        found[path] = {name: loads.get(name, 0) for name in kernels}
    if not found:
        raise ValueError(f"{folder}: expected .cu files that call launch_early, got none")
    return found


def names_kernel(symbol: str, name: str) -> bool:
    """Return True if a mangled symbol is the kernel `name`, in any namespace and with any template arguments."""
    return symbol == name or f"{len(name)}{name}" in symbol


# ---- SASS ----


@dataclass
class Instruction:
    address: int
    guard: str  # of the predicate, with its !; empty without one
    operation: str
    operands: str

    @property
    def base(self) -> str:
        return self.operation.split(".")[0]

    @property
    def target(self) -> int | None:
        """The address at the end of the operands."""
        last = self.operands.rpartition(",")[2].strip()
        return int(last, 16) if last.startswith("0x") else None

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:04x} {guard}{self.operation} {self.operands}".rstrip()


@dataclass
class Function:
    architecture: str
    symbol: str
    code: list[Instruction] = field(default_factory=list)


CODE_FOR = re.compile(r"^code for (sm_\w+)$")
FUNCTION = re.compile(r"^Function : (\S+)$")
INSTRUCTION = re.compile(r"^/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


def parse(text: str) -> Iterator[Function]:
    """Yield the functions in what `cuobjdump -sass` prints."""
    architecture, function = "", None
    for line in map(str.strip, text.splitlines()):
        if match := CODE_FOR.match(line):
            architecture = match[1]
        elif match := FUNCTION.match(line):
            if function is not None:
                yield function
            function = Function(architecture, match[1])
        elif function is not None and (match := INSTRUCTION.match(line)):
            function.code.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4].strip()))
    if function is not None:
        yield function


WAIT, TRIGGER = "ACQBULK", "PREEXIT"
ENDS = {"EXIT", "KILL"}
JUMPS_UNSEEN = {"CALL", "RET", "BRX", "BRXU", "JMP", "JMX", "JMXU"}  # to addresses in registers, or from subroutines
TOUCHES_GLOBAL = re.compile(
    r"LD|LDG|LDGSTS|LDGMC|ST|STG|ATOM|ATOMG|RED|REDG|CCTL|CCTLL|TEX|TLD4?|TXD|TMML|SU(?:LD|ST|ATOM|RED)|UTMA\w+|UBLK\w+"
)


def touches_global(instruction: Instruction) -> bool:
    """Return True for accesses of global or generic addresses; those also show by their memory descriptor."""
    return TOUCHES_GLOBAL.fullmatch(instruction.base) is not None or "desc[" in instruction.operands


def before_wait(code: list[Instruction]) -> tuple[list[Instruction], list[Instruction]]:
    """Return the instructions that a thread can run before its wait, and those where its way is not known.

    A guarded instruction may run or not, whatever its predicate. A thread that reaches BSYNC goes on at the address
    which BSSY has put into that barrier register.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    reached: set[int] = set()
    lost: set[int] = set()
    seen: set[tuple[int, tuple[tuple[str, int], ...]]] = set()
    todo: list[tuple[int, dict[str, int]]] = [(0, {})]
    while todo:
        at, barriers = todo.pop()
        state = (at, tuple(sorted(barriers.items())))
        if state in seen:
            continue
        seen.add(state)
        if at >= len(code):
            lost.add(len(code) - 1)
            continue
        here = code[at]
        may_skip = here.guard not in ("", "PT", "UPT")
        if here.base == WAIT and not may_skip:
            continue
        reached.add(at)
        follows, targets = may_skip, []
        if here.base in JUMPS_UNSEEN:
            lost.add(at)
        elif here.base == "BRA":
            targets = [here.target]
            follows |= here.operands != f"0x{here.target or 0:x}"  # another operand is a condition
        elif here.base == "BSYNC":
            targets = [barriers.get(here.operands)]
        elif here.base == "WARPSYNC" and "COLLECTIVE" in here.operation:
            targets, follows = [here.target], True
        elif here.base not in ENDS:
            follows = True
        for target in targets:
            if target in index:
                todo.append((index[target], barriers))
            else:
                lost.add(at)
        if follows:
            todo.append((at + 1, after(here, barriers)))
    return [code[i] for i in sorted(reached)], [code[i] for i in sorted(lost)]


def after(instruction: Instruction, barriers: dict[str, int]) -> dict[str, int]:
    """Return the addresses in the barrier registers after an instruction."""
    register = instruction.operands.partition(",")[0].strip()
    if instruction.base == "BSSY" and instruction.target is not None:
        return {**barriers, register: instruction.target}
    if instruction.base == "BMOV":
        return {name: target for name, target in barriers.items() if name not in instruction.operands}
    return barriers


# ---- What is wrong ----


def violations(code: list[Instruction], weight_loads: int) -> list[str]:
    """Return what is wrong in the code of an early kernel."""
    if all(instruction.base != WAIT for instruction in code):
        return ["never waits for the kernel in front"]
    early, lost = before_wait(code)
    found = [f"jumps before the wait in a way that is not followed: {i}" for i in lost]
    found += [f"may exit before the wait: {i}" for i in early if i.base in ENDS]
    found += [f"may let the next kernel start before the wait: {i}" for i in early if i.base == TRIGGER]
    touching = [i for i in early if touches_global(i)]
    loads = [i for i in touching if i.base == "LDG"]
    found += [f"touches global memory before the wait: {i}" for i in touching if i.base != "LDG"]
    if len(loads) != weight_loads:
        listed = "".join(f"\n      {i}" for i in loads)
        found.append(f"expected {weight_loads} loads before the wait, got {len(loads)}{':' if loads else ''}{listed}")
    return found


def demangle(symbol: str) -> str:
    """Return a kernel's name and template arguments."""
    tool = shutil.which("c++filt")
    if tool is None:
        return symbol
    text = subprocess.run([tool, symbol], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"\(anonymous namespace\)::|pop::cuda::|pop::|^void |\([\w:]+\)(?=\d)", "", text).partition("(")[0]


def check(functions: Iterable[Function], kernels: dict[str, int]) -> tuple[list[str], int]:
    """Check early kernels for compute capability 9.0 and up; return the lines to print and the number of violations.

    Every kernel must be there for every such architecture, and no other function may wait or trigger.
    """
    forms: dict[str, dict[str, int]] = {}
    failures: list[str] = []
    for function in functions:
        if int(re.sub(r"\D", "", function.architecture)) < FIRST_WITH_EARLY_LAUNCHES:
            continue
        count = forms.setdefault(function.architecture, {})
        name = next((name for name in kernels if names_kernel(function.symbol, name)), None)
        where = f"FAILED {function.architecture} {demangle(function.symbol)}"
        if name is not None:
            count[name] = count.get(name, 0) + 1
            failures += [f"{where}\n    {reason}" for reason in violations(function.code, kernels[name])]
        elif any(instruction.base in (WAIT, TRIGGER) for instruction in function.code):
            failures.append(f"{where}\n    waits or triggers, and its file never calls launch_early")
    if not forms:
        failures.append(
            f"FAILED expected code for compute capability {FIRST_WITH_EARLY_LAUNCHES / 10} or more, got none"
        )
    lines = []
    for architecture, count in sorted(forms.items()):
        for name, loads in sorted(kernels.items()):
            if name in count:
                early = f"{loads} loads of weights" if loads else "nothing"
                lines.append(f"{architecture} {name}, {count[name]} forms: {early} before the wait")
            else:
                failures.append(f"FAILED {architecture} {name}\n    is not in the machine code")
    return lines + failures, len(failures)


def compiled(sources: Iterable[Path], folder: Path) -> Iterator[Path]:
    """Yield a fatbin of each source, compiled anew if any source of a kernel is younger."""
    newest = max(cuda_tools.newest_source(), Path(__file__).stat().st_mtime)
    for source in sources:
        output = folder / f"{source.stem}.fatbin"
        if not output.exists() or output.stat().st_mtime < newest:
            cuda_tools.compile_kernels(source, output, ARCHITECTURES)
        yield output


def main() -> int:
    """Check the files of the command line, or the kernels of this checkout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="libraries, objects, fatbins or cubins; none: compile")
    files = parser.parse_args().files
    if not files and cuda_tools.find_nvcc() is None:
        print("machine code of early kernels: not checked, since no nvcc was found")
        return 0
    if cuda_tools.find_cuobjdump() is None:
        print(f"machine code of early kernels: expected cuobjdump and nvdisasm: {cuda_tools.HOW_TO_INSTALL}")
        return 1
    sources = early_sources(ROOT / "cuda")
    kernels = {name: loads for found in sources.values() for name, loads in found.items()}
    texts = map(cuda_tools.disassemble, files or compiled(sources, ROOT / "build" / "sass"))
    lines, failed = check((function for text in texts for function in parse(text)), kernels)
    print(*lines, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
