"""Results of an evaluation: samples by set and arm, their means with standard errors, and their file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from pop_ext.evaluation.arms import FITTED, FULL, POP, RIDGE, Arm
from pop_ext.plans.plan import Plan
from pop_ext.utils.files import read_utf8
from pop_ext.utils.json import finite
from pop_ext.utils.texts import missing_or

LIMIT = 1 << 30
"""Bytes of a file: it holds a sample for each prompt of each arm."""
SCHEMA = "pop_ext evaluation 1"
"""Value of ``facts["schema"]``."""


def _sets_text(facts: dict[str, Any]) -> str:
    """Format the sets of prompts, such as "48 text of 256 tokens, 48 recall of 128 tokens"."""
    sets = facts.get("sets", [])
    return ", ".join(f"{s['prompts']} {s['kind']} of {s['length'] or 'their own'} tokens" for s in sets)


# Facts that a resumed run must share. The first that differs is reported, so the most telling come first.
_COMPARED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a model of config hash": lambda facts: facts.get("config_hash"),
    "dtype (--dtype)": lambda facts: facts.get("dtype"),
    "weights of hash": lambda facts: facts.get("weights"),
    "backend (--reuse-states)": lambda facts: facts.get("backend"),
    "greedy tokens (--greedy)": lambda facts: facts.get("greedy_tokens"),
    "prompts (--lengths, --samples, --recall)": _sets_text,
    "texts and continuations (--text, --continuation) of digest": lambda facts: facts.get("digest"),
}


class Mean(NamedTuple):
    """A mean over prompts.

    Attributes:
        value: The mean.
        error: Its standard error; NaN for a single prompt.
    """

    value: float
    error: float


def mean_of(samples: Sequence[float]) -> Mean:
    """Return the mean of at least one sample, and its standard error."""
    count = len(samples)
    value = math.fsum(samples) / count
    spread = math.fsum((sample - value) ** 2 for sample in samples)
    return Mean(value, math.sqrt(spread / (count * (count - 1))) if count > 1 else math.nan)


@dataclass
class Evaluation:
    """Results of an evaluation, as ``pop_ext.evaluation.evaluate`` returns them.

    A cell holds what one arm measured on one set of prompts:

    - ``set``: index into ``facts["sets"]``.
    - ``arm``, ``kind``, ``omit``, ``boundary``, ``plan``: the arm and its plan.
    - ``fit``, ``method``: digest and method of the fitted projections, or None.
    - ``samples``: lists with one value per prompt. ``loss`` is the loss of the true continuation in nats per token,
      ``first`` that of its first token. ``kl`` is the KL divergence from the full model's distribution, in nats per
      token of the continuation. ``agreement`` is the leading share of the full model's greedy continuation
      that is kept; 1 is an exact match. ``exact``, for prompts with answers, is 1 if every token of the answer is the
      most probable one.

    Attributes:
        facts: Model, versions, hardware and sets of prompts.
        cells: One dict per set and arm, as above.
        timings: Result of ``time_plans``.
    """

    facts: dict[str, Any]
    cells: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)

    def find(self, number: int, name: str) -> dict[str, Any] | None:
        """Return the cell of set ``number`` and the arm called ``name``, or None."""
        return next((cell for cell in self.cells if cell["set"] == number and cell["arm"] == name), None)

    def plans(self) -> list[Plan]:
        """Return every plan that was evaluated with its boundary, without duplicates and without projections."""
        cells = [cell for cell in self.cells if cell["kind"] in (POP, FITTED)]
        found = [Plan(self.facts["num_layers"], cell["omit"], cell["boundary"]) for cell in cells]
        return list({(plan.omit, plan.boundary): plan for plan in found}.values())

    def has(self, number: int, arm: Arm) -> bool:
        """Return True if set ``number`` has a cell of this arm with the same fitted projections and every measure."""
        cell = self.find(number, arm.name)
        return cell is not None and cell.get("fit") == arm.fit and "kl" in cell["samples"]

    def add(self, number: int, arm: Arm, samples: dict[str, list[float]]) -> None:
        """Add a cell, in place of an older one of the same arm.

        Args:
            number: Index of the set of prompts.
            arm: The arm.
            samples: Measure -> one value per prompt.
        """
        self.cells = [cell for cell in self.cells if (cell["set"], cell["arm"]) != (number, arm.name)]
        self.cells.append(
            {
                "set": number,
                "arm": arm.name,
                "kind": arm.kind,
                "omit": list(arm.plan.omit),
                "boundary": arm.boundary,
                "plan": json.loads(arm.plan.to_json()),
                "fit": arm.fit,
                "method": arm.method,
                "samples": samples,
            }
        )

    def take(self, before: Evaluation, path: str) -> None:
        """Continue from an earlier evaluation: take over its cells and timings.

        Args:
            before: The earlier evaluation.
            path: File that it was read from, for errors.

        Raises:
            ValueError: It is of another model, other weights, another dtype or other prompts.
        """
        for what, fact in _COMPARED.items():
            found, wanted = fact(before.facts), fact(self.facts)
            if found != wanted:
                raise ValueError(
                    f"resume: expected {what} {wanted} in {path}, got {found}; write this run to another file (--out)"
                )
        self.cells, self.timings = before.cells, before.timings

    def summary(self) -> list[dict[str, Any]]:
        """Summarise every cell in a row.

        Returns:
            One dict per cell: ``set`` (kind), ``length``, ``prompts``, ``arm``, ``kind``, ``method``, ``omit`` and
            ``boundary``; a ``Mean`` for each measure; ``match``, the share of exact matches; ``delta_loss``,
            ``delta_first`` and ``delta_exact``, the mean difference to the full model, paired by prompt.
        """
        rows = []
        for cell in self.cells:
            samples, prompts = cell["samples"], self.facts["sets"][cell["set"]]
            full = self.find(cell["set"], FULL)
            row: dict[str, Any] = {"set": prompts["kind"], "length": prompts["length"], "prompts": prompts["prompts"]}
            row |= {name: cell[name] for name in ("arm", "kind", "method", "omit", "boundary")}
            row |= {name: mean_of(values) for name, values in samples.items()}
            if "agreement" in samples:
                row["match"] = mean_of([float(value == 1) for value in samples["agreement"]])
            for name in ("loss", "first", "exact"):
                if full is None or name not in samples:
                    continue
                pairs = zip(samples[name], full["samples"][name], strict=True)
                row[f"delta_{name}"] = mean_of([mine - its for mine, its in pairs])
            rows.append(row)
        return rows

    def save(self, path: str | PathLike[str]) -> None:
        """Write the evaluation to a JSON file, one line per cell, through a temporary file.

        A sample that is not finite is written as null. Missing folders are made.

        Raises:
            OSError: The file cannot be written.
        """
        whole = Path(path)
        whole.parent.mkdir(parents=True, exist_ok=True)
        lists = {
            name: ",\n".join(json.dumps(finite(item), allow_nan=False) for item in getattr(self, name))
            for name in ("cells", "timings")
        }
        parts = [f'"facts": {json.dumps(self.facts, indent=1)}', *(f'"{k}": [\n{v}\n]' for k, v in lists.items())]
        part = whole.with_name(whole.name + ".part")
        part.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
        os.replace(part, whole)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Evaluation:
        """Read an evaluation that ``save`` wrote. A null sample becomes NaN.

        Raises:
            OSError: The file cannot be read.
            ValueError: The file is not one that ``save`` writes.
        """
        try:
            members = json.loads(read_utf8(path, LIMIT))
            if members["facts"]["schema"] != SCHEMA:
                raise ValueError(members["facts"]["schema"])
            found = cls(members["facts"], list(members["cells"]), list(members["timings"]))
            for cell in found.cells:
                if cell["kind"] == FITTED and "method" not in cell:  # files from before there were several methods
                    cell["arm"] = cell["arm"].replace(FITTED, f"pop-{RIDGE}")
                cell.setdefault("method", RIDGE if cell["kind"] == FITTED else None)
                for name, values in cell["samples"].items():
                    cell["samples"][name] = [math.nan if value is None else value for value in values]
            return found
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}: expected an evaluation as Evaluation.save writes it ({missing_or(error)})"
            ) from None
