#!/usr/bin/env python
"""Time prefill by Hugging Face and by pop_ext in one run: ``python bench/run.py``; see bench/README.md."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # else modules of this directory would hide installed ones of the same names

from importlib.util import find_spec  # noqa: E402

if find_spec("pop_ext") is None:
    sys.path.insert(1, str(ROOT / "python"))  # built in place by `make dev`

from bench.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
