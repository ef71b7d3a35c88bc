"""Make retrieval and copy tasks from plain texts: a fact stands somewhere in a text, and a question about it follows.

With a chat template the text, the fact and the question are one message of the user. Without one they are plain text
that ends in "Answer:". Tasks of the kinds ``EVALUATION`` and ``TRAINING`` share no wording, no name and no value.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pop_ext.evaluation.prompts import (
    RETRIEVAL,
    SECOND_TURN,
    Pair,
    PromptSet,
    Texts,
    beginning_of,
    encode,
    window_ends,
)
from pop_ext.evaluation.retrieval_templates import EVALUATION, TEMPLATES, TRAINING, Template, value_kind

_SENTENCE_TOKENS = range(8, 33)
_DISTRACTORS = 3
"""Largest number of facts in a training prompt that are not asked for."""


@dataclass(frozen=True)
class _Form:
    """Ids and strings around the parts of a dialogue.

    Attributes:
        head: Ids before the user's first message.
        tail: Ids between the end of the user's message and the answer.
        between: Ids between the end of an answer and the user's next message.
        asked: What precedes a question.
        gap: What precedes the text of an answer.
    """

    head: Tensor
    tail: Tensor
    between: Tensor
    asked: str
    gap: str


@dataclass(frozen=True)
class _Task:
    """A fact and a question about it, as strings. ``answer`` is ``lead`` and what follows it."""

    fact: str
    question: str
    lead: str
    value: str
    end: str

    @property
    def answer(self) -> str:
        return f"{self.lead} {self.value}{self.end}"


def retrieval_pairs(
    texts: Texts,
    tokenizer: Any,
    length: int,
    samples: int,
    *,
    kind: str = EVALUATION,
    seed: int = 0,
    limit: int | None = None,
) -> list[Pair]:
    """Make prompts that hold a fact at a random depth of a text and end in a question about it.

    The fact is a line of its own after a sentence or a line of the text, each with the same probability. A prompt of
    ``EVALUATION`` also holds the beginning of the answer ("The access code of the Green Falcon is"), and the
    continuation is the value alone. A continuation of ``TRAINING`` is the whole answer. Training prompts hold up to
    three more facts; one in nine asks for the rest of a sentence that the text has, another for a remark word by word.

    Args:
        texts: Result of ``read_texts``. Only its plain texts are used; at least one has ``length`` tokens.
        tokenizer: Hugging Face tokenizer. Its chat template is used if it has one.
        length: Tokens of each prompt.
        samples: Number of prompts, spread evenly over the texts.
        kind: ``EVALUATION`` or ``TRAINING``.
        seed: Seed of names, values and places.
        limit: Largest number of tokens that the model takes. None for no limit.

    Returns:
        (prompt [length], continuation) each, int64 on the CPU.

    Raises:
        ValueError: ``kind`` is unknown, ``length`` cannot hold fact and question or exceeds ``limit``, or no text has
            so many tokens.
    """
    draw, form = _start(kind, seed, length, tokenizer)
    pairs = []
    for text, at in window_ends(texts.plain, length, 1, samples):
        if kind == EVALUATION:
            task = _draw_task(draw, kind, tokenizer, texts)
            question = torch.cat([_question(tokenizer, form, task), encode(tokenizer, form.gap + task.lead)])
            prompt = _place(draw, tokenizer, form, text[:at], [task.fact], question, length)
            pairs.append((prompt, encode(tokenizer, f" {task.value}")))
        else:
            pairs.append(_training_pair(draw, tokenizer, form, texts, text[:at], length))
    _check_limit(length, max(len(answer) for _, answer in pairs), limit)
    return pairs


def second_turn_pairs(
    texts: Texts, tokenizer: Any, length: int, samples: int, *, seed: int = 0, limit: int | None = None
) -> list[tuple[Pair, Pair]]:
    """Make dialogues of two turns over one text that holds two facts.

    The first turn asks for one of them and is answered. The second turn asks for the other. Wording, names and values
    are those of ``EVALUATION``.

    Args:
        texts: As for ``retrieval_pairs``.
        tokenizer: As for ``retrieval_pairs``.
        length: Tokens of the first prompt.
        samples: Number of dialogues.
        seed: Seed of names, values and places.
        limit: Largest number of tokens that the model takes. None for no limit.

    Returns:
        ((first prompt [length], whole first answer), (new tokens of the second turn, second value)) each. The new
        tokens begin with what the chat template puts after an answer and end in the beginning of the second answer.

    Raises:
        ValueError: As for ``retrieval_pairs``.
    """
    draw, form = _start(EVALUATION, seed, length, tokenizer)
    dialogues = []
    for text, at in window_ends(texts.plain, length, 1, samples):
        first = _draw_task(draw, EVALUATION, tokenizer, texts)
        second = first
        while second.question == first.question or second.value == first.value:
            second = _draw_task(draw, EVALUATION, tokenizer, texts)
        facts = [first.fact, second.fact]
        prompt = _place(draw, tokenizer, form, text[:at], facts, _question(tokenizer, form, first), length)
        new = [
            form.between,
            encode(tokenizer, second.question),
            form.tail,
            encode(tokenizer, form.gap + second.lead),
        ]
        answer = encode(tokenizer, form.gap + first.answer)
        dialogues.append(((prompt, answer), (torch.cat(new), encode(tokenizer, f" {second.value}"))))
    after = max(len(said) + len(new) + len(value) for (_, said), (new, value) in dialogues)
    _check_limit(length, after, limit)
    return dialogues


def retrieval_sets(
    texts: Texts, tokenizer: Any, lengths: Sequence[int], samples: int, seed: int = 0, limit: int | None = None
) -> list[PromptSet]:
    """Make one set of retrieval prompts per length, of the kind ``EVALUATION``; none without plain texts.

    The arguments and errors are those of ``retrieval_pairs``.
    """
    return [
        PromptSet(RETRIEVAL, length, tuple(retrieval_pairs(texts, tokenizer, length, samples, seed=seed, limit=limit)))
        for length in (sorted(set(lengths)) if texts.plain else [])
    ]


def second_turn_sets(
    texts: Texts, tokenizer: Any, lengths: Sequence[int], samples: int, seed: int = 0, limit: int | None = None
) -> list[PromptSet]:
    """Make one set of second turns per length of the first prompt; none without plain texts.

    The arguments and errors are those of ``second_turn_pairs``.
    """
    sets = []
    for length in sorted(set(lengths)) if texts.plain else []:
        dialogues = second_turn_pairs(texts, tokenizer, length, samples, seed=seed, limit=limit)
        first, second = (tuple(turn[i] for turn in dialogues) for i in (0, 1))
        sets.append(PromptSet(SECOND_TURN, length, second, first))
    return sets


def sentence_ends(tokenizer: Any, ids: Tensor) -> list[int]:
    """Return the indices of tokens that follow the end of a sentence or of a line.

    Args:
        tokenizer: Hugging Face tokenizer.
        ids: int64 [n].

    Returns:
        Indices from 1 to n - 1, in order.
    """

    def decode(*part: int) -> str:
        text: str = tokenizer.decode(list(part), clean_up_tokenization_spaces=False)
        return text

    listed = ids.tolist()
    pieces = {one: decode(one) for one in set(listed)}
    ends = []
    for at in range(1, len(listed)):
        piece = pieces[listed[at - 1]]
        closes = piece.rstrip("\"')").endswith((".", "!", "?"))
        if piece.endswith("\n") or (closes and decode(*listed[at - 1 : at + 1])[len(piece) :][:1].isspace()):
            ends.append(at)
    return ends


def _start(kind: str, seed: int, length: int, tokenizer: Any) -> tuple[random.Random, _Form]:
    if kind not in TEMPLATES:
        raise ValueError(f"kind: expected one of {', '.join(TEMPLATES)}, got {kind!r}")
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ValueError(f"length: expected an int from 2, got {length!r}")
    return random.Random(f"{kind} {seed}"), _form(tokenizer)


def _form(tokenizer: Any) -> _Form:
    """Return the chat form of a tokenizer with a chat template, else the plain form."""
    if not getattr(tokenizer, "chat_template", None):
        tail, between = encode(tokenizer, "\nAnswer:"), encode(tokenizer, "\n\nQuestion: ")
        return _Form(beginning_of(tokenizer), tail, between, "\n\nQuestion: ", " ")
    marks = ["first message", "first answer", "second message"]
    turns = [{"role": role, "content": mark} for role, mark in zip(["user", "assistant", "user"], marks, strict=True)]
    options = {"tokenize": False, "add_generation_prompt": True}
    head, tail = tokenizer.apply_chat_template(turns[:1], **options).split(marks[0])
    between = tokenizer.apply_chat_template(turns, **options).split(marks[1])[1].split(marks[2])[0]
    return _Form(encode(tokenizer, head), encode(tokenizer, tail), encode(tokenizer, between), "\n\n", "")


def _draw_task(draw: random.Random, kind: str, tokenizer: Any, texts: Texts) -> _Task:
    """Draw a template, a name and a value of a kind."""
    template: Template = draw.choice(TEMPLATES[kind])
    name = template.name(draw)
    while True:
        if template.value is None:
            value = _sentence(draw, tokenizer, draw.choice(texts.plain))
            break
        value = template.value(draw)
        if value_kind(value) == kind:
            break
    fact, question, lead = (
        part.format(name=name, value=value) for part in (template.fact, template.question, template.lead)
    )
    return _Task(fact, question, lead, value, template.end)


def _training_pair(draw: random.Random, tokenizer: Any, form: _Form, texts: Texts, text: Tensor, length: int) -> Pair:
    """Make a training task whose prompt has the end of ``text``, int64 [n], as its text."""
    kinds = len(TEMPLATES[TRAINING]) + 1
    if draw.randrange(kinds) == 0:  # completion, as frequent as each template
        own = max(length // 2, length - len(form.head) - len(form.tail) - 2 * _SENTENCE_TOKENS.stop)
        words = _sentence(draw, tokenizer, text[-own:]).split()
        begun, rest = (" ".join(part) for part in (words[: len(words) // 2], words[len(words) // 2 :]))
        task = _Task("", f"How does the text go on after these words: {begun}", "", rest, "")
        answer = encode(tokenizer, form.gap + rest)
        facts = []
    else:
        task = _draw_task(draw, TRAINING, tokenizer, texts)
        answer = encode(tokenizer, form.gap + task.answer)
        facts = [task.fact]
    question = _question(tokenizer, form, task)
    for _ in range(draw.randrange(_DISTRACTORS + 1) if facts else 0):
        other = _draw_task(draw, TRAINING, tokenizer, texts).fact
        taken = sum(len(encode(tokenizer, fact)) + 2 for fact in [*facts, other])
        if length - len(form.head) - len(question) - taken >= length // 2:
            facts.append(other)
    return _place(draw, tokenizer, form, text, facts, question, length), answer


def _question(tokenizer: Any, form: _Form, task: _Task) -> Tensor:
    """Return the ids from the end of the text up to the answer."""
    return torch.cat([encode(tokenizer, form.asked + task.question), form.tail])


def _place(
    draw: random.Random,
    tokenizer: Any,
    form: _Form,
    text: Tensor,
    facts: Sequence[str],
    question: Tensor,
    length: int,
) -> Tensor:
    """Return a prompt [length]: the end of ``text`` with the facts at random depths, then the question."""
    lines = [encode(tokenizer, f"\n{fact}\n") for fact in facts]
    room = length - len(form.head) - sum(len(line) for line in lines) - len(question)
    if room < 1:
        raise ValueError(f"length: expected at least {length - room + 1} tokens for fact and question, got {length}")
    filler = text[len(text) - room :]
    places = sentence_ends(tokenizer, filler) or list(range(room + 1))
    parts, done = [form.head], 0
    for at, line in sorted(((draw.choice(places), line) for line in lines), key=lambda placed: placed[0]):
        parts += [filler[done:at], line]
        done = at
    return torch.cat([*parts, filler[done:], question])


def _sentence(draw: random.Random, tokenizer: Any, text: Tensor) -> str:
    """Draw a sentence of 8 to 32 tokens from a text; any 16 tokens of a text that has none near the place drawn."""
    start = draw.randrange(max(1, len(text) - 4 * _SENTENCE_TOKENS.stop))
    near = text[start : start + 4 * _SENTENCE_TOKENS.stop]
    ends = sentence_ends(tokenizer, near)
    whole = [near[a:b] for a, b in itertools.pairwise(ends) if b - a in _SENTENCE_TOKENS]
    ids = draw.choice(whole) if whole else near[:16]
    return " ".join(tokenizer.decode(ids.tolist()).split())


def _check_limit(length: int, after: int, limit: int | None) -> None:
    if limit is not None and length + after > limit:
        raise ValueError(f"length: expected at most {limit - after} (the model takes {limit}), got {length}")
