"""The page of ``pop-ext report``: the results of a folder as sections of tables and figures, rendered by jinja2."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pop_ext.evaluation.results import LIMIT, Evaluation, Mean
from pop_ext.evaluation.timing import NATIVE_FULL, median_ms, speedup
from pop_ext.methods.plots import plot_stages
from pop_ext.plans.projections import FitReport
from pop_ext.utils.files import read_limited, read_utf8
from pop_ext.utils.texts import missing_or

# Captions by file name without suffix; the figure of any other name is captioned by that name.
_CAPTIONS = {
    "importance": "Importance of each layer for encoding a prompt and for its continuation: squared gate derivatives.",
    "cost": "Loss above full depth by the number of omitted layers, with standard errors.",
    "frontier": "Loss above full depth against measured speed, one point per plan. Down and to the right is better.",
    "lengths": "Loss above full depth by the length of the prompt.",
    "recall": "Share of prompts with an answer in them that is found, by the number of omitted layers.",
    "ttft": "Time to first token by the length of the prompt.",
    "stages": "Time of a prefill by stage.",
}


class Page(NamedTuple):
    """An HTML page and the names of the files that it is made from."""

    html: str
    sources: list[str]


class Cell(NamedTuple):
    """A cell of a table: its text and, in small print, a standard error."""

    text: str
    error: str = ""


@dataclass(frozen=True)
class Table:
    """A table under an optional heading."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""


@dataclass(frozen=True)
class Figure:
    """A PNG image, base64-encoded, and its caption."""

    kind: ClassVar[str] = "figure"
    caption: str
    data: str


@dataclass(frozen=True)
class Section:
    """The part of the page that shows one file."""

    title: str
    note: str = ""
    paragraphs: list[str] = field(default_factory=list)
    parts: list[Table | Figure] = field(default_factory=list)


def make_page(folder: Path) -> Page:
    """Make a page of every evaluation, importance, plan, bench report and PNG in a folder.

    Raises:
        ImportError: jinja2 is not installed.
        OSError: The folder cannot be read.
        ValueError: The folder holds no results, or a .json file that is not JSON or not as a command writes it, or a
            file that is longer than the limits of SECURITY.md or a pipe.
    """
    sections: list[Section] = []
    sources: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.suffix != ".json":
            continue
        try:
            section = _section(path)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected a result as one of the commands writes it ({missing_or(error)})"
            ) from None
        if section is not None:
            sections.append(section)
            sources.append(path.name)
    images = sorted(folder.glob("*.png"), key=lambda path: (_order(path.stem), path.name))
    sources += [path.name for path in images]
    if not sources:
        raise ValueError(f"{folder}: expected results of calibrate, eval or bench, got none")
    figures = [_figure(_png(path), path.stem) for path in images]
    return Page(_render(f"pop_ext: {folder.resolve().name}", figures, sections), sources)


def _render(title: str, figures: list[Figure], sections: list[Section]) -> str:
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("report: expected jinja2: pip install 'pop_ext[cli]'", name=error.name) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,  # file names and the members of JSON files are not HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.jinja").render(title=title, figures=figures, sections=sections)


def _order(stem: str) -> int:
    known = [*_CAPTIONS]
    return known.index(stem) if stem in known else -1  # PLAN.importance.png comes first


def _section(path: Path) -> Section | None:
    """Return the section of a JSON file that a command wrote; None for any other JSON."""
    try:
        members = json.loads(read_utf8(path, LIMIT))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON ({error})") from None
    if not isinstance(members, dict):
        return None
    if "facts" in members and "cells" in members:
        return _evaluation(Evaluation.load(path), path.name)
    if "gates" in members and "origin" in members:
        return _importance(members, path.name)
    if "omit" in members and "num_layers" in members:
        return _plan(members, path.name)
    if members.get("profiles") or members.get("cases"):
        return _bench(members, path.name)
    return None


def _evaluation(result: Evaluation, name: str) -> Section:
    facts = result.facts
    where = facts["environment"]
    note = (
        f"{name}: {facts['dtype']} on {facts['device']}, POP by the {facts['backend']} backend; {where['processor']}, "
        f"{where['threads']} threads; pop_ext {where['pop_ext']}, torch {where['torch']}, transformers "
        f"{where['transformers']}. Losses in nats per token; standard errors over prompts in brackets; differences are "
        f"paired, prompt by prompt."
    )
    section = Section(f"Evaluation: {facts['model'] or 'model'}", note)
    rows = list(zip(result.summary(), result.cells, strict=True))
    for number, prompts in enumerate(facts["sets"]):
        length = "" if prompts["length"] is None else f" of {prompts['length']} tokens"
        columns = {"loss": "loss", "delta_loss": "to full depth", "delta_first": "first token, to full depth"}
        columns |= {"kl": "KL from full depth", "exact": "exact answer", "delta_exact": "exact, to full depth"}
        columns |= {"agreement": "greedy as full", "match": "exact match"}
        own = [row for row, cell in rows if cell["set"] == number]
        columns = {key: text for key, text in columns.items() if any(key in row for row in own)}
        body = [[Cell(row["arm"]), *(_mean(row.get(key)) for key in columns)] for row in own]
        title = f"{prompts['prompts']} {prompts['kind']} prompts{length}"
        section.parts.append(Table(["arm", *columns.values()], body, title))
    if result.timings:
        section.parts.append(_times(result.timings))
    return section


