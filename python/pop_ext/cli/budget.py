"""``pop-ext calibrate`` with a budget of quality: find the plan that omits the most layers within it."""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from pop_ext.cli import options, output
from pop_ext.plans.folder import CARD_FILE, MATRICES_FILE, PLAN_FILE, README_FILE, check_folder

if TYPE_CHECKING:
    from pop_ext.methods.autoplan import AutoPlan
    from pop_ext.methods.importance import Importance


LIMITS = ("--max-loss", "--max-kl", "--max-recall-drop")
"""Options that make a budget of quality."""
_OF_TRIAL = re.compile(r"\btrial\.(prompts|tokens|samples)\b")


@dataclass(frozen=True)
class Budget:
    """Options of ``pop-ext calibrate`` that state a budget of quality.

    Attributes:
        max_loss: Value of --max-loss.
        max_kl: Value of --max-kl.
        max_recall_drop: Value of --max-recall-drop.
        method: Value of --method.
        boundaries: Numbers of --boundary; empty for the default.
        samples: Value of --samples.
        prompts: Value of --prompts.
        tokens: Value of --tokens.
        highest: Value of --highest.
        pays_from: Lengths of --pays-from.
        time_lengths: Lengths of --time-lengths.
        int8: Value of --int8.
    """

    max_loss: float | None
    max_kl: float | None
    max_recall_drop: float | None
    method: str
    boundaries: Sequence[int]
    samples: int | None
    prompts: int | None
    tokens: int | None
    highest: int | None
    pays_from: Sequence[int]
    time_lengths: Sequence[int]
    int8: bool = False

    @property
    def limits(self) -> dict[str, Any]:
        """The limits by argument of ``autoplan``."""
        return {"max_loss": self.max_loss, "max_kl": self.max_kl, "max_recall_drop": self.max_recall_drop}

    @property
    def given(self) -> bool:
        """True if there is a limit."""
        return any(limit is not None for limit in self.limits.values())


def check_options(given: set[str], method: str) -> None:
    """Refuse options of ``pop-ext calibrate`` that it would not read beside the others that were given.

    Args:
        given: The options on the command line, by name.
        method: Value of --method.

    Raises:
        ValueError: An option belongs to a plan within limits and none is given, or to one without; or it needs another.
    """
    limit = next((name for name in LIMITS if name in given), None)
    for option in ("--prompts", "--method", "--by-importance", "--time-lengths", "--highest", "--int8"):
        options.refuse_ignored(given, option, LIMITS)
    if limit is None:
        options.refuse_ignored(given, "--budget-tokens", ("--budget-ms", "--speedup"))
        return
    for option in ("--count", "--budget-ms", "--speedup", "--budget-tokens"):
        if option in given:
            raise ValueError(f"{option} and {', '.join(LIMITS)}: expected one of them, got {option} and {limit}")
    for option in ("--branches", "--recompute", "--free"):
        options.refuse_ignored(given, option, ("--by-importance",), limit)
    if method == "unfitted":
        options.refuse_ignored(given, "--samples", ("--by-importance",), "--method unfitted")


def plan_folder(out: Path) -> Path:
    """Return the folder of --out.

    Raises:
        ValueError: ``out`` is a file of another name than plan.json.
    """
    if out.is_dir() or (out.suffix != ".json" and not out.exists()):  # a folder may be called Llama-3.2-1B
        return out
    if out.name != PLAN_FILE:
        raise ValueError(f"--out: expected a folder, or a file {PLAN_FILE} in one, with a budget of quality, got {out}")
    return out.parent


def calibrate_within(
    model: Any,
    tokenizer: Any,
    files: Sequence[Path],
    out: Path,
    budget: Budget,
    importance: dict[str, Any] | None,
    contiguous: bool,
    as_json: bool,
) -> bool:
    """Find, save and print the plan. Return False if not even one layer can be omitted.

    Args:
        model: Hugging Face model.
        tokenizer: Its tokenizer.
        files: Plain texts.
        out: Folder of the plan.
        budget: The options.
        importance: Omit the layers of lowest importance, which is computed with these arguments. None: omit the deepest
            ones.
        contiguous: Of those, omit consecutive ones.
        as_json: Print a JSON object and no progress.
    """
    from pop_ext.methods.autoplan import BOUNDARIES, autoplan, check_search
    from pop_ext.methods.candidates import Trial, held_out_pairs
    from pop_ext.methods.held_out import split_texts
    from pop_ext.methods.int8_trial import check_int8_possible

    sizes = {"samples": budget.samples, "prompts": budget.prompts, "tokens": budget.tokens}
    trial = Trial(**{name: size for name, size in sizes.items() if size is not None})
    if budget.int8:
        with _options_named(), output.products_named("int8"):
            check_int8_possible(model, budget.time_lengths)
    with _options_named():
        check_folder(out)
        boundary = budget.boundaries or BOUNDARIES
        check_search(model, trial, budget.limits, budget.method, budget.highest, boundary)  # before layers are scored
        split = split_texts(files, tokenizer, trial.holdout, trial.window)
        held_out_pairs(split, tokenizer, trial)  # refuse too little text before layers are scored, too
        choose = None
        if importance is not None:
            scores = _importance(model, tokenizer, split.calibration, trial, out, importance)
            choose = functools.partial(scores.plan, contiguous=contiguous)
        found = autoplan(
            model,
            split,
            **budget.limits,
            method=budget.method,
            boundary=boundary,
            choose=choose,
            highest=budget.highest,
            tokenizer=tokenizer,
            trial=trial,
            save=out,
            pays_from=budget.pays_from,
            time_lengths=budget.time_lengths,
            int8=budget.int8,
            progress=not as_json,
        )
    if as_json:
        output.print_json(_report(found, out))
    else:
        _print(found, out)
    if found.card is None:
        print("pop-ext: not even one layer can be omitted within the budget; no plan is written", file=sys.stderr)
    return found.card is not None


