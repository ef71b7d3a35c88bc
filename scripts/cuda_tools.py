"""Find nvcc and cuobjdump, and compile kernels of cuda/ for the scripts that look at their machine code."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sysconfig
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-DPOP_WITH_CUDA", "-DPOP_CUDA_SM90A", f"-I{ROOT / 'cpp'}", f"-I{ROOT}")
"""What a release build passes, as far as it changes the code of a kernel."""

HOW_TO_INSTALL = "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm (both are in the dev extra)"


def find_nvcc() -> str | None:
    """Return the path of nvcc, or None."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def tool_folders() -> list[Path]:
    """Return the folders that may hold cuobjdump: NVIDIA's Python packages, then the toolkit of nvcc."""
    packages = {sysconfig.get_path("purelib"), *site.getsitepackages(), site.getusersitepackages()}
    folders = sorted(found for package in packages for found in Path(package).glob("nvidia/*/bin"))
    nvcc = find_nvcc()
    return [*folders, *([Path(nvcc).resolve().parent] if nvcc else [])]


def find_cuobjdump() -> tuple[str, dict[str, str]] | None:
    """Return the path of cuobjdump, and an environment in which it finds nvdisasm; None if either is missing."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, tool_folders())])
    found = shutil.which("cuobjdump", path=path)
    if found is None or shutil.which("nvdisasm", path=path) is None:
        return None
    return found, {**os.environ, "PATH": path}


def disassemble(file: Path) -> str:
    """Return the SASS of every kernel in a library, an object, a fatbin or a cubin."""
    found = find_cuobjdump()
    if found is None:
        raise FileNotFoundError(f"expected cuobjdump and nvdisasm: {HOW_TO_INSTALL}")
    tool, environment = found
    return subprocess.run(
        [tool, "-sass", str(file)], env=environment, capture_output=True, text=True, check=True
    ).stdout


def compile_kernels(source: Path, output: Path, architectures: Iterable[str], *options: str) -> str:
    """Compile a .cu file to a fatbin, and return what nvcc printed."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("expected nvcc on PATH, or in CUDACXX")
    output.parent.mkdir(parents=True, exist_ok=True)
    named = list(architectures)
    codes = [part for a in named for part in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    names = f'-DPOP_CUDA_ARCHITECTURES="{", ".join(named)}"'  # as the build defines it, for cuda/device.cu
    command = [nvcc, *FLAGS, names, *codes, *options, "-fatbin", "-o", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed on {source}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def newest_source() -> float:
    """Return the time at which a source that a kernel may include was last changed."""
    sources = [*(ROOT / "cuda").glob("*.*"), *(ROOT / "cpp").rglob("*.h")]
    return max(path.stat().st_mtime for path in sources)
