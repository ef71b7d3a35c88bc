"""Split texts into contiguous parts that calibrate a plan and parts that judge it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from pop_ext.evaluation.prompts import Texts, encode, without_copies
from pop_ext.plans.card import CardText
from pop_ext.utils.files import read_own_text


@dataclass(frozen=True)
class SplitTexts:
    """Texts in two parts that share no token.

    Attributes:
        calibration: The first part of each text.
        held_out: The last part of each text that is long enough.
        sources: What a card says of them.
    """

    calibration: Texts
    held_out: Texts
    sources: tuple[CardText, ...]


def split_texts(
    texts: Iterable[str | PathLike[str]], tokenizer: Any, share: float, window: int, licence: str | None = None
) -> SplitTexts:
    """Tokenize texts and cut each in two; of equal texts only the first, with a warning.

    The last part has ``share`` of the tokens, but at least ``window``. A text that then has no ``window`` left for
    calibration is not cut, and used for calibration only.

    Args:
        texts: Paths of files, as ``Path`` objects, or contents, as strings.
        tokenizer: Hugging Face tokenizer.
        share: Share of each text to hold out, in (0, 1).
        window: Tokens of a held-out prompt and its continuation.
        licence: Licence of the texts, for the card.

    Raises:
        TypeError: ``texts`` is a single string, or one of them is neither a string nor a path.
        ValueError: There is no text, one is a ``.jsonl`` file or no Unicode, or none is long enough to hold anything
            out.
        OSError: A file cannot be read.
    """
    if isinstance(texts, (str, bytes, PathLike)):
        raise TypeError(f"texts: expected a list of texts or paths, got {type(texts).__name__}")
    first: list[Tensor] = []
    last: list[Tensor] = []
    sources: list[CardText] = []
    longest = 0
    for name, content in without_copies(_read(given, number) for number, given in enumerate(texts, 1)):
        ids = encode(tokenizer, content)
        longest = max(longest, len(ids))
        held = max(round(share * len(ids)), window)
        cut = len(ids) - held if len(ids) - held >= window else len(ids)
        sha256 = hashlib.sha256(content.encode()).hexdigest()
        for part, into, role in ((ids[:cut], first, "calibration"), (ids[cut:], last, "held-out")):
            if len(part):
                into.append(part)
                sources.append(CardText(name, sha256, len(part), role, licence))
    if not first:
        raise ValueError("texts: expected at least one text, got none")
    if not last:
        raise ValueError(
            f"texts: expected a text of at least {2 * window} tokens, half of which can be held out, got {longest} in "
            "the longest"
        )
    return SplitTexts(Texts(tuple(first), ()), Texts(tuple(last), ()), tuple(sources))


def _read(given: Any, number: int) -> tuple[str, str]:
    """Return name and content of a text."""
    if isinstance(given, str):
        return f"text {number}", given
    if not isinstance(given, PathLike):
        raise TypeError(f"texts: expected strings or paths, got {type(given).__name__}")
    path = Path(os.fspath(given))
    if path.suffix == ".jsonl":
        raise ValueError(f"texts: expected plain texts, of which a part can be held out, got {path}")
    return path.name, read_own_text(path)


def token_counts(sources: Sequence[CardText], role: str) -> int:
    """Return the number of tokens in a role."""
    return sum(source.tokens for source in sources if source.role == role)
