"""Make prompts with known continuations, from plain texts, from JSON lines, and as recall tasks.

A prompt and a continuation are int64 tensors [n] on the CPU.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pop_ext.utils.callers import warn_caller
from pop_ext.utils.files import read_own_text

TEXT, RECALL, RETRIEVAL, SECOND_TURN = "text", "recall", "retrieval", "second turn"
"""Kinds of sets."""
Pair = tuple[Tensor, Tensor]
"""(prompt, continuation)."""
_LITERAL_DIGITS, _NAME_LETTERS = 3, 5


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind and length.

    Attributes:
        kind: ``TEXT`` if the continuation is the text that follows, ``RECALL`` if it is the value that the prompt's
            first line defines, ``RETRIEVAL`` if it is a value that stands anywhere in the prompt, and ``SECOND_TURN``
            for a retrieval in the second turn of a dialogue.
        length: Tokens of each prompt, of the first one in dialogues. None if they differ, as in JSON lines.
        pairs: One (prompt, continuation) per prompt. In dialogues the prompt is what the second turn adds.
        first_turns: The first (prompt, answer) of each dialogue. Empty for other kinds.
    """

    kind: str
    length: int | None
    pairs: tuple[Pair, ...]
    first_turns: tuple[Pair, ...] = ()

    @property
    def has_answers(self) -> bool:
        """True if the continuations are answers, which are either exact or not."""
        return self.kind != TEXT

    @property
    def digest(self) -> str:
        """SHA-256 over kind, length and all ids, in hexadecimal digits."""
        found = hashlib.sha256(f"{self.kind} {self.length}".encode())
        for context, continuation in (*self.first_turns, *self.pairs):
            for ids in (context, continuation):
                found.update(f" {len(ids)} ".encode() + ids.cpu().numpy().astype("<i8").tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class Texts:
    """Tokenized contents of text files.

    Attributes:
        plain: Ids [n] of each plain text.
        pairs: (prompt, continuation) of each JSON line.
    """

    plain: tuple[Tensor, ...]
    pairs: tuple[Pair, ...]


def read_texts(paths: Sequence[Path], tokenizer: Any) -> Texts:
    """Read and tokenize files of plain text and of JSON lines; of files with equal contents the first.

    Args:
        paths: Files. One that ends in ``.jsonl`` holds an object with the strings ``prompt`` and ``continuation`` on
            each line; any other file is plain text.
        tokenizer: Hugging Face tokenizer.

    Raises:
        OSError: A file cannot be read.
        ValueError: A line is not such an object, or a prompt or continuation in it has no token, or is no Unicode.
    """
    plain: list[Tensor] = []
    pairs: list[Pair] = []
    for name, text in without_copies((str(path), read_own_text(path)) for path in paths):
        path = Path(name)
        if path.suffix != ".jsonl":
            plain.append(encode(tokenizer, text))
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                pairs.append(_pair_of_line(f"{path}, line {number}", line, tokenizer))
    return Texts(tuple(plain), tuple(pairs))


def without_copies(named: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return (name, text) of each text, and of equal texts only the first; a warning names the others.

    A copy is no further evidence, and one that judges what its original has fitted would judge too well.
    """
    found: dict[str, tuple[str, str]] = {}
    copies = []
    for name, text in named:
        check_unicode(name, text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest in found:
            copies.append(name)
        else:
            found[digest] = (name, text)
    if copies:
        warn_caller(f"of {len(found) + len(copies)} texts {len(copies)} are copies, and left out: {', '.join(copies)}")
    return list(found.values())


def check_unicode(name: str, *texts: str) -> None:
    """Raise ValueError for half a surrogate pair in a text, which no tokenizer takes; ``name`` is that of the text."""
    for text in texts:
        lone = re.search("[\ud800-\udfff]", text)
        if lone is not None:
            raise ValueError(f"{name}: expected Unicode, got half a surrogate pair at offset {lone.start()}")


def _pair_of_line(where: str, line: str, tokenizer: Any) -> Pair:
    """Parse a JSON line; ``where`` names it in errors."""
    try:
        members = json.loads(line)
        texts = [members[name] for name in ("prompt", "continuation")]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f'{where}: expected an object with "prompt" and "continuation", got {line:.60}') from None
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{where}: expected strings as "prompt" and "continuation", got {line:.60}')
    check_unicode(where, *texts)
    context, continuation = (encode(tokenizer, text) for text in texts)
    context = torch.cat([beginning_of(tokenizer), context])
    if len(context) == 0 or len(continuation) == 0:
        raise ValueError(f"{where}: expected at least one token of each, got {len(context)} and {len(continuation)}")
    return context, continuation


def text_sets(
    texts: Texts, tokenizer: Any, lengths: Sequence[int], continuation: int, samples: int, limit: int | None = None
) -> list[PromptSet]:
    """Cut the plain texts into prompts with continuations, one set per length, and add one set of the JSON lines.

    Continuations never overlap; prompts may. All lengths share the same continuations, and a shorter prompt is the end
    of a longer one, so losses can be compared across lengths.

    Args:
        texts: Result of ``read_texts``.
        tokenizer: Hugging Face tokenizer.
        lengths: Prompt lengths in tokens.
        continuation: Tokens of each continuation.
        samples: Largest number of prompts per set. They are spread evenly over all texts.
        limit: Largest number of tokens that the model takes. A longer prompt of a JSON line loses its beginning, but
            keeps the token that the tokenizer puts before every text. None for no limit.

    Raises:
        ValueError: The model does not take such a length, or the texts are too short for a single prompt.
    """
    sets = []
    if texts.plain:
        beginning = beginning_of(tokenizer)
        check_lengths(lengths, continuation, limit)
        ends = window_ends(texts.plain, max(lengths) - len(beginning), continuation, samples)
        for length in sorted(set(lengths)):
            own = length - len(beginning)
            pairs = [(torch.cat([beginning, text[at - own : at]]), text[at : at + continuation]) for text, at in ends]
            sets.append(PromptSet(TEXT, length, tuple(pairs)))
    if texts.pairs:
        begin = len(beginning_of(tokenizer))
        fitting = [(_truncate_prompt(ids, begin, limit, after), after) for ids, after in texts.pairs]
        sets.append(PromptSet(TEXT, None, tuple(fitting[:samples])))
    return sets


def recall_sets(
    texts: Texts, tokenizer: Any, lengths: Sequence[int], samples: int, seed: int = 0, limit: int | None = None
) -> list[PromptSet]:
    """Make recall prompts: the first line defines a name, and the last line asks for its value.

    The first line is ``NAME = 123`` with a random name and a random number. Tokens of a plain text follow, and then
    ``NAME =``. The continuation is `` 123``. Name and number have the same tokens in both lines.

    Args:
        texts: Result of ``read_texts``. Only its plain texts are used.
        tokenizer: Hugging Face tokenizer.
        lengths: Prompt lengths in tokens.
        samples: Largest number of prompts per set.
        seed: Seed of names and numbers.
        limit: Largest number of tokens that the model takes. None for no limit.

    Returns:
        One set per length.

    Raises:
        ValueError: As for ``text_sets``, or a length is too short for the two lines.
    """
    draw = random.Random(seed)
    line, sets = encode(tokenizer, "\n"), []
    beginning = beginning_of(tokenizer)
    check_lengths(lengths, _LITERAL_DIGITS + 1, limit)
    for length in sorted(set(lengths)) if texts.plain else []:
        ends = window_ends(texts.plain, length, 1, samples)
        pairs = []
        for text, at in ends:
            name = "".join(draw.choices(string.ascii_uppercase, k=_NAME_LETTERS))
            asked = encode(tokenizer, f"\n{name} =")
            answer = encode(tokenizer, f" {draw.randrange(10 ** (_LITERAL_DIGITS - 1), 10**_LITERAL_DIGITS)}")
            room = length - len(beginning) - 2 * len(asked) - len(answer) - len(line)
            if room < 1:
                raise ValueError(
                    f"lengths: expected at least {length - room + 1} tokens to hold both lines, got {length}"
                )
            pairs.append((torch.cat([beginning, asked, answer, line, text[at - room : at], asked]), answer))
        sets.append(PromptSet(RECALL, length, tuple(pairs)))
    return sets


def calibration_batches(texts: Texts, tokenizer: Any, tokens: int, samples: int, batch: int = 4) -> list[Tensor]:
    """Cut texts into calibration sequences for ``pop_ext.importance`` and ``pop_ext.fit``. They do not overlap.

    The plain texts are used, and prompt and continuation of each JSON line joined to one text.

    Args:
        texts: Result of ``read_texts``.
        tokenizer: Hugging Face tokenizer.
        tokens: Tokens of each sequence.
        samples: Largest number of sequences.
        batch: Sequences per batch.

    Returns:
        Batches, int64 [batch, tokens] each; the last may be smaller.

    Raises:
        ValueError: The texts are too short for a single sequence.
    """
    beginning = beginning_of(tokenizer)
    windows = _calibration_windows(texts, tokenizer, tokens, samples)
    own = tokens - len(beginning)
    rows = torch.stack([torch.cat([beginning, text[at : at + own]]) for text, at in windows])
    return list(rows.split(batch))


def texts_before_holdout(texts: Texts, tokenizer: Any, tokens: int, samples: int, held: int) -> Texts:
    """Return the plain texts before the last ``held`` sequences of ``calibration_batches``, called with the same texts.

    Tasks that are made from them share no text with these sequences.
    """
    windows = _calibration_windows(texts, tokenizer, tokens, samples)
    first, at = windows[len(windows) - held]
    before = list(itertools.takewhile(lambda text: text is not first, texts.plain))
    if len(before) < len(texts.plain):
        before.append(first[:at])
    return Texts(tuple(text for text in before if len(text)), ())


def texts_outside(texts: Texts, tokenizer: Any, tokens: int, samples: int, held: Iterable[int]) -> Texts:
    """Return the plain texts without some sequences of ``calibration_batches``, called with the same arguments.

    Tasks that are made from what is left share no text with these sequences.

    Args:
        texts: Result of ``read_texts``, without JSON lines.
        tokenizer: As for ``calibration_batches``, like the next two.
        tokens: Tokens of each sequence.
        samples: Largest number of sequences.
        held: Indices of the sequences to leave out.
    """
    windows, own = _calibration_windows(texts, tokenizer, tokens, samples), tokens - len(beginning_of(tokenizer))
    out = [windows[index] for index in held]
    parts: list[Tensor] = []
    for text in texts.plain:
        begin = 0
        for at in sorted(place for one, place in out if one is text):
            parts.append(text[begin:at])
            begin = at + own
        parts.append(text[begin:])
    return Texts(tuple(part for part in parts if len(part)), ())


def _calibration_windows(texts: Texts, tokenizer: Any, tokens: int, samples: int) -> list[tuple[Tensor, int]]:
    """Return (text, start) of each calibration sequence, in the order of the texts."""
    begin = len(beginning_of(tokenizer))
    whole = [*texts.plain, *(torch.cat([context[begin:], after]) for context, after in texts.pairs)]
    return window_ends(whole, 0, tokens - begin, samples)


def _truncate_prompt(context: Tensor, begin: int, limit: int | None, after: Tensor) -> Tensor:
    """Cut a prompt so that it fits the model with its continuation: keep its first ``begin`` tokens and its end."""
    if limit is None or len(context) + len(after) <= limit:
        return context
    if len(after) >= limit:
        raise ValueError(f"continuation: expected fewer tokens than the {limit} that the model takes, got {len(after)}")
    own = limit - len(after) - begin
    return torch.cat([context[:begin], context[len(context) - own :]])


def window_ends(texts: Sequence[Tensor], before: int, after: int, samples: int) -> list[tuple[Tensor, int]]:
    """Choose where prompts end and continuations begin.

    Args:
        texts: Ids [n] of each text.
        before: Tokens needed before a place.
        after: Tokens needed after a place, and the distance between places.
        samples: Largest number of places. They are spread evenly.

    Returns:
        (text, index of the first token after the place) each.

    Raises:
        ValueError: No text is long enough.
    """
    places = [(text, at) for text in texts for at in range(before, len(text) - after + 1, after)]
    if not places:
        longest = max((len(text) for text in texts), default=0)
        raise ValueError(f"text: expected a text of at least {before + after} tokens, got {longest}")
    count = min(samples, len(places))
    return [places[index * len(places) // count] for index in range(count)]


def check_lengths(lengths: Sequence[int], after: int, limit: int | None) -> None:
    if not lengths or min(lengths) < 2:
        raise ValueError(f"lengths: expected integers from 2, got {list(lengths)}")
    if limit is not None and max(lengths) + after > limit:
        raise ValueError(f"lengths: expected at most {limit - after} (the model takes {limit}), got {max(lengths)}")


def encode(tokenizer: Any, text: str) -> Tensor:
    # verbose=False: no warning that the text is longer than the model takes; it is cut into prompts later.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def beginning_of(tokenizer: Any) -> Tensor:
    """Return the token that the tokenizer puts before every text, [1] or [0]; many models fail without it."""
    ids = tokenizer("a")["input_ids"]
    begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return torch.tensor(ids[:1] if begins else [], dtype=torch.int64, device="cpu")
