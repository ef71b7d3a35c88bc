"""Convert weights to an engine's format in a separate process, so that the engine's memory is not affected."""

from __future__ import annotations

import subprocess
import sys

from bench.engines.child import ROOT

_CODE = (
    "import importlib, sys; sys.path[0] = sys.argv[1]; "
    "getattr(importlib.import_module(sys.argv[2]), sys.argv[3])(*sys.argv[4:])"
)


def in_new_process(module: str, function: str, *arguments: str) -> None:
    """Call ``module.function(*arguments)`` in a new process of this interpreter.

    Raises:
        RuntimeError: the call failed; the log has its traceback.
    """
    result = subprocess.run([sys.executable, "-c", _CODE, str(ROOT), module, function, *arguments])
    if result.returncode:
        raise RuntimeError(f"{module}.{function} ended with code {result.returncode}")
