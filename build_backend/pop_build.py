"""scikit-build-core as the build backend, with torch as a build requirement only if the environment has none.

pop_ext compiles against torch's headers, and any torch >= 2.11 will do. If torch were listed in
``build-system.requires``, pip would download gigabytes of a second torch beside the installed one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from scikit_build_core import build as _build
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_FIND_TORCH = Path(__file__).with_name("find_torch.py")


def _torch_requirement() -> list[str]:
    """Return the requirement of a torch; an empty list if the environment has one that will do."""
    found = subprocess.run([sys.executable, "-I", str(_FIND_TORCH)], capture_output=True, check=False)
    return [] if found.returncode == 0 else ["torch>=2.11"]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return the requirements of a wheel (PEP 517)."""
    return [*_build.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return the requirements of an editable install (PEP 660)."""
    return [*_build.get_requires_for_build_editable(config_settings), *_torch_requirement()]
