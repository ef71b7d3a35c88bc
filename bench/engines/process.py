"""The parent's side of ``child.py``: a process that runs only while a request is open."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.engines.child import ROOT


class ChildError(RuntimeError):
    """A child answered with an error, or did not answer."""


class Child:
    """An engine in a child process.

    While no request is open, the process group is stopped (SIGSTOP). Threads that wait by spinning then take no time
    from the engine that is being timed.
    """

    def __init__(self, python: Path, module: str, cpus: list[int], log: Path, pythonpath: str | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._stopped = False
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(len(cpus)), "MKL_NUM_THREADS": str(len(cpus))}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        if pythonpath:
            environment["PYTHONPATH"] = pythonpath
        script = str(ROOT / "bench" / "engines" / "child.py")
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), script, module, ",".join(map(str, cpus))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=log.parent,
            )

    def ask(self, timeout: float, **request: Any) -> dict[str, Any]:
        """Send a request and return its answer.

        Raises:
            ChildError: the request failed, the child ended, or it took longer than ``timeout`` seconds and was killed.
        """
        self._signal(signal.SIGCONT)
        try:
            stdin = self._process.stdin
            assert stdin is not None
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            line = self._line(timeout)
        except BrokenPipeError:
            line = b""
        if not line:
            code = self._process.wait()
            raise ChildError(f"it ended with code {code}; {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise ChildError(answer["error"])
        return answer

    def close(self) -> None:
        """Kill the child with all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _line(self, timeout: float) -> bytes:
        """Return a whole line of the child's output; an empty one if it ended."""
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + timeout
        parts: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not parts or not parts[-1].endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.close()
                    raise ChildError(f"no answer within {timeout:.0f} s; {self._last_words()}")
                part = os.read(stdout.fileno(), 1 << 20)
                if not part:
                    return b""
                parts.append(part)
        return b"".join(parts)

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the child's process group; no-op before its first answer: there may be no group yet."""
        if (number == signal.SIGCONT) != self._stopped:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
        self._stopped = number == signal.SIGSTOP

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"log {self._log}: {lines[-1][:200] if lines else 'empty'}"
