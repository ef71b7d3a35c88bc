"""What an evaluation found: samples by set and arm, their means with standard errors, and the file that keeps them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from pop_ext.evaluation.arms import FITTED, FULL, POP, Arm
from pop_ext.plans.plan import Plan
from pop_ext.utils.json import finite

SCHEMA = "pop_ext evaluation 1"


def _sets_text(facts: dict[str, Any]) -> str:
    """ "48 text of 256 tokens, 48 recall of 128 tokens"."""
    sets = facts.get("sets", [])
    return ", ".join(f"{s['prompts']} {s['kind']} of {s['length'] or 'their own'} tokens" for s in sets)


# What a run that goes on must share, from what tells most to what tells least.
_COMPARED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a model of config hash": lambda facts: facts.get("config_hash"),
    "dtype (--dtype)": lambda facts: facts.get("dtype"),
    "weights of hash": lambda facts: facts.get("weights"),
    "greedy tokens (--greedy)": lambda facts: facts.get("greedy_tokens"),
    "prompts (--lengths, --samples, --recall)": _sets_text,
    "texts and continuations (--text, --continuation) of digest": lambda facts: facts.get("digest"),
}


class Mean(NamedTuple):
    """A mean and its standard error over prompts; NaN for a single one."""

    value: float
    error: float


def mean_of(samples: Sequence[float]) -> Mean:
    """Mean and standard error."""
    count = len(samples)
    value = math.fsum(samples) / count
    spread = math.fsum((sample - value) ** 2 for sample in samples)
    return Mean(value, math.sqrt(spread / (count * (count - 1))) if count > 1 else math.nan)


@dataclass
class Evaluation:
    """What ``pop_ext.evaluation.evaluate`` returns.

    Attributes:
        facts: model, versions, hardware, sets of prompts.
        cells: one a set and arm: ``set`` (index into ``facts["sets"]``), ``arm``, ``kind``, ``omit``, ``boundary``,
            ``plan``, ``fit`` (digest of its projections) and ``samples``, lists with a value a prompt:
            ``loss``, ``first``: nats a token of the true continuation, and of its first token;
            ``agreement``: leading share of the full model's greedy continuation that is kept; 1: exact match;
            ``exact``: of recall, 1 where every token of the answer is the most probable one.
        timings: of ``time_plans``.
    """

    facts: dict[str, Any]
    cells: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)

    def find(self, number: int, name: str) -> dict[str, Any] | None:
        """The cell of a set and an arm."""
        return next((cell for cell in self.cells if cell["set"] == number and cell["arm"] == name), None)

    def plans(self) -> list[Plan]:
        """Every plan that has a cell with its boundary, each once, without its fit."""
        cells = [cell for cell in self.cells if cell["kind"] in (POP, FITTED)]
        found = [Plan(self.facts["num_layers"], cell["omit"], cell["boundary"]) for cell in cells]
        return list({(plan.omit, plan.boundary): plan for plan in found}.values())

    def has(self, number: int, arm: Arm) -> bool:
        """Whether an arm has its cell, and that is of the projections which the arm has now."""
        cell = self.find(number, arm.name)
        return cell is not None and cell.get("fit") == arm.fit

    def add(self, number: int, arm: Arm, samples: dict[str, list[float]]) -> None:
        """Keeps what was measured of an arm, in place of what an older fit measured."""
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
                "samples": samples,
            }
        )

    def take(self, before: Evaluation, path: str) -> None:
        """Goes on from a file.

        Raises:
            ValueError: of another model or other prompts.
        """
        for what, fact in _COMPARED.items():
            found, wanted = fact(before.facts), fact(self.facts)
            if found != wanted:
                raise ValueError(
                    f"resume: expected {what} {wanted} in {path}, got {found}; "
                    "what differs goes into another file (--out)"
                )
        self.cells, self.timings = before.cells, before.timings

    def summary(self) -> list[dict[str, Any]]:
        """A row a cell: kind, length and arm, means and standard errors, and the mean difference to full depth.

        ``delta_loss`` and ``delta_first`` are of paired differences: the same prompts in both arms.
        """
        rows = []
        for cell in self.cells:
            samples, prompts = cell["samples"], self.facts["sets"][cell["set"]]
            full = self.find(cell["set"], FULL)
            row: dict[str, Any] = {"set": prompts["kind"], "length": prompts["length"], "prompts": prompts["prompts"]}
            row |= {name: cell[name] for name in ("arm", "kind", "omit", "boundary")}
            row |= {name: mean_of(values) for name, values in samples.items()}
            if "agreement" in samples:
                row["match"] = mean_of([float(value == 1) for value in samples["agreement"]])
            for name in ("loss", "first"):
                if full is None:
                    break
                pairs = zip(samples[name], full["samples"][name], strict=True)
                row[f"delta_{name}"] = mean_of([mine - its for mine, its in pairs])
            rows.append(row)
        return rows

    def save(self, path: str | PathLike[str]) -> None:
        """Writes it as JSON, a line a cell, all or nothing; a sample that is not finite is null."""
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
        """Reads what ``save`` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not what ``save`` writes.
        """
        try:
            members = json.loads(Path(path).read_text(encoding="utf-8"))
            if members["facts"]["schema"] != SCHEMA:
                raise ValueError(members["facts"]["schema"])
            found = cls(members["facts"], list(members["cells"]), list(members["timings"]))
            for cell in found.cells:
                for name, values in cell["samples"].items():
                    cell["samples"][name] = [math.nan if value is None else value for value in values]
            return found
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected an evaluation as Evaluation.save writes it ({error!r})") from None
