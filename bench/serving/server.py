"""A vLLM server as a process of its own: start, stop for a while, end, and its processor time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_PROC = Path("/proc")
_PARENT, _TIMES = 1, slice(11, 15)  # of /proc/PID/stat, counted from the state: ppid; utime, stime, cutime, cstime


class ServerError(RuntimeError):
    """A server did not start, or ended; the text gives the reason in one line."""


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Return arguments of ``vllm.LLM`` as flags of the server: ``{"additional_config": {...}}`` as JSON.

    True is a bare flag, False its ``--no-`` form, None nothing. A list follows its flag, an object is JSON.
    """
    found: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Mapping):
            found += [f"--{flag}", json.dumps(value)]
        elif isinstance(value, (list, tuple)):
            found += [f"--{flag}", *map(str, value)]
        else:
            found += [f"--{flag}", str(value)]
    return found


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on; None if there is no such process (any more)."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def process_tree(root: int) -> list[int]:
    """Return a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) is not None:
            children.setdefault(int(fields[_PARENT]), []).append(int(entry.name))

    def below(pid: int) -> Iterator[int]:
        yield pid
        for child in children.get(pid, []):
            yield from below(child)

    return list(below(root))


def processor_seconds(root: int) -> float:
    """Return the processor time of a process and its descendants, user and system, ended and awaited ones included.

    Its resolution is that of the system's clock tick, mostly 10 ms.
    """
    ticks = sum(int(value) for pid in process_tree(root) for value in (_stat(pid) or [])[_TIMES])
    return ticks / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """An OpenAI-compatible server of vLLM.

    Args:
        name: name of its arm.
        python: interpreter of vLLM's environment.
        arguments: arguments of the server, without host and port.
        environment: environment of the process.
        log: file that takes its output.

    Attributes:
        url: where it listens.
    """

    def __init__(
        self, name: str, python: Path, arguments: list[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        # Not `vllm serve`: that of the CPU build asks for the metadata of a package "vllm", which it is not.
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log, self._paused = log, False
        with log.open("w") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=dict(environment),
                cwd=log.parent,
                start_new_session=True,  # so that `close` finds the engine of a server that has ended before it
            )

    def wait(self, timeout: float) -> float:
        """Wait until it answers; return the seconds that this took.

        Raises:
            ServerError: it ended, or does not answer within ``timeout`` seconds.
        """
        begin = time.monotonic()
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return time.monotonic() - begin
            code = self._process.poll()
            if code is not None:
                raise ServerError(f"{self.name}: it ended with code {code}; {self._last_words()}")
            if time.monotonic() - begin > timeout:
                raise ServerError(f"{self.name}: no answer within {timeout:.0f} s; {self._last_words()}")
            time.sleep(0.2)

    def processor_seconds(self) -> float:
        """Return the processor time of its processes so far.

        Raises:
            ServerError: it has ended.
        """
        if (code := self._process.poll()) is not None:
            raise ServerError(f"{self.name}: it ended with code {code}; {self._last_words()}")
        return processor_seconds(self._process.pid)

    def pause(self) -> None:
        """Stop all its processes (SIGSTOP), so that it takes no time from another server."""
        if not self._paused:
            self._signal(signal.SIGSTOP)
            self._paused = True

    def resume(self) -> None:
        """Let its processes run again."""
        if self._paused:
            self._signal(signal.SIGCONT)
            self._paused = False

    def close(self, patience: float = 20.0) -> None:
        """End it: ask first, and kill what is left after ``patience`` seconds."""
        self.resume()
        with suppress(ProcessLookupError):
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for pid in process_tree(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return f"log {self._log}: {(errors or lines or ['empty'])[-1][:200]}"
