"""Print how a checkout of pop_ext is laid out: modules, import cycles, sizes, and the path of a call.

Everything but ``--trace`` reads the sources only and runs on any checkout, with or without built libraries::

    python scripts/code_metrics.py                  # this checkout
    python scripts/code_metrics.py --root ../other  # another one
    python scripts/code_metrics.py --trace          # also run a prefill and print the Python functions it calls
    python scripts/code_metrics.py --cycles         # print the import cycles only; exit status 1 if there are any
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "pop_ext"
PYTHON = (".py", ".pyi")
CPP = (".h", ".cpp", ".cuh", ".cu")
FOLDERS = ("python", "bench", "scripts", "examples", "build_backend", "cpp", "cuda", "tests")

Graph = dict[str, set[str]]


def source_files(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield the sources below ``root`` in sorted order; hidden and ``__pycache__`` folders are left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(suffixes))


def modules_of(package: Path) -> dict[str, Path]:
    """Return the modules below a package's folder: dotted name -> file. A stub stands for its compiled module."""
    modules = {}
    for path in source_files(package, PYTHON):
        parts = list(path.relative_to(package.parent).with_suffix("").parts)
        if parts[-1] == "__init__":
            del parts[-1]
        modules[".".join(parts)] = path
    return modules


def import_graph(package: Path) -> Graph:
    """Return which modules of a package import which of its others.

    Imports inside functions and under ``TYPE_CHECKING`` count. ``from a import b`` is an import of the module
    ``a.b`` if there is one, else of ``a``. Names resolved at run time (``importlib``) are not seen, and importing
    ``a.b`` is not counted as an import of its parent ``a``.
    """
    modules = modules_of(package)
    graph: Graph = {name: set() for name in modules}
    for name, path in modules.items():
        own_package = name if path.stem == "__init__" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            graph[name] |= {found for found in _imported(node, own_package, modules) if found != name}
    return graph


