"""Facts that results depend on besides the code: processor, threads, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.shapes import ROOT


def environment(device: torch.device) -> dict[str, Any]:
    """Return facts about this process and machine as JSON values."""
    import pop_ext
    import transformers
    from pop_ext import _core, env_info

    facts: dict[str, Any] = {
        "processor": env_info.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pop_ext": pop_ext.__version__,
        "pop_ext_from": "source tree" if Path(pop_ext.__file__).is_relative_to(ROOT / "python") else "installed",
        "pop_ext_build": _core.build_info(),
        "isa": str(torch.ops.pop.cpu_isa()),
        "int8_isa": str(torch.ops.pop.int8_isa()),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "device": "cpu",
        **_commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "device_memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            **_nvidia_smi(device.index or 0),
        }
    return facts


def _nvidia_smi(index: int) -> dict[str, str]:
    """Return facts that only nvidia-smi reports; an empty dict if it is missing."""
    fields = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory")
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))


def _commit() -> dict[str, Any]:
    """Return the commit of the checkout and whether files are modified; None values without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"git_commit": git("rev-parse", "--short=12", "HEAD"), "git_modified": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_modified": None}
