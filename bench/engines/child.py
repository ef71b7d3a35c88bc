"""A process that runs one engine and answers its parent: ``python bench/engines/child.py MODULE CPUS``.

A request is a line of JSON on stdin, its answer a line on what was stdout; whatever libraries print goes to stderr.
It runs in venvs that hold neither torch nor pop_ext: this file and the engines for peers import nothing of the bench
that does.

| request | answer |
|---|---|
| ``{"op": "load", ...job}`` | ``{"arms": {name: how it is called}, "versions": {...}, "resident": bytes}`` |
| ``{"op": "time", "arm": name, "ids": [...]}`` | ``{"seconds": of one prefill}`` |
| ``{"op": "check", "arm": name, "ids": [...], "keep": k}`` | ``{"log_probs": [[id, value], ...], "peak": bytes}`` |

A job: ``weights`` (a folder: config.json and safetensors), ``work`` (a folder for what the engine makes of them),
``dtype``, ``threads``, ``max_tokens``, ``options`` (of the engine). An answer ``{"error": text}`` says what it raised.
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
    """What an engine's module calls ``Engine``."""

    def load(self, job: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        """Loads the weights of a job. Returns its arms, name -> how it is called, and the packages it is made of."""

    def prefill(self, arm: str, ids: list[int]) -> Any:
        """One prefill that makes a K/V cache and one row of logits: what is timed. Nothing of it is reused."""

    def log_probs(self, arm: str, ids: list[int], keep: int | None) -> dict[int, float]:
        """Token -> log-probability after the prompt, of the ``keep`` most probable ones or of all."""


def main() -> int:
    """Serves until stdin ends."""
    module, cpus = sys.argv[1:]
    os.setpgid(0, 0)  # the parent stops and resumes all that this process starts
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
        except Exception as error:  # whatever an engine raises is its result
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def answer_to(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Does what a request asks for.

    Raises:
        ValueError: an unknown request.
    """
    operation = request["op"]
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
    raise ValueError(f"op: expected load, time or check, got {operation!r}")


def versions(packages: list[str]) -> dict[str, str]:
    """Package -> installed version, of those that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def status_bytes(field: str) -> int | None:
    """VmRSS or VmHWM of this process; None where the system does not tell."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def reset_peak() -> None:
    """Sets VmHWM to what is resident now, where that is allowed (proc(5))."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # the directory of this file would come before installed modules of the same names
    sys.exit(main())
