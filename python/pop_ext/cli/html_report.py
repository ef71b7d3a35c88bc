"""One self-contained HTML page of a folder's results: tables with standard errors, figures inline, no network."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pop_ext.evaluation.results import Evaluation, Mean
from pop_ext.evaluation.timing import NATIVE_FULL, speedup
from pop_ext.methods.plots import plot_stages
from pop_ext.plans.projections import FitReport

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #d0d0d0; --soft: #666; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --line: #3a3f45; --soft: #a0a6ad; --band: #1f2327; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 68rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.soft, figcaption { color: var(--soft); font-size: .87rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { padding: .22rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr:nth-child(even) td { background: var(--band); }
td small { color: var(--soft); }
figure { margin: 1.2rem 0; } img { max-width: 100%; background: #fff; border-radius: 4px; }
""".strip()

# File names without ending -> what the figure shows; others get their name.
_CAPTIONS = {
    "importance": "How much each layer matters for encoding a prompt and for what follows: squared gate derivatives.",
    "cost": "What each arm costs, by the number of omitted layers: loss above full depth, with standard errors.",
    "frontier": "Quality against measured speed, a point a plan. Down and to the right is better.",
    "lengths": "What each arm costs, by the length of the prompt.",
    "recall": "How often the definition of a prompt's first line is found again at its end.",
    "ttft": "Time to first token by length of the prompt.",
    "stages": "Where the time of a prefill goes, stage by stage.",
}


class Page(NamedTuple):
    """A page, and the files that it is made of."""

    html: str
    sources: list[str]


def make_page(folder: Path) -> Page:
    """Of every evaluation, importance, plan, bench report and PNG in ``folder``.

    Raises:
        OSError: the folder cannot be read.
        ValueError: it holds none of these, or a .json that is none or that no command wrote so.
    """
    sections: list[str] = []
    sources: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.suffix != ".json":
            continue
        try:
            section = _section(path)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected a result as one of the commands writes it ({error!r})") from None
        if section:
            sections.append(section)
            sources.append(path.name)
    figures = sorted(folder.glob("*.png"), key=lambda path: (_order(path.stem), path.name))
    sources += [path.name for path in figures]
    if not sources:
        raise ValueError(f"{folder}: expected results of calibrate, eval or bench, got none")
    body = [f"<h1>pop_ext: {html.escape(folder.resolve().name)}</h1>"]
    if figures:
        body += ["<h2>Figures</h2>", *(_figure(path.read_bytes(), path.stem) for path in figures)]
    body += sections
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = f"<title>pop_ext: {html.escape(folder.resolve().name)}</title>"
    document = f"<!doctype html>\n<html lang=en><head>{head}{title}<style>\n{_STYLE}\n</style></head>\n<body>\n"
    return Page(document + "\n".join(body) + "\n</body></html>\n", sources)


def _order(stem: str) -> int:
    known = [*_CAPTIONS]
    return known.index(stem) if stem in known else -1  # what calibrate draws comes first


def _section(path: Path) -> str | None:
    """Of a JSON file that one of the commands wrote; None for any other."""
    try:
        members = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
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


def _evaluation(result: Evaluation, name: str) -> str:
    facts = result.facts
    where = facts["environment"]
    parts = [
        f"<h2>Evaluation: {_text(facts['model'] or 'model')}</h2>",
        f"<p class=soft>{_text(name)}: {_text(facts['dtype'])} on {_text(facts['device'])}, POP by the "
        f"{_text(facts['backend'])} backend; {_text(where['processor'])}, {where['threads']} threads; pop_ext "
        f"{_text(where['pop_ext'])}, torch {_text(where['torch'])}, transformers {_text(where['transformers'])}. "
        f"Losses in nats a token; standard errors over prompts in brackets; differences are paired, prompt by prompt."
        "</p>",
    ]
    rows = list(zip(result.summary(), result.cells, strict=True))
    for number, prompts in enumerate(facts["sets"]):
        length = "" if prompts["length"] is None else f" of {prompts['length']} tokens"
        parts.append(f"<h3>{prompts['prompts']} {prompts['kind']} prompts{length}</h3>")
        columns = {"loss": "loss", "delta_loss": "to full depth", "delta_first": "first token, to full depth"}
        columns |= {"exact": "exact answer"} if prompts["kind"] == "recall" else {}
        columns |= {"agreement": "greedy as full", "match": "exact match"} if prompts["kind"] == "text" else {}
        own = [row for row, cell in rows if cell["set"] == number]
        columns = {key: text for key, text in columns.items() if any(key in row for row in own)}
        body = [[_text(row["arm"]), *(_mean(row.get(key)) for key in columns)] for row in own]
        parts.append(_table(["arm", *columns.values()], body))
    if result.timings:
        parts += ["<h3>Time to first token</h3>", _times(result.timings)]
    return "\n".join(parts)


def _times(timings: Sequence[dict[str, Any]]) -> str:
    lengths = sorted({timing["tokens"] for timing in timings})
    rows = []
    for arm in dict.fromkeys(timing["arm"] for timing in timings):
        cells = []
        for tokens in lengths:
            seconds = next((t["seconds"] for t in timings if t["arm"] == arm and t["tokens"] == tokens), None)
            gain = speedup(timings, arm, tokens)
            cells.append("-" if seconds is None else f"{1e3 * sorted(seconds)[len(seconds) // 2]:.1f}")
            cells.append("-" if gain is None else f"{gain:.2f}x")
        rows.append([_text(arm), *cells])
    header = [text for tokens in lengths for text in (f"{tokens} tokens, ms", f"vs {NATIVE_FULL}")]
    return _table(["arm", *header], rows)


