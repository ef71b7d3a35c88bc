"""Folders of plans, on disk and on the Hugging Face hub: ``plan.json``, ``plan.safetensors`` and the card."""

from __future__ import annotations

import os
import posixpath
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

from pop_ext.plans.card import PlanCard
from pop_ext.plans.card_markdown import MARK, render
from pop_ext.utils.files import read_utf8
from pop_ext.utils.texts import short

PLAN_FILE, MATRICES_FILE, CARD_FILE, README_FILE = "plan.json", "plan.safetensors", "card.json", "README.md"
CONFIG_FILE = "config.json"
"""File by which the folder of a checkpoint is known."""
SUBFOLDER = "pop_ext"
"""Sub-folder of a checkpoint's folder or hub repository that holds its plan."""


def write_folder(plan: Any, folder: str | PathLike[str], card: PlanCard | None) -> None:
    """Write a plan, its fitted projections and its card.

    Args:
        plan: A ``Plan``.
        folder: Folder, made if it does not exist. Files of an older plan are replaced.
        card: Card to write. None: the plan's own, else one that says that nothing was measured.

    Raises:
        TypeError: ``card`` is no ``PlanCard``.
        ValueError: ``card`` describes another plan, the folder is that of a checkpoint, or it has a ``README.md`` of
            something else.
        OSError: A file cannot be written.
    """
    card = check_card(card, plan) or plan.card or PlanCard.of(plan)
    folder = check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    of_another = plan.projections is None and (folder / PLAN_FILE).exists()
    plan.save(folder / PLAN_FILE)
    if of_another:
        (folder / MATRICES_FILE).unlink(missing_ok=True)
    (folder / CARD_FILE).write_text(card.to_json() + "\n", encoding="utf-8")
    (folder / README_FILE).write_text(render(card), encoding="utf-8")


def check_folder(folder: str | PathLike[str]) -> Path:
    """Return a folder as a path, after a check that ``write_folder`` may write there. It need not exist.

    Raises:
        ValueError: The folder is that of a checkpoint, or has a ``README.md`` of something else.
        OSError: It, or one that it would be made in, is a file or cannot be written.
    """
    folder = Path(folder)
    there = next(at for at in (folder, *folder.absolute().parents) if at.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"folder: expected a folder, or none yet, got {folder}, where {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"folder: expected one that can be written, got {folder}, where {there} cannot")
    for name in (PLAN_FILE, MATRICES_FILE, CARD_FILE, README_FILE):
        file = folder / name
        if file.exists() and not (file.is_file() and os.access(file, os.W_OK)):
            raise PermissionError(f"folder: expected files that can be written, got {file}, which cannot")
    check_no_checkpoint("folder", folder)
    readme = folder / README_FILE
    if readme.exists() and MARK not in readme.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"folder: expected no other {README_FILE} in the place of the card, got one in {folder}")
    return folder


def check_no_checkpoint(name: str, folder: Path) -> None:
    """Raise ValueError for the folder of a checkpoint, where loaders take any safetensors file for weights.

    Args:
        name: Argument to name in the error.
        folder: The folder.
    """
    if (folder / CONFIG_FILE).exists():
        raise ValueError(
            f"{name}: expected a folder without a {CONFIG_FILE}, as loaders would take a plan's matrices beside it for "
            f"weights of the checkpoint, got {folder}; enable finds a plan in {folder / SUBFOLDER}"
        )


