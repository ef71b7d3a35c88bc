#!/usr/bin/env python
"""Draw reports of the bench: ``python bench/plot.py OUT.png REPORT.json ...``.

The upper panels show the speed-up of every arm over each baseline by prompt length, with the arm's FLOP ceiling, and
its roofline where the report has one. The lower panels show the stages of each profile, relative to the slowest profile
of its shape.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_WIDTH, _HEIGHT = 5.2, 3.6  # of a panel, in inches
_STAGE_COLOURS = "tab20"


class Point(NamedTuple):
    """A speed-up and its bounds at one length; ``roofline`` is None in reports of runs that did not measure it."""

    tokens: int
    speedup: float
    ceiling: float
    roofline: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figure. Return 1 if the reports hold nothing to draw, else 0."""
    parser = argparse.ArgumentParser(prog="bench/plot.py", description="Draw reports of the bench.")
    parser.add_argument("out", type=Path, help="the figure; its suffix is the format")
    parser.add_argument("reports", nargs="+", type=Path, help="JSON files of bench/run.py and bench/serve.py")
    options = parser.parse_args(arguments)
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in options.reports]
    figure = draw(reports)
    if figure is None:
        print("bench/plot.py: expected cases or profiles in the reports, got none", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=150, bbox_inches="tight")
    return 0


def draw(reports: Sequence[dict[str, Any]]) -> Any | None:
    """Return a matplotlib figure of all reports; None if they hold nothing to draw."""
    from matplotlib.figure import Figure

    panels = speedup_panels(reports) | serving_panels(reports)
    bars = profile_groups(reports)
    count = len(panels) + len(bars)
    if count == 0:
        return None
    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for (title, points), axis in zip(panels.items(), axes, strict=False):
        _draw_speedups(axis, title, points)
    for (title, profiles), axis in zip(bars.items(), axes[len(panels) :], strict=False):
        _draw_stages(axis, title, profiles)
    for axis in axes[count:]:
        axis.set_visible(False)
    devices = sorted({_device(report) for report in reports})
    figure.suptitle(f"{', '.join(devices)} (dotted: FLOP ceiling; dashed: roofline)", fontsize=9)
    return figure


def _device(report: dict[str, Any]) -> str:
    facts = report["environment"]
    device = facts["processor"] if facts["device"] == "cpu" else facts["device"]
    return f"{device}, torch {facts['torch']}"


def speedup_panels(reports: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[Point]]]:
    """Return panel title (model, batch, baseline) -> arm -> points, by length."""
    panels: dict[str, dict[str, list[Point]]] = {}
    for case in (case for report in reports for case in report["cases"]):
        for item in case["comparisons"]:
            title = f"{case['model']}, batch {case['batch']}, against {item['baseline']}"
            points = panels.setdefault(title, {}).setdefault(item["arm"], [])
            points.append(Point(case["tokens"], item["speedup"], item["ceiling"], item.get("roofline")))
    for arms in panels.values():
        for points in arms.values():
            points.sort(key=lambda point: point.tokens)
    return panels


def serving_panels(reports: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float, float]]]]:
    """Return the same of servers (``bench/serve.py``): a panel for each ratio that has a ceiling, a line by load."""
    figures = {"processor_s": "processor time of a request", "ttft_s": "time to first token"}
    panels: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for serving in (report["serving"] for report in reports if "serving" in report):
        for cell, name in ((cell, name) for cell in serving["cells"] for name in figures if name in cell["ratios"]):
            panel = panels.setdefault(f"{serving['model']} served, {figures[name]}", {})
            ratio = cell["ratios"][name]
            points = panel.setdefault(f"{cell['concurrency']} at once", [])
            points.append(Point(cell["tokens"], ratio["median"], ratio["ceiling"], ratio.get("roofline")))
    for lines in panels.values():
        for points in lines.values():
            points.sort(key=lambda point: point.tokens)
    return panels


def profile_groups(reports: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return group title (model, batch, tokens) -> its profiles."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in (item for report in reports for item in report.get("profiles", [])):
        title = f"{item['model']}, batch {item['batch']}, {item['tokens']} tokens"
        groups.setdefault(title, []).append(item)
    return groups


def _draw_speedups(axis: Any, title: str, arms: dict[str, list[Point]]) -> None:
    for number, (arm, points) in enumerate(arms.items()):
        tokens, speedups, ceilings, _ = zip(*points, strict=True)
        colour = f"C{number}"
        axis.plot(tokens, speedups, "o-", color=colour, label=arm)
        axis.plot(tokens, ceilings, "_:", color=colour, markersize=12)
        bounded = [(point.tokens, point.roofline) for point in points if point.roofline is not None]
        if bounded:
            axis.plot(*zip(*bounded, strict=True), "_--", color=colour, markersize=12, linewidth=0.8)
    axis.axhline(1.0, color="black", linewidth=0.6)
    axis.set_xscale("log", base=2)
    lengths = sorted({point.tokens for points in arms.values() for point in points})
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.minorticks_off()
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("tokens")
    axis.set_ylabel("times as fast")
    axis.grid(alpha=0.3)
    _legend_below(axis, columns=3)


def _draw_stages(axis: Any, title: str, profiles: list[dict[str, Any]]) -> None:
    import matplotlib

    names = list(dict.fromkeys(stage["name"] for item in profiles for stage in item["stages"]))
    colours = matplotlib.colormaps[_STAGE_COLOURS]
    slowest = max(item["seconds"] for item in profiles)
    labels = [item["arm"] for item in profiles]
    left = [0.0] * len(profiles)
    for number, name in enumerate(names):
        widths = [
            100 * sum(stage["seconds"] for stage in item["stages"] if stage["name"] == name) / slowest
            for item in profiles
        ]
        axis.barh(labels, widths, left=left, color=colours(number % 20), label=name)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("% of the slowest")
    axis.set_title(f"{title} (slowest {1e3 * slowest:,.1f} ms)", fontsize=9)
    _legend_below(axis, columns=5)


def _legend_below(axis: Any, columns: int) -> None:
    axis.legend(fontsize=7, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)


if __name__ == "__main__":
    sys.exit(main())
