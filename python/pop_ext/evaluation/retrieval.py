"""Make retrieval and copy tasks from plain texts: a fact stands somewhere in a text, and a question about it follows.

With a chat template the text, the fact and the question are one message of the user. Without one they are plain text
that ends in "Answer:". Tasks of the kinds ``EVALUATION`` and ``TRAINING`` share no wording, no name and no value.
"""

from __future__ import annotations

import itertools
import random
import reprlib
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

_DATE = "26 Jul 2024"
"""Date in the chat form; the default of Llama 3's template."""
_SENTENCE_TOKENS = range(8, 33)
FACTS = 4
"""Facts in an evaluation prompt, and the largest number in a training prompt."""


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


@dataclass(frozen=True)
class _Maker:
    """Draws tasks of a kind and makes prompts of ``length`` tokens for them."""

    kind: str
    length: int
    tokenizer: Any
    texts: Texts
    form: _Form
    draw: random.Random

    def encode(self, text: str) -> Tensor:
        return encode(self.tokenizer, text)

    def draw_task(self) -> _Task:
        """Draw a template, a name and a value of the kind."""
        template: Template = self.draw.choice(TEMPLATES[self.kind])
        name = template.name(self.draw)
        while True:
            if template.value is None:
                value = self.sentence(self.draw.choice(self.texts.plain))
                break
            value = template.value(self.draw)
            if value_kind(value) == self.kind:
                break
        fact, question, lead = (
            part.format(name=name, value=value) for part in (template.fact, template.question, template.lead)
        )
        return _Task(fact, question, lead, value, template.end)

    def draw_other(self, tasks: Sequence[_Task]) -> _Task:
        """Draw a task that differs from the given ones in question and value."""
        while True:
            other = self.draw_task()
            if not any(other.question == task.question or other.value == task.value for task in tasks):
                return other

    def facts(self, tasks: Sequence[_Task], question: Tensor, count: int) -> list[str]:
        """Return the facts of the tasks, and others up to ``count`` in all as long as half of the prompt is text."""
        chosen = list(tasks)
        while len(chosen) < count:
            other = self.draw_other(chosen)
            lines = sum(len(self.encode(f"\n{task.fact}\n")) for task in [*chosen, other])
            if self.length - len(self.form.head) - len(question) - lines < self.length // 2:
                break
            chosen.append(other)
        return [task.fact for task in chosen]

    def question(self, task: _Task) -> Tensor:
        """Return the ids from the end of the text up to the answer."""
        return torch.cat([self.encode(self.form.asked + task.question), self.form.tail])

    def prompt(self, text: Tensor, facts: Sequence[str], question: Tensor) -> Tensor:
        """Return a prompt [length]: the end of ``text`` with the facts at random depths, then the question."""
        lines = [self.encode(f"\n{fact}\n") for fact in facts]
        room = self.length - len(self.form.head) - sum(len(line) for line in lines) - len(question)
        if room < 1:
            least = self.length - room + 1
            raise ValueError(f"length: expected at least {least} tokens for fact and question, got {self.length}")
        filler = text[len(text) - room :]
        places = sentence_ends(self.tokenizer, filler) or list(range(room + 1))
        parts, done = [self.form.head], 0
        for at, line in sorted(((self.draw.choice(places), line) for line in lines), key=lambda placed: placed[0]):
            parts += [filler[done:at], line]
            done = at
        return torch.cat([*parts, filler[done:], question])

    def training_pair(self, text: Tensor) -> Pair:
        """Make a training task whose prompt has the end of ``text``, int64 [n], as its text."""
        completes = self.draw.randrange(len(TEMPLATES[TRAINING]) + 1) == 0  # as frequent as each template
        if completes and self.completion_room >= 2 * _SENTENCE_TOKENS.stop:
            return self.completion(text)
        task = self.draw_task()
        question = self.question(task)
        facts = self.facts([task], question, self.draw.randrange(1, FACTS + 1))
        return self.prompt(text, facts, question), self.encode(self.form.gap + task.answer)

    @property
    def completion_room(self) -> int:
        """Tokens of the text that a prompt holds beside the question of any completion task."""
        return self.length - len(self.form.head) - len(self.form.tail) - 2 * _SENTENCE_TOKENS.stop

    def completion(self, text: Tensor) -> Pair:
        """Make a task that asks how a sentence of the text goes on, in a prompt that has the room."""
        words = self.sentence(text[-self.completion_room :]).split()
        begun, rest = (" ".join(part) for part in (words[: len(words) // 2], words[len(words) // 2 :]))
        question = self.question(_Task("", f"How does the text go on after these words: {begun}", "", rest, ""))
        return self.prompt(text, [], question), self.encode(self.form.gap + rest)

    def sentence(self, text: Tensor) -> str:
        """Draw a sentence of 8 to 32 tokens; any 16 tokens of a text that has none near the place drawn."""
        near = 4 * _SENTENCE_TOKENS.stop
        start = self.draw.randrange(max(1, len(text) - near))
        part = text[start : start + near]
        ends = sentence_ends(self.tokenizer, part)
        whole = [part[a:b] for a, b in itertools.pairwise(ends) if b - a in _SENTENCE_TOKENS]
        ids = self.draw.choice(whole) if whole else part[:16]
        return " ".join(self.tokenizer.decode(ids.tolist()).split())


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

    The fact is a line of its own after a sentence or a line of the text, each with the same probability. Three facts
    about other names stand elsewhere, fewer if they left less than half of the prompt to the text. A prompt of
    ``EVALUATION`` also holds the beginning of the answer ("The access code of the Green Falcon is"), and the
    continuation is the value alone. A continuation of ``TRAINING`` is the whole answer. Training prompts hold none to
    three other facts; one in nine asks for the rest of a sentence that the text has, another for a remark word by word.

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
    maker = _maker(kind, seed, length, tokenizer, texts)
    pairs = []
    for text, at in window_ends(texts.plain, length, 1, samples):
        if kind == EVALUATION:
            task = maker.draw_task()
            question = torch.cat([maker.question(task), maker.encode(maker.form.gap + task.lead)])
            prompt = maker.prompt(text[:at], maker.facts([task], question, FACTS), question)
            pairs.append((prompt, maker.encode(f" {task.value}")))
        else:
            pairs.append(maker.training_pair(text[:at]))
    _check_limit(length, max(len(answer) for _, answer in pairs), limit)
    return pairs


def second_turn_pairs(
    texts: Texts, tokenizer: Any, length: int, samples: int, *, seed: int = 0, limit: int | None = None
) -> list[tuple[Pair, Pair]]:
    """Make dialogues of two turns over one text that holds four facts, or fewer if it is short.

    The first turn asks for one of them and is answered. The second turn asks for another. Wording, names and values
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
    maker = _maker(EVALUATION, seed, length, tokenizer, texts)
    form, dialogues = maker.form, []
    for text, at in window_ends(texts.plain, length, 1, samples):
        first = maker.draw_task()
        second = maker.draw_other([first])
        question = maker.question(first)
        prompt = maker.prompt(text[:at], maker.facts([first, second], question, FACTS), question)
        new = [form.between, maker.encode(second.question), form.tail, maker.encode(form.gap + second.lead)]
        answer = maker.encode(form.gap + first.answer)
        dialogues.append(((prompt, answer), (torch.cat(new), maker.encode(f" {second.value}"))))
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


def _maker(kind: str, seed: int, length: int, tokenizer: Any, texts: Texts) -> _Maker:
    if kind not in TEMPLATES:
        raise ValueError(f"kind: expected one of {', '.join(TEMPLATES)}, got {reprlib.repr(kind)}")
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ValueError(f"length: expected an int from 2, got {length!r}")
    return _Maker(kind, length, tokenizer, texts, _form(tokenizer), random.Random(f"{kind} {seed}"))


def _form(tokenizer: Any) -> _Form:
    """Return the chat form of a tokenizer with a chat template, else the plain form."""
    if not getattr(tokenizer, "chat_template", None):
        tail, between = encode(tokenizer, "\nAnswer:"), encode(tokenizer, "\n\nQuestion: ")
        return _Form(beginning_of(tokenizer), tail, between, "\n\nQuestion: ", " ")
    marks = ["first message", "first answer", "second message"]
    turns = [{"role": role, "content": mark} for role, mark in zip(["user", "assistant", "user"], marks, strict=True)]
    # Templates that print the date would make other prompts every day: a macro hides transformers' function.
    fixed = f"{{% macro strftime_now(format) %}}{_DATE}{{% endmacro %}}" + tokenizer.get_chat_template()
    options = {"tokenize": False, "add_generation_prompt": True, "chat_template": fixed, "date_string": _DATE}
    head, tail = tokenizer.apply_chat_template(turns[:1], **options).split(marks[0])
    between = tokenizer.apply_chat_template(turns, **options).split(marks[1])[1].split(marks[2])[0]
    return _Form(encode(tokenizer, head), encode(tokenizer, tail), encode(tokenizer, between), "\n\n", "")


def _check_limit(length: int, after: int, limit: int | None) -> None:
    if limit is not None and length + after > limit:
        raise ValueError(f"length: expected at most {limit - after} (the model takes {limit}), got {length}")
