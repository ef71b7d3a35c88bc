"""Create a venv for each engine, once: engines pin different releases of the same packages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench.engines.catalogue import Peer

_DONE = "installed.txt"  # lists what was installed; a venv with another list is created again


class InstallError(RuntimeError):
    """A venv could not be created; the text gives the reason in one line."""


def venv_python(peer: Peer, folder: Path, torch: str, install: bool, say: Callable[[str], None]) -> Path:
    """Return the interpreter of an engine's venv; create the venv if it is missing or has other requirements.

    Args:
        peer: the engine.
        folder: parent folder of the venvs.
        torch: torch version of the bench.
        install: create a missing venv; this uses the network and may take minutes.
        say: called with messages about the progress.

    Raises:
        InstallError: there is no venv and ``install`` is False, or pip failed.
    """
    if sys.version_info[:2] < peer.python:
        raise InstallError(f"expected Python {'.'.join(map(str, peer.python))} or newer, got {sys.version.split()[0]}")
    home = folder / peer.home
    python = home / "bin" / "python"
    calls = [[part.format(torch=torch) for part in call] for call in peer.requirements]
    wanted = "\n".join(" ".join(call) for call in [*calls, ["without", *peer.uninstall]])
    done = home / _DONE
    if done.is_file() and done.read_text() == wanted and python.exists():
        return python
    if not install:
        raise InstallError(f"no venv in {home}, and --no-install was given")
    say(f"{peer.name}: making its venv in {home} (log: {home}.pip.log)")
    log = folder / f"{home.name}.pip.log"
    folder.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    _run([sys.executable, "-m", "venv", "--clear", str(home)], log)
    for call in calls:
        _run([str(python), "-m", "pip", "install", *call], log)
    if peer.uninstall:
        _run([str(python), "-m", "pip", "uninstall", "-y", *peer.uninstall], log)
    done.write_text(wanted)
    return python


def _run(command: list[str], log: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("a") as out:
        result = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    if result.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        why = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no output")
        raise InstallError(f"{' '.join(command[2:5])} ... failed: {why}"[:300])