@contextmanager
def _options_named() -> Iterator[None]:
    """Let errors of ``autoplan`` name the options that set its arguments."""
    names = {"folder": "--out", "length": "--tokens", "lengths": "--tokens", "texts": "--text", "tokenizer": "MODEL"}
    names |= {name: f"--{name.replace('_', '-')}" for name in ("max_loss", "max_kl", "max_recall_drop", "time_lengths")}
    names |= {name: f"--{name}" for name in ("method", "boundary", "highest")}
    try:
        yield
    except (ValueError, OSError) as error:
        text = _OF_TRIAL.sub(r"--\1", str(error))
        named = re.sub(r"^\w+(?=[:,])", lambda found: names.get(found[0], found[0]), text)
        if named == str(error):
            raise
        raise (ValueError(named) if isinstance(error, ValueError) else OSError(named)) from None


def _importance(model: Any, tokenizer: Any, texts: Any, trial: Any, out: Path, how: dict[str, Any]) -> Importance:
    """Score the layers on the calibration part of the texts; resume from the file of scores in ``out``."""
    from pop_ext.evaluation import calibration_batches
    from pop_ext.methods.importance import importance

    batches = calibration_batches(texts, tokenizer, trial.window, trial.samples, batch=1)
    out.mkdir(parents=True, exist_ok=True)
    state = out / "importance.json"
    try:
        return importance(model, batches, resume=state, **how)
    except ValueError as error:
        if not str(error).startswith(("resume:", f"{state}:")):
            raise
        raise ValueError(
            f"--out: expected no {state.name} of other texts or settings in the folder, got {state}; remove it or name "
            "another folder"
        ) from None


def _report(found: AutoPlan, out: Path) -> dict[str, Any]:
    """Return the result as JSON values."""
    tried = [
        {
            "omit": list(candidate.plan.omit),
            "boundary": candidate.plan.boundary,
            "fit": candidate.fit,
            "within": candidate.within,
            "chosen": candidate is found.chosen,
            "seconds": candidate.seconds,
            **{
                name: {"value": figure.value, "error": figure.error, "prompts": figure.prompts}
                for name, figure in candidate.figures.items()
            },
        }
        for candidate in found.tried
    ]
    card = None if found.card is None else found.card.to_dict()
    return {
        "plan": None if card is None else str(out / PLAN_FILE),
        "omit": list(found.plan.omit),
        "boundary": found.plan.boundary,
        "min_tokens": found.plan.min_tokens,
        "recall": found.recall,
        "highest": found.highest,
        "tried": tried,
        "card": card,
    }


def _print(found: AutoPlan, out: Path) -> None:
    console = Console()
    names = list(dict.fromkeys(name for candidate in found.tried for name in candidate.figures))
    table = output.new_table("layers, fit, rows", *names, "budget", "s")
    for candidate in sorted(found.tried, key=lambda tried: tried.count):
        cells = [str(candidate.figures[name]) if name in candidate.figures else "-" for name in names]
        kept = "chosen" if candidate is found.chosen else "within" if candidate.within else "over"
        name = f"{candidate.count}, {candidate.fit}, {candidate.plan.boundary}"
        table.add_row(name, *cells, kept, f"{candidate.seconds:.0f}")
    console.print(table)
    note = (
        "layers omitted, their fit, and last rows at full depth; differences to full depth on held-out prompts: mean "
        "(standard error). A plan keeps a limit if mean plus one "
        "standard error does. Loss and KL: nats a token."
    )
    console.print(Text(note, style="dim"))
    if found.recall is not None:
        console.print(Text(f"at full depth the model answers {found.recall:.2f} of the retrieval tasks"))
    card = found.card
    if card is None:
        return
    console.print(Text(f"plan: {card.plan}"))
    if len(found.plan.omit) == found.highest:
        console.print(Text(f"more than {found.highest} layers were not tried (--highest)"))
    for row in card.quality:
        error = math.nan if row.error is None else row.error
        console.print(Text(f"costs: {row.name} {row.value:+.4f} ({error:.4f}) {row.unit}, {row.prompts} prompts"))
    for note in card.notes:
        console.print(Text(note, style="bold"))
    for name, why in card.not_measured.items():
        named = _OF_TRIAL.sub(r"--\1", why)
        console.print(Text(f"not measured: {name}: {named}"))
    for speed in card.speed:
        console.print(Text(f"gains: {speed.speedup:.2f}x at {speed.tokens} tokens against the {speed.against} prefill"))
    for found_int8 in card.int8:
        print(f"int8, {found_int8}")
    if found.plan.min_tokens > 0:
        console.print(Text(f"prompts of fewer than {found.plan.min_tokens} tokens run all layers"))
    print(f'run it: pop_ext.enable(model, "{out}")')
    for name in (PLAN_FILE, MATRICES_FILE, CARD_FILE, README_FILE):  # print, because a console breaks long paths
        if (out / name).exists():
            print(out / name)
