"""Print the study of ``quality.py`` as markdown, and draw its figures: ``python examples/real_model/report.py``."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pop_ext import Plan
from pop_ext.evaluation import Evaluation, plots
from pop_ext.evaluation.ablations import ABLATIONS
from pop_ext.evaluation.results import Mean, mean_of
from pop_ext.utils.layer_ranges import format_layers
from quality import FITS, print_times

NAMES = {"": "unfitted", "ridge": "ridge", "distill": "distilled", "distill-text": "distilled, no tasks"}
TEXTS = ("prose", "code", "reference")
DEPTH = 30
RECALL = ("retrieval-512", "retrieval-2000", "second-turn")
ARMS = NARROW, WIDE, ABLATED = "boundary 1", "wider boundaries", "ablations"
LIMITS = (0.02, 0.05)
"""Nats a token."""
FIGURES = ("cost", "frontier", "recall")


class Study:
    """The results of a folder, by set of prompts.

    Attributes:
        results: Name of the set -> result.
        fits: Digest of fitted projections -> name of the fit, of ``FITS``.
    """

    def __init__(self, folder: Path) -> None:
        self.results = {
            path.stem: Evaluation.load(path)
            for path in sorted(folder.glob("*.json"))
            if path.stem not in ("times", "importance")
        }
        self.fits: dict[str | None, str] = {None: ""}
        for name in FITS:
            for path in folder.glob(f"{name}-[0-9]*/plan.json"):
                projections = Plan.load(path).projections
                self.fits[None if projections is None else projections.digest] = name

    def cells(self, name: str) -> Iterator[tuple[tuple[int, str, str], dict[str, Any]]]:
        """Yield (number of omitted layers, omitted layers, variant) and cell of each arm on a set of prompts."""
        for cell in self.results[name].cells:
            if cell["kind"] == "full":
                continue
            kind = NAMES[self.fits[cell["fit"]]] if cell["kind"] in ("pop", "pop-fitted") else cell["kind"]
            if cell["boundary"] not in (None, 1):
                kind += f", boundary {cell['boundary']}"
            yield (len(cell["omit"]), format_layers(cell["omit"], ", "), kind), cell

    def full(self, name: str) -> dict[str, list[float]]:
        """Return the samples of the full model on a set of prompts."""
        found: dict[str, list[float]] = self.results[name].find(0, "full")["samples"]  # type: ignore[index]
        return found

    def figures(self, name: str, arms: str = NARROW) -> dict[tuple[int, str, str], dict[str, Mean]]:
        """Return for each arm the means of its samples, of losses and shares also paired with the full model.

        Args:
            name: Set of prompts.
            arms: Which arms, of ``ARMS``.
        """
        full, found = self.full(name), {}
        for key, cell in self.cells(name):
            kind = ABLATED if cell["kind"] in ABLATIONS else NARROW if cell["boundary"] == 1 else WIDE
            if kind != arms:
                continue
            own = cell["samples"]
            found[key] = {measure: mean_of(values) for measure, values in own.items()}
            for measure in ("loss", "exact"):
                if measure in own:
                    pairs = zip(own[measure], full[measure], strict=True)
                    found[key][f"delta_{measure}"] = mean_of([a - b for a, b in pairs])
        return found


def main() -> None:
    """Print tables and draw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/real_model"))
    parser.add_argument("--figures", type=Path, help="folder for the figures; none are drawn without")
    arguments = parser.parse_args()
    study = Study(arguments.folder)
    texts = [name for name in TEXTS if name in study.results]
    recall = [name for name in RECALL if name in study.results]
    for arms in ARMS:
        print_loss(study, texts, arms)
    print_won_back(study, texts)
    for arms in (NARROW, WIDE):
        print_recall(study, recall, arms)
    print_counts(study, texts)
    times = arguments.folder / "times.json"
    if times.exists():
        timed = json.loads(times.read_text())["times"]
        print_times(timed)
        for result in study.results.values():
            result.timings = timed
    if arguments.figures is not None:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        for name in FIGURES:
            source = recall[0] if name == "recall" else texts[0]
            result = study.results[source]  # a figure has one line for all distilled fits, so one of them is left out
            result.cells = [cell for cell in result.cells if study.fits.get(cell["fit"]) != "distill-text"]
            plots.FIGURES[name](result, arguments.figures / f"real-{name}.png")


