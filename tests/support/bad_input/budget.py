"""Cases of `autoplan`."""

from __future__ import annotations

from typing import Any

import pop_ext
from pop_ext import Trial

from bad_input.fixture import Case, Fixture


class Letters:
    """A tokenizer whose tokens are the letters of a text."""

    bos_token_id = None

    def __call__(self, text: str, **how: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 40 for letter in text]}


def autoplan(f: Fixture, texts: Any = ("a text of more than forty letters in all, or so, " * 3,), **how: Any) -> Any:
    how = {"max_kl": 0.1, "tokenizer": Letters(), "trial": Trial(tokens=8, continuation=4), **how}
    return pop_ext.autoplan(f.model, texts, **how)


AUTOPLAN = [
    Case("no limit", lambda f: autoplan(f, max_kl=None), ValueError, "max_loss, .*: expected at least one of them"),
    Case("`max_loss=0`", lambda f: autoplan(f, max_loss=0), ValueError, "max_loss: expected more than 0, got 0"),
    Case("a string as limit", lambda f: autoplan(f, max_kl="x"), TypeError, "max_kl: expected a number, got 'x'"),
    Case(
        "an unknown method",
        lambda f: autoplan(f, method="best"),
        ValueError,
        "method: expected one of unfitted, ridge, distill, got 'best'",
    ),
    Case(
        "`highest=3` of 3 layers", lambda f: autoplan(f, highest=3), ValueError, "highest: expected an integer in 1...2"
    ),
    Case("`boundary=0`, to `autoplan`", lambda f: autoplan(f, boundary=0), ValueError, "boundary: expected .*, got 0"),
    Case("a dict as trial", lambda f: autoplan(f, trial={}), TypeError, "trial: expected a pop_ext.Trial, got dict"),
    Case("a trial of no prompts", lambda f: Trial(prompts=0), ValueError, "prompts: expected an int >= 1, got 0"),
    Case("a trial that holds all out", lambda f: Trial(holdout=1), ValueError, "holdout: expected .*0 and 1, got 1"),
    Case(
        "one text, not in a list",
        lambda f: autoplan(f, "a text"),
        TypeError,
        "texts: expected a list of texts .* got str",
    ),
    Case("an int as text", lambda f: autoplan(f, [3]), TypeError, "texts: expected strings or paths, got int"),
    Case("no texts", lambda f: autoplan(f, []), ValueError, "texts: expected at least one text, got none"),
    Case(
        "texts too short to hold a part out",
        lambda f: autoplan(f, ["short"]),
        ValueError,
        "texts: expected a text of at least 24 tokens, half of which can be held out, got 5",
    ),
    Case(
        "no tokenizer, of a model without a checkpoint",
        lambda f: autoplan(f, tokenizer=None),
        ValueError,
        "tokenizer: expected one for a model that was not loaded from a checkpoint, got none",
    ),
]