def read_folder(kind: Any, folder: str | PathLike[str]) -> Any:
    """Read a plan that ``write_folder`` wrote. A folder without a card gives a plan without one.

    Args:
        kind: ``Plan``.
        folder: Folder of the plan, or of a checkpoint with the plan in its sub-folder ``pop_ext``.

    Raises:
        FileNotFoundError: There is no plan.
        OSError: A file cannot be read.
        ValueError: A file is broken, the projections are not those that the plan was saved with, or the card describes
            another plan.
    """
    found = next((at for at in (Path(folder), Path(folder, SUBFOLDER)) if (at / PLAN_FILE).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"folder: expected a {PLAN_FILE} in {folder} or in its {SUBFOLDER}, got none")
    plan = kind.load(found / PLAN_FILE)
    file = found / CARD_FILE
    if not file.is_file():
        return plan
    try:
        return plan.replace(card=PlanCard.from_json(read_utf8(file)))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def download_folder(
    repo_id: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | PathLike[str] | None,
    local_files_only: bool,
) -> str:
    """Download the files of a plan from the hub, from the root of a repository or its sub-folder ``pop_ext``.

    Returns:
        The local folder of the repository.

    Raises:
        ImportError: huggingface_hub is missing.
        OSError: ``repo_id`` reads like a path, or the repository or revision does not exist or cannot be reached.
        ValueError: ``repo_id`` is a file, or no id of a repository.
    """
    if os.path.exists(repo_id):
        raise ValueError(
            f"source: expected a folder or the id of a hub repository, got the file {repo_id}, which Plan.load reads"
        )
    if repo_id.startswith(("/", ".", "~")) or repo_id.count("/") > 1 or repo_id.endswith("/"):
        raise FileNotFoundError(f"source: expected a folder or the id of a hub repository, got no folder {repo_id}")
    names = (PLAN_FILE, MATRICES_FILE, CARD_FILE)
    patterns = [f"{prefix}{name}" for prefix in ("", f"{SUBFOLDER}/") for name in names]
    hub = _hub()
    try:
        folder: str = hub.snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=patterns,
        )
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        why = str(error).strip().partition("\n")[0]
        raise kind(
            f"source: expected a folder or the id of a hub repository, got {short(repo_id)}, which is no folder, and "
            f"the hub gives none ({type(error).__name__}: {why})"
        ) from error
    return folder


def upload_folder(
    plan: Any,
    repo_id: str,
    card: PlanCard | None,
    private: bool | None,
    token: str | bool | None,
    commit_message: str | None,
    path_in_repo: str,
) -> str:
    """Write a plan folder and upload it to a repository of the hub, which is made if it does not exist.

    Returns:
        The address of the commit.

    Raises:
        ValueError: The repository holds a checkpoint, and the plan would replace its model card.
    """
    hub = _hub()
    inside = posixpath.normpath(path_in_repo).strip("/")
    inside = "" if inside == "." else inside
    if inside == "" and _holds_checkpoint(hub, repo_id, token):
        raise ValueError(
            f'path_in_repo: expected "{SUBFOLDER}" for {repo_id}, which holds a checkpoint whose README.md the card '
            f"would replace, got {path_in_repo!r}"
        )
    with tempfile.TemporaryDirectory() as folder:
        write_folder(plan, folder, card)
        repo_id = hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        commit = hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=inside,
            token=token,
            commit_message=commit_message or "Upload a prefill plan with pop_ext",
        )
    return str(commit.commit_url)


def _holds_checkpoint(hub: Any, repo_id: str, token: str | bool | None) -> bool:
    """Return whether a repository exists and holds a checkpoint."""
    return bool(hub.repo_exists(repo_id, token=token)) and bool(hub.file_exists(repo_id, CONFIG_FILE, token=token))


def cached_folder(repo_id: str, revision: str | None) -> Path | None:
    """Return the folder of a plan in the local hub cache, without a look at the network; None if there is none."""
    try:
        cached = _hub().try_to_load_from_cache(repo_id, f"{SUBFOLDER}/{PLAN_FILE}", revision=revision)
    except (ImportError, ValueError):  # no hub library, or not the id of a repository
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def check_card(card: Any, plan: Any) -> PlanCard | None:
    """Return ``card``; raise TypeError or ValueError unless it is None or describes ``plan``."""
    if card is None:
        return None
    if not isinstance(card, PlanCard):
        raise TypeError(f"card: expected a pop_ext.plans.card.PlanCard, got {type(card).__name__}")
    if not card.describes(plan):
        other = "fit, made before or after this one" if card.same_layers(plan) else f"plan ({card.plan})"
        raise ValueError(f"card: expected the figures of {plan!r}, got those of another {other}")
    return card


def is_folder(source: str | PathLike[str]) -> bool:
    """Return whether ``source`` is a folder; if not, it is the id of a repository."""
    return os.path.isdir(source)


def _hub() -> Any:
    """Import huggingface_hub.

    Raises:
        ImportError: It is missing.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("plans of the hub need huggingface_hub: pip install 'pop_ext[hf]'", name=error.name) from None
    return huggingface_hub