def print_loss(study: Study, names: list[str], arms: str) -> None:
    """Print the loss above full depth and the KL divergence of every arm of ``ARMS``."""
    figures = {name: study.figures(name, arms) for name in names}
    print(f"\n{arms}:\n\n| omitted | | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    _print_rows(figures, lambda own: f"{_signed(own['delta_loss'])} / {own['kl'].value:.3f}")


def print_won_back(study: Study, names: list[str]) -> None:
    """Print which share of the unfitted plan's loss and divergence each fit wins back."""
    print("\n| omitted | fit | set | loss won back | KL won back |\n|---|---|---|---|---|")
    for name in names:
        cells, full = dict(study.cells(name)), study.full(name)
        for key, cell in sorted(cells.items(), key=lambda item: _order(item[0])):
            plain = cells.get((key[0], key[1], NAMES[""]))
            if key[2] not in (NAMES[fit] for fit in FITS) or plain is None:
                continue
            shares = []
            for measure in ("loss", "kl"):
                zero = full[measure] if measure == "loss" else [0.0] * len(full["loss"])
                before = [a - b for a, b in zip(plain["samples"][measure], zero, strict=True)]
                after = [a - b for a, b in zip(cell["samples"][measure], zero, strict=True)]
                if measure == "loss" and mean_of(before).value < 3 * mean_of(before).error:
                    shares.append("")  # a share of next to nothing
                    continue
                shares.append("{:.0%} ({:.0%})".format(*_won_back(before, after)))
            print(f"| {key[0]} ({key[1]}) | {key[2]} | {name} | {' | '.join(shares)} |")


def print_recall(study: Study, names: list[str], arms: str) -> None:
    """Print the share of exact answers, and its difference to full depth, of every arm of ``ARMS``."""
    figures = {name: study.figures(name, arms) for name in names}
    print(f"\n{arms}:\n\n| omitted | | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    full = [mean_of(study.full(name)["exact"]) for name in names]
    print(f"| 0 | full depth | {' | '.join(f'{one.value:.2f} ({one.error:.2f})' for one in full)} |")
    _print_rows(figures, lambda own: f"{own['exact'].value:.2f}, {_signed(own['delta_exact'], 2)}")


def _print_rows(
    figures: dict[str, dict[tuple[int, str, str], dict[str, Mean]]], cell: Callable[[dict[str, Mean]], str]
) -> None:
    """Print a row per arm with a cell per set of prompts, empty where the arm was not measured."""
    for key in sorted({key for own in figures.values() for key in own}, key=_order):
        cells = [cell(own[key]) if key in own else "" for own in figures.values()]
        print(f"| {key[0]} ({key[1]}) | {key[2]} | {' | '.join(cells)} |")


def print_counts(study: Study, names: list[str]) -> None:
    """Print the largest count whose loss keeps a limit: its mean, and its mean plus a standard error."""
    print("\n| set | limit, nats a token | kept by | largest count: " + " | ".join(NAMES.values()) + " |")
    print("|---|---|---|" + "---|" * len(NAMES))
    for name in names:
        figures = study.figures(name)
        for limit in LIMITS:
            for errors, words in ((0, "the mean"), (1, "mean + 1 s.e.")):
                cells = [_largest_count(figures, kind, limit, errors) for kind in NAMES.values()]
                print(f"| {name} | {limit} | {words} | {' | '.join(cells)} |")


def _largest_count(figures: dict[tuple[int, str, str], dict[str, Mean]], kind: str, limit: float, errors: int) -> str:
    """Return the largest measured count of deepest layers up to the first that exceeds a limit; or "under" that one."""
    largest = ""
    for key, own in sorted(figures.items()):
        if key[2] != kind or key[1] != format_layers(range(DEPTH - key[0], DEPTH), ", "):
            continue
        loss = own["delta_loss"]
        if loss.value + errors * loss.error > limit:
            return largest or f"under {key[0]}"
        largest = str(key[0])
    return largest


def _won_back(before: list[float], after: list[float]) -> tuple[float, float]:
    """Return ``1 - mean(after) / mean(before)`` and its standard error over 1,000 resamples of the prompts."""
    draw, found = random.Random(0), []
    pairs = list(zip(before, after, strict=True))
    for _ in range(1000):
        some = draw.choices(pairs, k=len(pairs))
        found.append(1 - math.fsum(b for _, b in some) / math.fsum(a for a, _ in some))
    mean = mean_of(found)
    return 1 - math.fsum(after) / math.fsum(before), mean.error * math.sqrt(len(found))


def _order(key: tuple[int, str, str]) -> tuple[int, str, int, str]:
    kinds = ["unfitted", *(NAMES[name] for name in FITS)]
    return key[0], key[1], kinds.index(key[2]) if key[2] in kinds else len(kinds), key[2]


def _signed(mean: Mean, digits: int = 3) -> str:
    return f"{mean.value:+.{digits}f} ({mean.error:.{digits}f})"


if __name__ == "__main__":
    main()