def _importance(members: dict[str, Any], name: str) -> str:
    parts = [
        f"<h2>Importance of layers</h2><p class=soft>{_text(name)}: {members['origin'].get('samples')} samples</p>"
    ]
    for kind, gate in members["gates"].items():
        columns = ("prefill", "prefill_error", "decode", "decode_error")
        rows = [
            [str(layer), *(f"{_number(value):.3g}" for value in values)]
            for layer, values in enumerate(zip(*(gate[column] for column in columns), strict=True))
        ]
        header = ["layer" if kind == "layer" else f"layer, {kind}", "prompt", "error", "what follows", "error"]
        parts.append(_table(header, rows))
    return "\n".join(parts)


def _plan(members: dict[str, Any], name: str) -> str:
    origin = members.get("origin") or {}
    return (
        f"<h2>Plan: {_text(name)}</h2><p>Omits layers {members['omit']} of {members['num_layers']}; boundary "
        f"{members.get('boundary', 1)}; prompts from {members.get('min_tokens', 0)} tokens on. "
        f"{_text(origin.get('method') or '')}</p>{_fit(members.get('projections'))}"
    )


def _fit(members: Any) -> str:
    """How a plan's projections were fitted; "" for a plan without."""
    if not isinstance(members, dict):
        return ""
    found = FitReport.from_dict(members)
    losses = [
        [found.ridge_text(ridge), f"{loss:.4f} <small>({error:.4f})</small>", "chosen" if ridge == found.ridge else ""]
        for ridge, loss, error in found.losses
    ]
    residuals = [
        [str(layer), *(f"{share:.1%}" for share in shares)] for layer, shares in sorted(found.residuals.items())
    ]
    text = f"Fitted projections: {_text(found.method())}; {found.sequences} sequences, {found.tokens} tokens"
    parts = [f"<p>{text}; {found.holdout} held-out sequences chose lambda.</p>"]
    parts += [_table(["lambda", "loss of what follows held-out prompts", ""], losses)] if losses else []
    parts += [_table(["layer", "error of K, before", "after", "of V, before", "after"], residuals)]
    return "".join(parts)


def _bench(members: dict[str, Any], name: str) -> str:
    parts = [f"<h2>Bench: {_text(name)}</h2>"]
    for case in members.get("cases", []):
        parts.append(
            f"<h3>{_text(case['model'])}, batch {case['batch']}, {case['tokens']} tokens, {case['dtype']}</h3>"
        )
        rows = [
            [_text(arm["name"]), f"{1e3 * arm['median_s']:.1f}" if arm.get("median_s") else _text(str(arm["failed"]))]
            for arm in case["arms"]
        ]
        parts.append(_table(["arm", "median ms"], rows))
        compared = [
            [_text(f"{c['arm']} against {c['baseline']}"), f"{c['speedup']:.2f}x", f"{c['ceiling']:.2f}x"]
            for c in case["comparisons"]
        ]
        parts.append(_table(["comparison", "measured", "FLOP ceiling"], compared))
    profiles = members.get("profiles", [])
    if profiles:
        drawn = io.BytesIO()
        try:
            plot_stages(profiles, drawn)
            parts.append(_figure(drawn.getvalue(), "stages"))
        except ImportError:
            pass  # the table below says the same
    for item in profiles:
        parts.append(f"<h3>Stages: {_text(item['arm'])}, {item['tokens']} tokens, {1e3 * item['seconds']:.1f} ms</h3>")
        parts.append(_stages(item))
    return "\n".join(parts)


def _stages(item: dict[str, Any]) -> str:
    rows = []
    for stage in item["stages"]:
        peak = stage.get("share_of_peak")
        times = [f"{1e3 * stage['seconds']:.2f}", f"{100 * stage['share']:.1f} %"]
        rows.append([_text(stage["name"]), *times, _rate(item, stage), "-" if peak is None else f"{100 * peak:.0f} %"])
    return _table(["stage", "ms", "share", "rate", "of peak"], rows)


def _rate(item: dict[str, Any], stage: dict[str, Any]) -> str:
    """GFLOP/s, or GB/s of a stage that memory bounds."""
    flops, moved, seconds = stage.get("flops"), stage.get("bytes"), stage["seconds"]
    if not flops or not seconds:
        return "-"
    peak, bandwidth = item.get("gemm_peak_flop_per_s"), item.get("bandwidth_bytes_per_s")
    if moved and peak and bandwidth and moved / bandwidth > flops / peak:
        return f"{moved / seconds / 1e9:.1f} GB/s"
    return f"{flops / seconds / 1e9:.1f} GFLOP/s"


def _figure(png: bytes, stem: str) -> str:
    data = base64.b64encode(png).decode()
    known = "importance" if stem.endswith(".importance") else stem
    caption = _text(_CAPTIONS.get(known, stem))
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"


def _mean(mean: Mean | None) -> str:
    if mean is None:
        return "-"
    error = "" if math.isnan(mean.error) else f" <small>({mean.error:.3f})</small>"
    return f"{mean.value:.3f}{error}"


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _text(text: Any) -> str:
    return html.escape(str(text))
