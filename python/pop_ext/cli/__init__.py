"""The ``pop-ext`` command. `main` checks that its dependencies are installed before it imports them."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run ``pop-ext`` and exit; without typer or rich say how to install them."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"pop-ext: the command line needs {' and '.join(missing)}: pip install 'pop_ext[cli,hf]'")
    from pop_ext.cli.app import app

    app(prog_name="pop-ext")