def _times(timings: Sequence[dict[str, Any]]) -> Table:
    lengths = sorted({timing["tokens"] for timing in timings})
    rows = []
    for arm in dict.fromkeys(timing["arm"] for timing in timings):
        cells = [arm]
        for tokens in lengths:
            median, gain = median_ms(timings, arm, tokens), speedup(timings, arm, tokens)
            cells.append("-" if median is None else f"{median:.1f}")
            cells.append("-" if gain is None else f"{gain:.2f}x")
        rows.append(_cells(*cells))
    header = [text for tokens in lengths for text in (f"{tokens} tokens, ms", f"vs {NATIVE_FULL}")]
    return Table(["arm", *header], rows, "Time to first token")


def _importance(members: dict[str, Any], name: str) -> Section:
    section = Section("Importance of layers", f"{name}: {members['origin'].get('samples')} samples")
    for kind, gate in members["gates"].items():
        columns = ("prefill", "prefill_error", "decode", "decode_error")
        rows = [
            _cells(layer, *(f"{_number(value):.3g}" for value in values))
            for layer, values in enumerate(zip(*(gate[column] for column in columns), strict=True))
        ]
        header = ["layer" if kind == "layer" else f"layer, {kind}", "prompt", "error", "continuation", "error"]
        section.parts.append(Table(header, rows))
    return section


def _plan(members: dict[str, Any], name: str) -> Section:
    origin = members.get("origin") or {}
    text = (
        f"Omits layers {members['omit']} of {members['num_layers']}; boundary {members.get('boundary', 1)}; prompts "
        f"from {members.get('min_tokens', 0)} tokens on. {origin.get('method') or ''}"
    )
    section = Section(f"Plan: {name}", paragraphs=[text])
    if isinstance(members.get("projections"), dict):
        _add_fit(section, FitReport.from_dict(members["projections"]))
    return section


def _add_fit(section: Section, fit: FitReport) -> None:
    """Add how a plan's projections were fitted."""
    section.paragraphs.append(
        f"Fitted projections: {fit.describe()}; {fit.sequences} sequences, {fit.tokens} tokens; {fit.holdout} held-out "
        "sequences chose lambda."
    )
    if fit.losses:
        losses = [
            [Cell(fit.ridge_text(ridge)), Cell(f"{loss:.4f}", f"{error:.4f}"), Cell("chosen" * (ridge == fit.ridge))]
            for ridge, loss, error in fit.losses
        ]
        section.parts.append(Table(["lambda", "loss of the continuations of held-out prompts", ""], losses))
    residuals = [
        _cells(layer, *(f"{share:.1%}" for share in shares)) for layer, shares in sorted(fit.residuals.items())
    ]
    section.parts.append(Table(["layer", "error of K, before", "after", "of V, before", "after"], residuals))


def _bench(members: dict[str, Any], name: str) -> Section:
    section = Section(f"Bench: {name}")
    for case in members.get("cases", []):
        rows = [
            _cells(arm["name"], f"{1e3 * arm['median_s']:.1f}" if arm.get("median_s") else arm["failed"])
            for arm in case["arms"]
        ]
        title = f"{case['model']}, batch {case['batch']}, {case['tokens']} tokens, {case['dtype']}"
        section.parts.append(Table(["arm", "median ms"], rows, title))
        compared = [
            _cells(
                f"{c['arm']} against {c['baseline']}",
                f"{c['speedup']:.2f}x",
                f"{c['ceiling']:.2f}x",
                f"{c['roofline']:.2f}x" if c.get("roofline") else "-",
            )
            for c in case["comparisons"]
        ]
        section.parts.append(Table(["comparison", "measured", "FLOP ceiling", "roofline"], compared))
    profiles = members.get("profiles", [])
    if profiles:
        drawn = io.BytesIO()
        try:
            plot_stages(profiles, drawn)
            section.parts.append(_figure(drawn.getvalue(), "stages"))
        except ImportError:
            pass  # without matplotlib the tables of the stages say the same
    section.parts.extend(_stages(profile) for profile in profiles)
    return section


def _stages(profile: dict[str, Any]) -> Table:
    rows = []
    for stage in profile["stages"]:
        peak = stage.get("share_of_peak")
        times = (f"{1e3 * stage['seconds']:.2f}", f"{100 * stage['share']:.1f} %")
        share = "-" if peak is None else f"{100 * peak:.0f} %"
        rows.append(_cells(stage["name"], *times, _rate(profile, stage), share))
    title = f"Stages: {profile['arm']}, {profile['tokens']} tokens, {1e3 * profile['seconds']:.1f} ms"
    return Table(["stage", "ms", "share", "rate", "of peak"], rows, title)


def _rate(profile: dict[str, Any], stage: dict[str, Any]) -> str:
    """Return the rate of a stage in GFLOP/s, or in GB/s if memory bandwidth bounds it."""
    flops, moved, seconds = stage.get("flops"), stage.get("bytes"), stage["seconds"]
    if not flops or not seconds:
        return "-"
    peak, bandwidth = profile.get("gemm_peak_flop_per_s"), profile.get("bandwidth_bytes_per_s")
    if moved and peak and bandwidth and moved / bandwidth > flops / peak:
        return f"{moved / seconds / 1e9:.1f} GB/s"
    return f"{flops / seconds / 1e9:.1f} GFLOP/s"


def _png(path: Path) -> bytes:
    try:
        return read_limited(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _figure(png: bytes, stem: str) -> Figure:
    known = "importance" if stem.endswith(".importance") else stem
    return Figure(_CAPTIONS.get(known, stem), base64.b64encode(png).decode())


def _cells(*texts: object) -> list[Cell]:
    return [Cell(str(text)) for text in texts]


def _mean(mean: Mean | None) -> Cell:
    if mean is None:
        return Cell("-")
    return Cell(f"{mean.value:.3f}", "" if math.isnan(mean.error) else f"{mean.error:.3f}")


def _number(value: float | None) -> float:
    return math.nan if value is None else value
