"""Collect English prose, reference documentation and code from packages, calibration and held-out files apart.

| domain | source | licence |
|---|---|---|
| prose | The Debian Administrator's Handbook, Debian package `debian-handbook` | GPL-2.0-or-later or CC-BY-SA-3.0 |
| reference | library reference of Python, the Debian package that `python3-doc` names | PSF-2.0, its examples 0BSD |
| code | standard library of the Python that runs this | PSF-2.0 |

The Debian packages are downloaded and unpacked into a cache without root. The texts stay there: none is part of this
repository.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from model import UnavailableError, cache_folder

CALIBRATION, HELDOUT = "calibration", "heldout"
SIZES = range(4_000, 120_000)
"""Characters of a text. A shorter one gives no long prompt, and a longer one would outweigh the others."""
_HIDDEN_TAGS = {"head", "nav", "script", "style"}
_HIDDEN_IDS = {"banner", "title"}
_HIDDEN_CLASSES = {"docnav", "toc", "mobile-nav", "related", "sphinxsidebar", "footer", "headerlink"}
_VOID_TAGS = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "wbr"}
_BLOCK_TAGS = {"div", "p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "dl", "ul", "ol", "tr", "pre", "table"}


@dataclass(frozen=True)
class Domain:
    """Text files of one kind.

    Attributes:
        calibration: Files for fits and choices.
        heldout: Files for measurements. About a quarter, chosen by the hash of their names.
    """

    calibration: list[Path]
    heldout: list[Path]


def fetch_texts(cache: Path | None = None) -> tuple[dict[str, Domain], list[str]]:
    """Return the domains that can be had, and make their files on the first call.

    Args:
        cache: Folder to keep the files in. None: ``cache_folder()``.

    Returns:
        Name -> domain, and one line for each domain that is missing. Code is always there.

    Raises:
        OSError: The cache folder cannot be written.
    """
    root = (cache or cache_folder()) / "texts"
    sources: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
        "prose": _prose,
        "reference": _reference,
        "code": _code,
    }
    domains, missing = {}, []
    for name, source in sources.items():
        try:
            if not (root / name).exists():
                _write(root / name, source)
        except UnavailableError as error:
            missing.append(f"no {name}: {error}")
            continue
        files = (sorted((root / name / part).glob("*.txt")) for part in (CALIBRATION, HELDOUT))
        domains[name] = Domain(*files)
    return domains, missing


def part_of(name: str) -> str:
    """Return ``CALIBRATION`` or ``HELDOUT`` for a file name, in every version of a package the same."""
    return HELDOUT if hashlib.sha256(name.encode()).digest()[0] % 4 == 0 else CALIBRATION


def _write(folder: Path, source: Callable[[Path], Iterator[tuple[str, str]]]) -> None:
    """Write the texts of a domain; ``source`` takes a scratch folder and yields names and texts."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        for part in (CALIBRATION, HELDOUT):
            (made / part).mkdir(parents=True)
        for name, text in source(Path(scratch)):
            if len(text) in SIZES:
                (made / part_of(name) / f"{name}.txt").write_text(text, encoding="utf-8")
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise


def _prose(scratch: Path) -> Iterator[tuple[str, str]]:
    folder = _unpack_deb("debian-handbook", scratch) / "usr/share/doc/debian-handbook/html/en-US"
    for path in sorted(folder.glob("*.html")):
        yield path.stem, text_of_html(path.read_text(encoding="utf-8"))


def _reference(scratch: Path) -> Iterator[tuple[str, str]]:
    found = _run(["apt-cache", "depends", "python3-doc"], scratch)
    names = [line.split()[-1] for line in found.splitlines() if line.strip().startswith("Depends: python3")]
    if not names:
        raise UnavailableError("apt-cache knows no python3-doc (apt-get update)")
    for path in sorted(_unpack_deb(names[0], scratch).glob("usr/share/doc/python3*/html/library/*.html")):
        yield path.stem, text_of_html(path.read_text(encoding="utf-8"))


def _code(_: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.stem, path.read_text(encoding="utf-8", errors="replace")


def _unpack_deb(package: str, scratch: Path) -> Path:
    """Download a Debian package into a scratch folder, unpack it there, and return the folder of its content."""
    _run(["apt-get", "download", "-q", package], scratch)
    [deb] = scratch.glob(f"{package}_*.deb")
    _run(["dpkg-deb", "-x", str(deb), str(scratch / package)], scratch)
    return scratch / package


def _run(command: list[str], folder: Path) -> str:
    """Run a command in a folder, and return what it prints."""
    if shutil.which(command[0]) is None:
        raise UnavailableError(f"{command[0]} is missing; the texts come from Debian packages")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise UnavailableError(f"{' '.join(command[:3])}: {said[-1] if said else f'exit {done.returncode}'}")
    return done.stdout


class _Text(HTMLParser):
    """Collect the text of a page without its navigation: one paragraph per block, preformatted blocks as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self._open: list[tuple[str, bool]] = []
        self._block: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID_TAGS:
            return
        named = {key: set((value or "").split()) for key, value in attrs}
        hidden = (
            tag in _HIDDEN_TAGS or named.get("id", set()) & _HIDDEN_IDS or named.get("class", set()) & _HIDDEN_CLASSES
        )
        if tag in _BLOCK_TAGS:
            self._end_block()
        self._open.append((tag, bool(hidden)))

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCK_TAGS:
            self._end_block()
        if any(name == tag for name, _ in self._open):  # tags may be left open
            while self._open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not any(hidden for _, hidden in self._open):
            self._block.append(data)

    def close(self) -> None:
        super().close()
        self._end_block()

    def _end_block(self) -> None:
        text = "".join(self._block)
        is_pre = any(tag == "pre" for tag, _ in self._open)
        text = text.strip("\n").rstrip() if is_pre else " ".join(text.split())
        if text.strip():
            self.blocks.append(text)
        self._block = []


def text_of_html(page: str) -> str:
    """Return the text of an HTML page, with an empty line between its blocks."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    return "\n\n".join(parser.blocks) + "\n"
