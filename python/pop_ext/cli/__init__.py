"""The ``pop-ext`` command: says what is missing, or hands over to ``app``."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Entry point of ``pop-ext``; ends the process."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"pop-ext: the command line needs {' and '.join(missing)}: pip install 'pop_ext[cli,hf]'")
    from pop_ext.cli.app import app

    app(prog_name="pop-ext")
