"""Weights in an engine's own format, made by a process of its own: what that takes is not the engine's."""

from __future__ import annotations

import subprocess
import sys

from bench.engines.child import ROOT

_CODE = (
    "import importlib, sys; sys.path[0] = sys.argv[1]; "
    "getattr(importlib.import_module(sys.argv[2]), sys.argv[3])(*sys.argv[4:])"
)


def in_new_process(module: str, function: str, *arguments: str) -> None:
    """Runs ``module.function(*arguments)`` in another process of this interpreter.

    Raises:
        RuntimeError: it failed; its traceback is in the log.
    """
    result = subprocess.run([sys.executable, "-c", _CODE, str(ROOT), module, function, *arguments])
    if result.returncode:
        raise RuntimeError(f"{module}.{function} ended with code {result.returncode}")
