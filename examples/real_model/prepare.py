"""Fetch the model and the texts, and print where they are: ``python examples/real_model/prepare.py``."""

from __future__ import annotations

import sys

from model import UnavailableError, fetch_model
from texts import fetch_texts


def main() -> int:
    """Print one line for the model and two for each domain of texts; return 1 if the model cannot be had."""
    try:
        print(f"model: {fetch_model()}")
    except UnavailableError as error:
        print(f"no model: {error}", file=sys.stderr)
        return 1
    domains, missing = fetch_texts()
    for name, domain in domains.items():
        for part, files in (("calibration", domain.calibration), ("held-out", domain.heldout)):
            size = sum(path.stat().st_size for path in files)
            print(f"{name}, {part}: {files[0].parent} ({len(files)} files, {size / 1e6:.1f} MB)")
    for line in missing:
        print(line, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