def _imported(node: ast.AST, own_package: str, modules: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of the package that one statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = own_package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            found = inner if inner in modules else base
            if found in modules:
                yield found


def import_cycles(graph: Graph) -> list[list[str]]:
    """Return the strongly connected components of more than one module, each sorted, the largest first.

    Tarjan's algorithm. The modules of one component import each other, directly or through others of it.
    """
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                components.append(sorted(stack[at:]))
            del stack[at:]

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return sorted(components, key=lambda names: (-len(names), names))


def sizes(root: Path) -> dict[str, Any]:
    """Return lines by folder and language, the longest files, and the longest Python function."""
    lines: dict[str, dict[str, int]] = {}
    longest: dict[str, tuple[int, str]] = {}
    function = (0, "")
    for folder in FOLDERS:
        for path in source_files(root / folder, PYTHON + CPP):
            language = "python" if path.suffix in PYTHON else "cpp"
            text = path.read_text(encoding="utf-8")
            count, where = text.count("\n"), path.relative_to(root).as_posix()
            of_folder = lines.setdefault(language, {})
            of_folder[folder] = of_folder.get(folder, 0) + count
            longest[language] = max(longest.get(language, (0, "")), (count, where))
            if path.suffix == ".py":
                function = max(function, *((n, f"{where}:{name}") for n, name in _functions(text)), (0, ""))
    totals = {language: sum(of_folder.values()) for language, of_folder in lines.items()}
    return {
        "lines": totals,
        "lines_by_folder": lines,
        "longest_file": {language: list(found) for language, found in longest.items()},
        "longest_python_function": list(function),
    }


def _functions(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines and the name of every function; decorators do not count."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, node.name


def count_returns(files: list[str]) -> int:
    """Count the returns to an earlier file in a path, given the file of each step.

    A step is a call of a Python function of pop_ext, in call order; nothing is recorded when a function ends. A step
    is a *return to an earlier file* if its file is not the previous step's and an earlier step was in it: the reader
    of the path has to reopen a file that he had left. In other words: the runs of consecutive steps in one file,
    less the number of different files. ``a a b a c b`` has two returns, the second ``a`` run and the second ``b``.
    """
    runs = sum(1 for index, file in enumerate(files) if index == 0 or files[index - 1] != file)
    return runs - len(set(files))


# Runs in a process of its own, with the checkout's package on PYTHONPATH. Prints the steps as JSON: [file, function].
# Comprehensions and generator expressions belong to the function that holds them (newer Pythons inline them), and a
# generator that goes on is no new call.
_TRACE = """
import json, sys
from pathlib import Path
import pop_ext, torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=128)
model = pop_ext.enable(LlamaForCausalLM(config).eval(), pop_ext.Plan(num_layers=4, omit=[2]), strict=True)
classes = {vars(module)["PrefillForward"] for name, module in sys.modules.items()
           if name.startswith("pop_ext.") and "PrefillForward" in vars(module)}
(forward,) = classes
first, package = forward.__call__.__code__, Path(pop_ext.__file__).parent
steps, frames, recording = [], [], False

def profile(frame, event, argument):
    global recording
    code = frame.f_code
    if event != "call":
        return
    recording = recording or (code is first and not steps)
    if not recording or Path(code.co_filename).parent != package and package not in Path(code.co_filename).parents:
        return
    if code.co_name in ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>") or any(frame is one for one in frames):
        return
    frames.append(frame)
    steps.append([Path(code.co_filename).relative_to(package).as_posix(), code.co_qualname])

operator = torch.ops.pop.prefill

def reached(*arguments, **named):
    sys.setprofile(None)
    return operator(*arguments, **named)

ids = torch.arange(16)[None]
with torch.no_grad():
    model(ids, logits_to_keep=1)
    torch.ops.pop.prefill = reached
    sys.setprofile(profile)
    model(ids, logits_to_keep=1)
assert sys.getprofile() is None, "torch.ops.pop.prefill was not called"
print(json.dumps(steps))
"""


def trace_prefill(root: Path) -> dict[str, Any]:
    """Run a tiny enabled Llama and return the path between ``PrefillForward.__call__`` and ``torch.ops.pop.prefill``.

    The call is a plain prefill, ``model(input_ids, logits_to_keep=1)``, and the second one of its kind: what is made
    once and kept has been made. Needs Python 3.11 and the built libraries in the checkout (``make dev``).

    Returns:
        ``steps``, ``file:function`` in call order; ``calls``, their number; ``functions`` and ``files``, how many
        different ones; ``returns_to_an_earlier_file``, as `count_returns` defines it.
    """
    done = subprocess.run(
        [sys.executable, "-c", _TRACE],
        env={**os.environ, "PYTHONPATH": str(root / "python")},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the traced prefill failed in {root}:\n{done.stderr}")
    steps: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    files = [file for file, _ in steps]
    names = [f"{file}:{function}" for file, function in steps]
    return {
        "calls": len(steps),
        "functions": len(set(names)),
        "files": len(set(files)),
        "returns_to_an_earlier_file": count_returns(files),
        "steps": names,
    }


def collect(root: Path, trace: bool) -> dict[str, Any]:
    """Return everything that is printed, as a JSON value."""
    package = root / "python" / PACKAGE
    graph = import_graph(package)
    found = {
        "top_level_modules": sum(1 for path in package.glob("*.py") if not path.stem.startswith("__")),
        "modules": len(graph),
        "import_cycles": import_cycles(graph),
        **sizes(root),
    }
    return {**found, "prefill": trace_prefill(root)} if trace else found


def show(found: dict[str, Any]) -> None:
    """Print the metrics as text."""
    print(f"modules at the top level of {PACKAGE} (without __init__, __main__): {found['top_level_modules']}")
    print(f"modules in all: {found['modules']}")
    show_cycles(found["import_cycles"])
    for language, name in {"python": "Python", "cpp": "C++/CUDA"}.items():
        folders = ", ".join(f"{folder} {lines}" for folder, lines in found["lines_by_folder"].get(language, {}).items())
        lines, file = found["longest_file"].get(language, (0, ""))
        print(f"lines of {name}: {found['lines'].get(language, 0)} ({folders}); longest file: {file}, {lines}")
    lines, function = found["longest_python_function"]
    print(f"longest Python function: {function}, {lines} lines")
    if "prefill" in found:
        path = found["prefill"]
        print("a plain prefill, from PrefillForward.__call__ to torch.ops.pop.prefill:")
        print(f"  {path['calls']} calls of {path['functions']} Python functions in {path['files']} files")
        print(f"  {path['returns_to_an_earlier_file']} returns to an earlier file")
        print("\n".join(f"  {number:3} {step}" for number, step in enumerate(path["steps"], 1)))


def show_cycles(cycles: list[list[str]]) -> None:
    """Print the import cycles, a line each."""
    print(f"import cycles (imports inside functions and for types included): {len(cycles)}")
    for names in cycles:
        print(f"  {len(names)} modules: {', '.join(names)}")


def main() -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the checkout; default: this one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--trace", action="store_true", help="run a prefill and print the functions that it calls")
    parser.add_argument("--cycles", action="store_true", help="print the import cycles only; exit status 1 if any")
    options = parser.parse_args()
    root = options.root.resolve()
    if options.cycles:
        cycles = import_cycles(import_graph(root / "python" / PACKAGE))
        if options.json:
            print(json.dumps(cycles, indent=1))
        else:
            show_cycles(cycles)
        sys.exit(1 if cycles else 0)
    found = collect(root, options.trace)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


if __name__ == "__main__":
    main()
