"""Convert weights to an engine's format in a separate process, so that the engine's memory is not affected."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from bench.engines.child import ROOT

_CODE = (
    "import importlib, sys; sys.path[0] = sys.argv[1]; "
    "getattr(importlib.import_module(sys.argv[2]), sys.argv[3])(*sys.argv[4:])"
)


def converted(out: Path, module: str, function: str, *arguments: str) -> Path:
    """Return ``out``, a file or a folder; if it is missing, make it by a new process of this interpreter.

    That calls ``module.function(*arguments, path)``, whose last argument is where to write. What it wrote is renamed to
    ``out`` when it is complete: a process that is killed leaves nothing that a later run would take for the whole.

    Raises:
        RuntimeError: the call failed; the log has its traceback.
    """
    if out.exists():
        return out
    partial = out.with_name(f"{out.name}.partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    result = subprocess.run([sys.executable, "-c", _CODE, str(ROOT), module, function, *arguments, str(partial)])
    if result.returncode:
        raise RuntimeError(f"{module}.{function} ended with code {result.returncode}")
    partial.rename(out)
    return out
