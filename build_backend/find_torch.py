"""Prints "version;folder" of the torch that this interpreter sees, or exits with what is wrong with it.

Run as ``python -I``: isolated, Python does not see what pip fetched for the build, only its environment.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys

MINIMUM = (2, 11)  # also `dependencies` of pyproject.toml and TORCH_TARGET_VERSION


def main() -> None:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("torch is not installed")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MINIMUM:
        sys.exit(f"torch {version} is older than {'.'.join(map(str, MINIMUM))}")
    print(version, os.path.dirname(spec.origin), sep=";")


if __name__ == "__main__":
    main()
