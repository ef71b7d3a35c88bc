"""The build: one library for every torch >= 2.11, parts without torch, and the torch of the environment."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pop_ext
import pytest
from pop_ext import _core

ROOT = Path(__file__).parents[2]
CPP = ROOT / "cpp"
SHIM = ROOT / "tests" / "gpu" / "cuda_shim"
CORE = Path(_core.__file__)
OPS = CORE.with_name("_ops.so")

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")


def nm(path: Path, *options: str) -> list[str]:
    run = subprocess.run(["nm", "-C", *options, str(path)], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".cpp", ".h", ".cu")]
    assert found
    return found


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]+)', path.read_text(), re.MULTILINE)


def reachable(path: Path, seen: set[Path] | None = None) -> set[Path]:
    """Return the file and every file of the project that it includes."""
    seen = set() if seen is None else seen
    if path not in seen:
        seen.add(path)
        for include in includes(path):
            places = [directory / include[1:] for directory in (path.parent, CPP, ROOT, SHIM)]
            if include.startswith('"'):
                reachable(next(place for place in places if place.exists()), seen)
    return seen


def listed_in_cmake(variable: str) -> list[str]:
    """Return the sources between `variable` and the closing parenthesis."""
    body = re.search(rf"\({variable}\b([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert body is not None, variable
    return re.findall(r"cpp/\S+\.cpp", body.group(1))


# The stable ABI


@needs_nm
@pytest.mark.parametrize("library", [OPS, CORE], ids=["_ops", "_core"])
def test_libraries_need_only_stable_abi_symbols(library):
    undefined = nm(library, "-D", "--undefined-only")
    assert undefined
    assert [line for line in undefined if re.search(r"\b(at|c10|torch|caffe2)::", line)] == []


@needs_nm
def test_the_core_needs_no_torch():
    assert [line for line in nm(CORE, "-D", "--undefined-only") if "torch" in line] == []


@needs_nm
@pytest.mark.parametrize("library", [OPS, CORE], ids=["_ops", "_core"])
def test_libraries_export_no_pop_symbol(library):
    exported = nm(library, "-D", "--defined-only")
    assert [line for line in exported if re.search(r"\bpop::", line)] == []


def test_only_stable_torch_headers_are_included():
    stable = re.compile(r"<torch/(csrc/stable|headeronly|csrc/inductor/aoti_torch/c)/")
    unstable = [
        f"{path.relative_to(ROOT)}: {include}"
        for path in sources("cpp", "cuda")
        for include in includes(path)
        if re.match(r'[<"](ATen|c10|caffe2|torch/extension\.h|torch/torch\.h|pybind11)', include)
        or (include.startswith("<torch/") and not stable.match(include))
        if path.stem not in ("bindings", "bind_interrupts")  # the Python module
    ]
    assert unstable == []


def test_torch_free_parts_include_no_torch_header():
    isa_sources = [ROOT / source for source in listed_in_cmake("POP_ISA_SOURCES")]
    kernels = [*isa_sources, *(ROOT / "cuda").rglob("*.cu")]
    parts = [*sources("cpp/core", "cpp/runtime"), *kernels, *CPP.glob("*.h")]
    torch_includes = [
        f"{path.relative_to(ROOT)} by {part.relative_to(ROOT)}: {include}"
        for part in parts
        for path in reachable(part)
        for include in includes(path)
        if re.match(r'[<"]torch/', include)
    ]
    assert torch_includes == []


def test_the_cpu_backend_calls_torch_in_one_file():
    """Kernels, threads and the choice of a product then stay free of torch's types."""
    seam = CPP / "cpu" / "torch_calls.cpp"
    using_torch = {
        path.relative_to(ROOT).as_posix()
        for path in sources("cpp/cpu")
        for include in includes(path)
        if re.match(r'[<"]torch/', include)
    }
    assert using_torch == {seam.relative_to(ROOT).as_posix()}
    reached = {path for part in sources("cpp/cpu") if part != seam for path in reachable(part)}
    assert [path.name for path in reached for include in includes(path) if re.match(r'[<"]torch/', include)] == []


@needs_nm
def test_instruction_set_files_emit_no_weak_symbols():
    """The linker keeps one copy of a weak symbol, which could be the one compiled for AVX-512."""
    objects = list((ROOT / "build").glob("**/pop_cpu_*.dir/**/*.o"))
    if not objects:
        pytest.skip("needs a build tree")
    # DW.ref is data: where a sanitizer makes a function's clean-up call the personality routine, its address.
    code = re.compile(r" [VWu] (?!DW\.ref\.)")
    weak = [f"{path.name}: {line}" for path in objects for line in nm(path) if code.search(line)]
    assert weak == []


def test_early_launched_kernels_wait_for_their_predecessors():
    """Check every kernel of a file that launches early: one that does not wait reads stale data, only on a GPU."""
    launchers = ("launch_early(", "launch_skinny(")
    early = [
        path
        for path in sources("cuda")
        if path.suffix == ".cu" and any(name in path.read_text(encoding="utf-8") for name in launchers)
    ]
    assert len(early) == 7
    for path in early:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"[^_]launch\(\"", text), f"{path.name}: some kernel starts as others do"
        for call in ("wait_for_kernels_in_front();", "let_kernel_behind_start();"):
            assert text.count(call) == text.count("__global__"), f"{path.name}: {call}"


