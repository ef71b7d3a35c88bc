"""Wordings, names and values of retrieval tasks: those of evaluation, and others for training.

Names of the two kinds come from separate lists, and a value belongs to one kind by its SHA-256, so that a fit on
training tasks has seen neither the wording nor a name nor a value of an evaluation task.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

EVALUATION = "evaluation"
"""Retrieval tasks to measure with."""

TRAINING = "training"
"""Retrieval tasks to fit with."""


@dataclass(frozen=True)
class Template:
    """Wording of one kind of fact. ``{name}`` stands for its subject and ``{value}`` for what is asked.

    Attributes:
        fact: Line that the prompt holds.
        question: Question about it.
        lead: Beginning of the answer, up to the value.
        name: Draws a subject.
        value: Draws a value. None for a value that comes from the text: a sentence of it.
        end: End of the answer after the value.
    """

    fact: str
    question: str
    lead: str
    name: Callable[[random.Random], str]
    value: Callable[[random.Random], str] | None
    end: str = "."


def value_kind(value: str) -> str:
    """Return the kind of tasks that may use a value: ``EVALUATION`` for a quarter of all, ``TRAINING`` for the rest."""
    return EVALUATION if hashlib.sha256(value.encode()).digest()[0] % 4 == 0 else TRAINING


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_EVALUATION_NAMES = (
    _words("Green Amber Silver Quiet Northern Velvet Marble Golden Hidden Crimson"),
    _words("Falcon Harbor Lantern Orchard Meridian Compass Glacier Citadel Willow Sparrow"),
)
_TRAINING_NAMES = (
    _words("Blue Copper Lonely Eastern Ivory Rapid Wooden Royal Distant Purple Frozen Bright Old Secret Little"),
    _words("Otter Bridge Mill Station Garden Tower Valley Anchor Raven Castle Meadow Engine Library Island Signal"),
)
_PEOPLE = (
    _words("Anna Boris Clara David Elena Frank Greta Hugo Irene Jonas Karla Leon Maria Nils Olga Peter Rosa Simon"),
    _words("Baker Castro Dubois Ericson Fischer Gruber Hansen Ivanov Jensen Keller Lopez Moreau Novak Olsen Petrov"),
)
_CITIES = _words("Lisbon Oslo Vienna Prague Dublin Athens Warsaw Helsinki Madrid Rome Bergen Geneva Porto Riga Turin")
_OBJECTS = _words("candle pencil river thunder window rocket apple blanket hammer mirror pepper saddle ticket violin")
_MONTHS = _words("January February March April May June July August September October November December")


def _joined(lists: tuple[tuple[str, ...], ...]) -> Callable[[random.Random], str]:
    return lambda draw: " ".join(draw.choice(words) for words in lists)


def _digits(count: int) -> Callable[[random.Random], str]:
    return lambda draw: str(draw.randrange(10 ** (count - 1), 10**count))


def _date(draw: random.Random) -> str:
    return f"{draw.randrange(1, 29)} {draw.choice(_MONTHS)} {draw.randrange(1820, 2020)}"


def _password(draw: random.Random) -> str:
    return f"{draw.choice(_OBJECTS)}-{draw.choice(_OBJECTS)}-{draw.randrange(10, 100)}"


def _city_and_hour(draw: random.Random) -> str:
    return f"{draw.choice(_CITIES)} at {draw.randrange(1, 13)}:{draw.randrange(10, 60)}"


def _key(draw: random.Random) -> str:
    return "_".join("".join(draw.choices(string.ascii_uppercase, k=4)) for _ in range(2))


_training_name, _person = _joined(_TRAINING_NAMES), _joined(_PEOPLE)

TEMPLATES: dict[str, tuple[Template, ...]] = {
    EVALUATION: (
        Template(
            "The access code of the {name} is {value}.",
            "What is the access code of the {name}?",
            "The access code of the {name} is",
            _joined(_EVALUATION_NAMES),
            _digits(5),
        ),
    ),
    TRAINING: (
        Template(
            "Note: to open locker {name}, dial {value}.",
            "Which number opens locker {name}?",
            "Locker {name} opens with",
            _training_name,
            _digits(4),
        ),
        Template(
            "The membership number of {name} is {value}.",
            "Tell me the membership number of {name}.",
            "{name} has the membership number",
            _person,
            _digits(6),
        ),
        Template(
            "{value} looks after the {name}.",
            "Who looks after the {name}?",
            "The person who looks after the {name} is",
            _training_name,
            _person,
        ),
        Template(
            "The {name} was opened on {value}.",
            "On which day was the {name} opened?",
            "The {name} was opened on",
            _training_name,
            _date,
        ),
        Template(
            "{name} takes the train from {value}.",
            "Where and when does the train of {name} leave?",
            "The train of {name} leaves from",
            _person,
            _city_and_hour,
        ),
        Template(
            "{name} = {value}",
            "Which value is assigned to {name}?",
            "{name} =",
            _key,
            _digits(3),
            "",
        ),
        Template(
            "{name}: {value}",
            "What is the setting of {name}?",
            "{name}:",
            _key,
            _password,
            "",
        ),
        Template(
            "Remark of {name}: {value}",
            "Repeat the remark of {name} word by word.",
            "Remark of {name}:",
            _person,
            None,
            "",
        ),
    ),
}
"""The templates of each kind."""
