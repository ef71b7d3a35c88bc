"""Write a ``PlanCard`` as a model card: YAML front matter, as the Hugging Face hub reads it, then markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from pop_ext.plans.card import PlanCard

MARK = "library_name: pop_ext"
"""Line of the front matter by which a card is known."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HOW_TO = """## How to use it

```python
import pop_ext

plan = pop_ext.Plan.from_pretrained(FOLDER_OR_HUB_ID)
pop_ext.enable(model, plan)  # the model that the plan was made for
```

As the sub-folder `pop_ext` of the checkpoint's folder, `pop_ext.enable(model)` finds the plan by itself."""
MOST_TEXTS = 20
"""Rows of a card for texts, of which each may have one for its fit and one that judges; more are summed up."""


def render(card: PlanCard) -> str:
    """Return the text of the model card."""
    parts = [_front_matter(card), f"# Prefill plan for {card.model or 'a model'}", _summary(card), _quality(card)]
    if card.speed:
        rows = [(str(row.tokens), f"{row.speedup:.2f}x", row.against, row.hardware) for row in card.speed]
        parts += ["## Speed", _table(("prompt tokens", "speed-up of the prefill", "against", "hardware"), rows)]
    if card.int8:
        parts += ["## 8-bit integers", _int8(card)]
    if card.texts:
        parts += ["## Texts", _texts(card)]
    parts += ["## Facts", _facts(card), _HOW_TO]
    return "\n\n".join(parts) + "\n"


def _front_matter(card: PlanCard) -> str:
    lines = ["---", MARK]
    if card.model and _HUB_ID.fullmatch(card.model):
        lines.append(f"base_model: {json.dumps(card.model)}")  # a JSON string is a YAML string
    return "\n".join([*lines, "tags:", "- pop_ext", "- prefill-only-pruning", "---"])


def _summary(card: PlanCard) -> str:
    plan = card.plan[0].upper() + card.plan[1:]
    return f"{plan}. Decode runs all layers, with the stock weights ([POP](https://arxiv.org/abs/2602.03295))."


def _texts(card: PlanCard) -> str:
    """Return a table of the texts, or, if they are many, of their totals by role and licence."""
    if len(card.texts) <= MOST_TEXTS:
        rows = [(t.name, t.role, str(t.tokens), t.licence or "unknown", f"`{t.sha256}`") for t in card.texts]
        return _table(("text", "role", "tokens of this part", "licence", "SHA-256"), rows)
    kinds: dict[tuple[str, str], list[int]] = {}
    for text in card.texts:
        kinds.setdefault((text.role, text.licence or "unknown"), []).append(text.tokens)
    totals = [(str(len(tokens)), role, str(sum(tokens)), licence) for (role, licence), tokens in kinds.items()]
    table = _table(("texts", "role", "tokens of these parts", "licence"), totals)
    return f"{table}\n\nThe file `card.json` names each of them, with its SHA-256."


def _quality(card: PlanCard) -> str:
    heading = "## Quality"
    if not card.quality:
        return f"{heading}\n\n**Not measured.** Nothing is known of what this plan costs."
    rows = []
    for row in card.quality:
        value = f"{row.value:+.4f}" if row.error is None else f"{row.value:+.4f} ({row.error:.4f})"
        rows.append((row.name, value, row.unit, str(row.prompts), row.against))
    table = _table(("figure", "value (standard error)", "unit", "held-out prompts", "difference to"), rows)
    missing = [f"The {name} was **not measured**: {why}." for name, why in card.not_measured.items()]
    return "\n\n".join([heading, table, *(f"**{note}**" for note in card.notes), *missing])


def _int8(card: PlanCard) -> str:
    """Return what ``int8=True`` gains and costs beside the same prefill without it."""
    rows = [
        (
            row.of,
            str(row.tokens),
            f"{row.speedup:.2f}x ({row.speedup_low:.2f} to {row.speedup_high:.2f})",
            f"{row.loss:+.4f}" if row.error is None else f"{row.loss:+.4f} ({row.error:.4f})",
            row.verdict,
        )
        for row in card.int8
    ]
    head = ("prefill", "prompt tokens", "speed-up (quartiles)", "added loss, nats a token (standard error)", "verdict")
    first = card.int8[0]
    return (
        f"{_table(head, rows)}\n\n`int8=True` of `enable` or `load` against the same native prefill without it. "
        f"{first.prompts} held-out prompts; {first.hardware}, 8-bit kernels for {first.isa}. "
        f"Asked for: faster in three of four rounds, and at most {first.most_loss:g} nats a token."
    )


def _facts(card: PlanCard) -> str:
    asked = ", ".join(f"{name} {value:g}" for name, value in card.asked.items())
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    facts = {
        "asked for": asked,
        "config_hash": card.config_hash,
        "weights_hash": card.weights_hash,
        "fit_digest": card.fit_digest,
        "versions": versions,
        "created": card.created,
    }
    return _table(("fact", "value"), [(name, value) for name, value in facts.items() if value])


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
