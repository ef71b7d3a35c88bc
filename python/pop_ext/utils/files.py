"""Files that others wrote: read up to a limit, as UTF-8."""

from __future__ import annotations

import os
import stat
from os import PathLike
from pathlib import Path

LIMIT = 16 << 20
"""Bytes of a file, where no other limit is given."""
_PART = 1 << 20


def read_limited(path: str | PathLike[str], limit: int = LIMIT, pipes: bool = False) -> bytes:
    """Return a file, and read no more of it than ``limit`` bytes, since a device may have no end.

    Args:
        path: The file.
        limit: Bytes that it may have.
        pipes: True to wait for what comes through a pipe. Otherwise a pipe, which may never bring anything, is refused.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is longer, or a pipe. The text does not name the path.
    """
    data = bytearray()
    try:
        with open(path, "rb", opener=None if pipes else _open_at_once) as file:
            if not pipes and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
                raise ValueError("expected a file, got a pipe")
            while part := file.read(_PART):  # at once it would take the memory of the limit
                data += part
                if len(data) > limit:
                    raise ValueError(f"expected a file of at most {limit} bytes, got more")
    except OSError as error:
        if error.filename is None:  # of a read, not of the opening
            error.filename = os.fspath(path)
        raise
    return bytes(data)


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_utf8(path: str | PathLike[str], limit: int = LIMIT, pipes: bool = False) -> str:
    """Return a text file (``read_limited``). Ends of lines become ``\\n``, as Python's text files have them.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is longer, a pipe, or not UTF-8. The text does not name the path.
    """
    data = read_limited(path, limit, pipes)
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8, got byte {data[error.start]:#04x} at offset {error.start}") from None


def read_own_text(path: Path) -> str:
    """Return a text file of the user's, who may also pass a pipe (``<(command)``).

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8, or has over 8 GiB. The text starts with the path.
    """
    try:
        return read_utf8(path, 8 << 30, pipes=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
