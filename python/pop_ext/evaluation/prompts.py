"""Prompts and their continuations, from plain texts and from JSON lines; and prompts that ask for what they began with.

A prompt and a continuation are int64 tensors [n] on the CPU.
"""

from __future__ import annotations

import hashlib
import json
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TEXT, RECALL = "text", "recall"
Pair = tuple[Tensor, Tensor]
_LITERAL_DIGITS, _NAME_LETTERS = 3, 5


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind and length.

    Attributes:
        kind: ``TEXT``: what truly follows; ``RECALL``: what the prompt's first line defined.
        length: tokens of each prompt; None: each has its own, as JSON lines give them.
        pairs: (prompt, continuation) each.
    """

    kind: str
    length: int | None
    pairs: tuple[Pair, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over kind, length and all ids."""
        found = hashlib.sha256(f"{self.kind} {self.length}".encode())
        for context, continuation in self.pairs:
            for ids in (context, continuation):
                found.update(f" {len(ids)} ".encode() + ids.cpu().numpy().astype("<i8").tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class Texts:
    """What files hold: tokens of plain texts, and pairs of JSON lines."""

    plain: tuple[Tensor, ...]
    pairs: tuple[Pair, ...]


def read_texts(paths: Sequence[Path], tokenizer: Any) -> Texts:
    """Files that end in .jsonl hold an object with ``prompt`` and ``continuation`` a line, all others plain text.

    Raises:
        OSError: a file cannot be read.
        ValueError: a line that is no such object, or one of both is empty.
    """
    plain: list[Tensor] = []
    pairs: list[Pair] = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            plain.append(_encode(tokenizer, text))
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                pairs.append(_pair_of_line(f"{path}, line {number}", line, tokenizer))
    return Texts(tuple(plain), tuple(pairs))


def _pair_of_line(where: str, line: str, tokenizer: Any) -> Pair:
    try:
        members = json.loads(line)
        texts = [members[name] for name in ("prompt", "continuation")]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{where}: expected an object with "prompt" and "continuation", got {line:.60}') from None
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{where}: expected strings as "prompt" and "continuation", got {line:.60}')
    context, continuation = (_encode(tokenizer, text) for text in texts)
    context = torch.cat([_beginning(tokenizer), context])
    if len(context) == 0 or len(continuation) == 0:
        raise ValueError(f"{where}: expected at least one token of each, got {len(context)} and {len(continuation)}")
    return context, continuation


def text_sets(
    texts: Texts, tokenizer: Any, lengths: Sequence[int], continuation: int, samples: int, limit: int | None = None
) -> list[PromptSet]:
    """Windows of the plain texts, a set a length; and one of what the JSON lines hold.

    Continuations never overlap, prompts may. All lengths share the continuations: a shorter prompt is the end of a
    longer one, so that losses by length can be compared.

    Args:
        lengths: tokens of prompts.
        continuation: tokens after each.
        samples: windows at most, spread evenly over all texts.
        limit: how many tokens the model takes; beyond it JSON lines' prompts lose what comes first, but not the token
            that the tokenizer puts before every text.

    Raises:
        ValueError: a length that the model does not take, or texts too short for a single window.
    """
    sets = []
    if texts.plain:
        beginning = _beginning(tokenizer)
        _check_lengths(lengths, continuation, limit)
        ends = _window_ends(texts.plain, max(lengths) - len(beginning), continuation, samples)
        for length in sorted(set(lengths)):
            own = length - len(beginning)
            pairs = [(torch.cat([beginning, text[at - own : at]]), text[at : at + continuation]) for text, at in ends]
            sets.append(PromptSet(TEXT, length, tuple(pairs)))
    if texts.pairs:
        begin = len(_beginning(tokenizer))
        fitting = [(_end_of(ids, begin, limit, after), after) for ids, after in texts.pairs]
        sets.append(PromptSet(TEXT, None, tuple(fitting[:samples])))
    return sets


def recall_sets(
    texts: Texts, tokenizer: Any, lengths: Sequence[int], samples: int, seed: int = 0, limit: int | None = None
) -> list[PromptSet]:
    """Prompts of the plain texts that define a name in their first line and ask for its value in their last.

    The first line is ``NAME = 123``, a random name and a random number; then come tokens of a text, then ``NAME =``.
    The continuation is `` 123``. Name and number are made of the same tokens at both ends.

    Raises:
        ValueError: as ``text_sets``.
    """
    draw = random.Random(seed)
    line, sets = _encode(tokenizer, "\n"), []
    beginning = _beginning(tokenizer)
    _check_lengths(lengths, _LITERAL_DIGITS + 1, limit)
    for length in sorted(set(lengths)) if texts.plain else []:
        ends = _window_ends(texts.plain, length, 1, samples)
        pairs = []
        for text, at in ends:
            name = "".join(draw.choices(string.ascii_uppercase, k=_NAME_LETTERS))
            asked = _encode(tokenizer, f"\n{name} =")
            answer = _encode(tokenizer, f" {draw.randrange(10 ** (_LITERAL_DIGITS - 1), 10**_LITERAL_DIGITS)}")
            room = length - len(beginning) - 2 * len(asked) - len(answer) - len(line)
            if room < 1:
                raise ValueError(
                    f"lengths: expected at least {length - room + 1} tokens, to define and to ask, got {length}"
                )
            pairs.append((torch.cat([beginning, asked, answer, line, text[at - room : at], asked]), answer))
        sets.append(PromptSet(RECALL, length, tuple(pairs)))
    return sets


def calibration_batches(texts: Texts, tokenizer: Any, tokens: int, samples: int, batch: int = 4) -> list[Tensor]:
    """Sequences [batch, tokens] for ``pop_ext.importance`` and ``fit``; they do not overlap.

    They are of the plain texts, and of prompt and continuation of each JSON line, which are a text.

    Raises:
        ValueError: texts too short for a single one.
    """
    beginning = _beginning(tokenizer)
    own = tokens - len(beginning)
    whole = [*texts.plain, *(torch.cat([context[len(beginning) :], after]) for context, after in texts.pairs)]
    rows = torch.stack(
        [torch.cat([beginning, text[at : at + own]]) for text, at in _window_ends(whole, 0, own, samples)]
    )
    return list(rows.split(batch))


def _end_of(context: Tensor, begin: int, limit: int | None, after: Tensor) -> Tensor:
    """What of a prompt the model takes beside its continuation: its first ``begin`` tokens, and its end."""
    if limit is None or len(context) + len(after) <= limit:
        return context
    if len(after) >= limit:
        raise ValueError(f"continuation: expected fewer tokens than the {limit} that the model takes, got {len(after)}")
    own = limit - len(after) - begin
    return torch.cat([context[:begin], context[len(context) - own :]])


def _window_ends(texts: Sequence[Tensor], before: int, after: int, samples: int) -> list[tuple[Tensor, int]]:
    """At most ``samples`` places (text, index) with so many tokens before and after, ``after`` apart, spread evenly."""
    places = [(text, at) for text in texts for at in range(before, len(text) - after + 1, after)]
    if not places:
        longest = max((len(text) for text in texts), default=0)
        raise ValueError(f"text: expected one of at least {before + after} tokens, got {longest}")
    count = min(samples, len(places))
    return [places[index * len(places) // count] for index in range(count)]


def _check_lengths(lengths: Sequence[int], after: int, limit: int | None) -> None:
    if not lengths or min(lengths) < 2:
        raise ValueError(f"lengths: expected integers from 2, got {list(lengths)}")
    if limit is not None and max(lengths) + after > limit:
        raise ValueError(f"lengths: expected at most {limit - after} (the model takes {limit}), got {max(lengths)}")


def _encode(tokenizer: Any, text: str) -> Tensor:
    # `verbose`: a text is longer than the model takes before it is cut into windows.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _beginning(tokenizer: Any) -> Tensor:
    """The token that the tokenizer puts before every text, [1] or [0]: many models are lost without it."""
    ids = tokenizer("a")["input_ids"]
    begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return torch.tensor(ids[:1] if begins else [], dtype=torch.int64, device="cpu")
