"""The corpus: the running interpreter's standard library, split into training and held-out files."""

from __future__ import annotations

import hashlib
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

HELD_OUT_PERCENT = 7
# Long enough to test the use of context, short enough that no single file dominates the mean.
HELD_OUT_BYTES = range(4096, 65536)
# A module is not held out if another file has this share of its distinct long lines: the test would leak.
MAX_SHARED_LINES = 0.25
LONG_LINE = 20

_TEST_PARTS = {"test", "tests", "idle_test"}
_TABLE_PARTS = {"encodings"}
_SKIPPED_PARTS = {"site-packages", "pydoc_data", "__pycache__"}


@dataclass(frozen=True)
class SourceFile:
    """A file of the library: relative POSIX `path`, `text`, and `weight`, the probability of being in an epoch."""

    path: str
    text: str
    weight: float


def stdlib_files(root: Path | None = None) -> list[SourceFile]:
    """Return all distinct UTF-8 `*.py` files under `root` (default: the standard library), sorted by path."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files: list[SourceFile] = []
    seen: set[str] = set()
    for file in sorted(root.rglob("*.py")):
        rel = file.relative_to(root).as_posix()
        if _SKIPPED_PARTS & set(PurePosixPath(rel).parts) or rel.startswith("_sysconfigdata"):
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # deliberately broken test inputs, and a few files in legacy encodings
        digest = hashlib.sha256(text.encode()).hexdigest()
        if not text.strip() or digest in seen:
            continue
        seen.add(digest)
        files.append(SourceFile(rel, text, _weight(rel)))
    return files


def _weight(rel: str) -> float:
    parts = set(PurePosixPath(rel).parts)
    if parts & _TABLE_PARTS:
        return 0.1  # character maps: many bytes with little language
    if parts & _TEST_PARTS:
        return 0.3  # over half of all bytes, and less similar to the held-out library code
    return 1.0


def _long_lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE}


def shared_lines(candidates: list[SourceFile], others: list[SourceFile]) -> dict[str, tuple[float, str]]:
    """Return for each candidate the largest share of its distinct long lines that another file has, and that file."""
    owners: dict[str, list[str]] = {}
    lines = {c.path: _long_lines(c.text) for c in candidates}
    wanted = set().union(*lines.values()) if lines else set()
    for other in others:
        for line in _long_lines(other.text) & wanted:
            owners.setdefault(line, []).append(other.path)
    result = {}
    for path, own in lines.items():
        counts = Counter(owner for line in own for owner in owners.get(line, ()) if owner != path)
        owner, count = counts.most_common(1)[0] if counts else ("", 0)
        result[path] = (count / max(len(own), 1), owner)
    return result


def split(files: list[SourceFile]) -> tuple[list[SourceFile], list[SourceFile], dict[str, tuple[float, str]]]:
    """Return training files, held-out files, and the held-out files' largest overlap with a training file.

    Candidates are chosen by a hash of the path. A candidate that another file largely repeats goes to training.
    """
    candidates = [f for f in files if f.weight == 1.0 and len(f.text.encode()) in HELD_OUT_BYTES]
    candidates = [f for f in candidates if _bucket(f.path) < HELD_OUT_PERCENT]
    overlap = shared_lines(candidates, files)
    held_out = [f for f in candidates if overlap[f.path][0] <= MAX_SHARED_LINES]
    chosen = {f.path for f in held_out}
    train = [f for f in files if f.path not in chosen]
    return train, held_out, shared_lines(held_out, train)


def _bucket(rel: str) -> int:
    return int.from_bytes(hashlib.sha256(rel.encode()).digest()[:8], "big") % 100


class WindowStream:
    """Endless shuffled windows of the training tokens; every epoch draws its files by weight.

    `docs` are uint16 token arrays that start with the document separator. The position is a plain tuple, so that it
    can be saved in a checkpoint.
    """

    def __init__(self, docs: list[np.ndarray], weights: list[float], seed: int, window: int, epoch: int = 0) -> None:
        self.docs, self.weights, self.seed = docs, np.asarray(weights), seed
        self.start(window, epoch, 0)

    def start(self, window: int, epoch: int, index: int) -> None:
        """Go to window number `index` of epoch `epoch`, with windows of `window` tokens plus the last one's target."""
        rng = np.random.default_rng([self.seed, epoch])
        chosen = np.flatnonzero(rng.random(len(self.docs)) < self.weights)
        rng.shuffle(chosen)
        self.stream = np.concatenate([self.docs[i] for i in chosen])
        first = int(rng.integers(window))
        self.starts = rng.permutation(np.arange(first, len(self.stream) - window - 1, window))
        self.window, self.epoch, self.index = window, epoch, index

    @property
    def state(self) -> tuple[int, int, int]:
        """Return (window, epoch, index) of the next window, the arguments of `start`."""
        return self.window, self.epoch, self.index

    def batch(self, count: int) -> np.ndarray:
        """Return the next `count` windows, int64 [count, window + 1]."""
        return np.stack([next(self._windows()) for _ in range(count)]).astype(np.int64)

    def _windows(self) -> Iterator[np.ndarray]:
        if self.index >= len(self.starts):
            self.start(self.window, self.epoch + 1, 0)
        at = self.starts[self.index]
        self.index += 1
        yield self.stream[at : at + self.window + 1]
