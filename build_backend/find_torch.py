"""Print "version;folder" of this interpreter's torch, or exit with the reason why it cannot be used.

Run it as ``python -I``: an isolated interpreter sees its environment, and not the packages that pip fetched for the
build.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys

MINIMUM = (2, 11)  # the same as in `dependencies` of pyproject.toml and TORCH_TARGET_VERSION


def main() -> None:
    """Find torch, and print its version and folder."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("torch is not installed")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MINIMUM:
        sys.exit(f"torch {version} is older than {'.'.join(map(str, MINIMUM))}")
    print(version, os.path.dirname(spec.origin), sep=";")


if __name__ == "__main__":
    main()
