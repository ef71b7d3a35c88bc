"""Files that others wrote: read up to a limit, as UTF-8."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

LIMIT = 16 << 20
"""Bytes of a file, where no other limit is given."""
_PART = 1 << 20


def read_utf8(path: str | PathLike[str], limit: int = LIMIT) -> str:
    """Return a text file, and read no more of it than ``limit`` bytes, since a device may have no end.

    Ends of lines become ``\\n``, as Python's text files have them.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is longer, or not UTF-8. The text does not name the path.
    """
    data = bytearray()
    with Path(path).open("rb") as file:
        while part := file.read(_PART):  # at once it would take the memory of the limit
            data += part
            if len(data) > limit:
                raise ValueError(f"expected a file of at most {limit} bytes, got more")
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8, got byte {data[error.start]:#04x} at offset {error.start}") from None


def read_own_text(path: Path) -> str:
    """Return a text file of the user's.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8, or has over 8 GiB. The text starts with the path.
    """
    try:
        return read_utf8(path, 8 << 30)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
