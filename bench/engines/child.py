"""The child process that runs one engine: ``python bench/engines/child.py MODULE CPUS``.

A request is a line of JSON on stdin, its answer a line of JSON on the original stdout. What libraries print goes to
stderr. The process may run in a venv without torch or pop_ext, so this file and the modules of other engines import no
part of the bench that needs them.

| request | answer |
|---|---|
| ``{"op": "load", ...job}`` | ``{"arms": {name: the call in words}, "versions": {...}, "resident": bytes}`` |
| ``{"op": "time", "arm": name, "ids": [...]}`` | ``{"seconds": time of one prefill}`` |
| ``{"op": "check", "arm": name, "ids": [...], "keep": k}`` | ``{"log_probs": [[id, value], ...], "peak": bytes}`` |
| ``{"op": "call", ...}`` | what the engine's ``call`` returns; only `bench.serving.load` has one |

The members of a job are ``name`` (of the engine in the catalogue), ``weights`` (a folder with config.json and
safetensors), ``work`` (a folder of its own), ``shared`` (a folder for converted weights, one for all engines of a
venv), ``dtype``, ``threads``, ``max_tokens`` and ``options`` (of the engine). If the engine raises, the answer is
``{"error": text}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent.parent
_STATUS = Path("/proc/self/status")


class Engine(Protocol):
    """The interface of the class ``Engine`` in an engine's module."""

    def load(self, job: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        """Load the weights of a job. Return its arms, name -> the call in words, and the names of its packages."""

    def prefill(self, arm: str, ids: list[int]) -> Any:
        """Run one prefill that fills a K/V cache and computes one row of logits, and reuses nothing; it is timed."""

    def log_probs(self, arm: str, ids: list[int], keep: int | None) -> dict[int, float]:
        """Return token -> log-probability after the prompt, of the ``keep`` most probable tokens or of all."""

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a request of the engine's own."""


def main() -> int:
    """Answer requests until stdin ends."""
    module, cpus = sys.argv[1:]
    os.setpgid(0, 0)  # the parent stops and resumes this process with all that it starts
    os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Engine | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if engine is None:
                engine = import_module(module).Engine()
            answer = answer_to(engine, request)
        except Exception as error:  # an engine may raise anything; the parent gets the text
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def answer_to(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Carry out a request and return its answer.

    Raises:
        ValueError: the request is unknown.
    """
    operation = request["op"]
    if operation == "call":
        return engine.call(request)
    if operation == "load":
        arms, packages = engine.load(request)
        return {"arms": arms, "versions": versions(packages), "resident": status_bytes("VmRSS")}
    arm, ids = request["arm"], request["ids"]
    if operation == "time":
        start = time.perf_counter()
        result = engine.prefill(arm, ids)
        seconds = time.perf_counter() - start
        del result
        return {"seconds": seconds}
    if operation == "check":
        found = engine.log_probs(arm, ids, request["keep"])
        reset_peak()
        engine.prefill(arm, ids)
        return {"log_probs": sorted(found.items()), "peak": status_bytes("VmHWM")}
    raise ValueError(f"op: expected load, time, check or call, got {operation!r}")


def versions(packages: list[str]) -> dict[str, str]:
    """Return package -> version of those packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def status_bytes(field: str) -> int | None:
    """Return VmRSS or VmHWM of this process in bytes; None if the system does not report it."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def reset_peak() -> None:
    """Reset VmHWM to the current VmRSS, if the system allows it (proc(5))."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # else modules of this directory would hide installed ones of the same names
    sys.exit(main())