def test_cmake_lists_every_source():
    text = (ROOT / "CMakeLists.txt").read_text() + "".join(path.read_text() for path in (ROOT / "cmake").iterdir())
    unlisted = [path for path in sources("cpp", "cuda") if path.suffix in (".cpp", ".cu")]
    unlisted = [name for name in (path.relative_to(ROOT).as_posix() for path in unlisted) if name not in text]
    assert unlisted == []


# Which torch, which version


def test_library_version_equals_pyproject():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert pop_ext.__version__ == _core.__version__ == _core.build_info()["version"] == version.group(1)


def find_torch(*options: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    command = [sys.executable, *options, str(ROOT / "build_backend" / "find_torch.py")]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def fake_torch(folder: Path, version: str) -> Path:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise ImportError('must not be imported')")
    (folder / f"torch-{version}.dist-info").mkdir()
    (folder / f"torch-{version}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    return folder


def test_build_finds_the_environments_torch_not_pythonpath(tmp_path):
    import torch

    found = find_torch("-I", path=fake_torch(tmp_path, "2.99.0"))
    assert found.stdout.strip() == f"{torch.__version__};{Path(torch.__file__).parent}"


def test_build_without_isolation_finds_the_fetched_torch(tmp_path):
    assert find_torch(path=fake_torch(tmp_path, "2.11.0+cpu")).stdout.strip() == f"2.11.0+cpu;{tmp_path / 'torch'}"


def test_an_old_torch_is_refused(tmp_path):
    found = find_torch(path=fake_torch(tmp_path, "2.9.1"))
    assert found.returncode != 0
    assert "torch 2.9.1 is older than 2.11" in found.stderr


def test_build_requires_torch_only_if_missing(monkeypatch, tmp_path):
    pytest.importorskip("scikit_build_core")
    spec = importlib.util.spec_from_file_location("pop_build", ROOT / "build_backend" / "pop_build.py")
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    monkeypatch.chdir(ROOT)
    hooks = (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable)
    for hook in hooks:
        assert [name for name in hook() if name.startswith("torch")] == []
    missing = tmp_path / "none.py"
    missing.write_text("raise SystemExit('torch is not installed')")
    monkeypatch.setattr(backend, "_FIND_TORCH", missing)
    for hook in hooks:
        assert [name for name in hook() if name.startswith("torch")] == ["torch>=2.11"]
    assert not [name for name in backend.get_requires_for_build_sdist() if name.startswith("torch")]


# Wheel and sdist


def build(hook: str, folder: Path, **settings: str) -> Path:
    """Call the build backend in its own process, as `python -m build --no-isolation` does, and return what it built."""
    pytest.importorskip("scikit_build_core")
    code = f"import pop_build, sys; print(pop_build.{hook}(sys.argv[1], {settings!r}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "build_backend")}
    command = [sys.executable, "-c", code, str(folder)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return folder / run.stdout.splitlines()[-1]


def files_below(*names: str) -> set[str]:
    """Return the paths of source files below the given folders, without built or cached files."""
    found = [path for name in names for path in [ROOT / name, *(ROOT / name).rglob("*")] if path.is_file()]
    kept = [path for path in found if path.suffix != ".so" and "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix() for path in kept}


def test_sdist_holds_sources_and_nothing_built(tmp_path):
    with tarfile.open(build("build_sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    read = files_below("cpp", "cuda", "cmake", "build_backend", "python/pop_ext", "third_party")
    read |= {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "NOTICE"}
    assert len(read) > 80
    assert sorted(read - names) == []
    assert [name for name in names if re.search(r"\.so$|__pycache__|^(build|dist|\.venv)/|\.safetensors$", name)] == []


def test_wheel_holds_every_module_and_the_command(tmp_path):
    """Build without the libraries, because compiling them takes a minute; CI checks a complete wheel."""
    with zipfile.ZipFile(build("build_wheel", tmp_path, **{"wheel.cmake": "false"})) as archive:
        names = {name for name in archive.namelist() if name.startswith("pop_ext/")}
        [entry_points] = [name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt")]
        assert "pop-ext = pop_ext.cli:main" in archive.read(entry_points).decode()
    assert names == {name.removeprefix("python/") for name in files_below("python/pop_ext")}


# Options


@needs_cmake
@pytest.mark.parametrize(
    ("option", "message"),
    [("ON", "POP_CUDA=ON, and no nvcc was found"), ("maybe", "POP_CUDA: expected AUTO, ON, OFF or SHIM, got maybe")],
)
def test_unbuildable_cuda_options_stop_the_configuration(tmp_path, option, message):
    options = [f"-DPOP_CUDA={option}", "-DCMAKE_CUDA_COMPILER=NOTFOUND", f"-DPython_EXECUTABLE={sys.executable}"]
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert message in " ".join(run.stderr.split())


def test_the_newest_interpreter_is_found_by_numbers_not_by_letters():
    version_key = runpy.run_path(str(ROOT / "scripts" / "matrix.py"))["version_key"]
    assert sorted(["3.12.10", "3.12.9", "3.12.11"], key=version_key) == ["3.12.9", "3.12.10", "3.12.11"]
