"""Figures of an evaluation. They need matplotlib (extra ``plot``).

Each ``draw_*`` writes its figure to ``path`` and returns True, or returns False if the result has no data for it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Any

from pop_ext.evaluation.ablations import DROPPED, NO_BOUNDARY, NO_KV
from pop_ext.evaluation.arms import (
    DISTILL,
    FITTED,
    FITTED_FP8,
    FITTED_INT8,
    FULL,
    FULL_FP8,
    FULL_INT8,
    POP,
    POP_FP8,
    POP_INT8,
    omitted_text,
)
from pop_ext.evaluation.results import Evaluation, Mean
from pop_ext.evaluation.timing import NATIVE_FULL, STOCK, SpeedRange, plan_arm, speed_range
from pop_ext.methods.plots import new_figure

StrPath = str | PathLike[str]
Row = dict[str, Any]

DISTILLED = f"pop-{DISTILL}"
"""How figures name the kind of arms with a distilled fit."""

# Shades by kind, from light to dark with the boundary. The kinds can be told apart in grey, too.
_SHADES = {
    POP: ("#6db3e8", "#1f7fc4", "#0b4f86", "#06304f"),
    FITTED: ("#7cc98a", "#2f9e4f", "#176b30", "#0c421c"),
    DISTILLED: ("#e38ad0", "#c037a4", "#7d1d69", "#4c0f3f"),
    NO_KV: ("#f2b36b", "#e0842b", "#a85a10", "#6b3705"),
    NO_BOUNDARY: ("#8e5fb5",),
    DROPPED: ("#666666",),
    FULL_FP8: ("#c2405a",),
    POP_FP8: ("#e58fa0", "#c2405a", "#852338", "#4f1220"),
    FULL_INT8: ("#3a8f8f",),
    POP_INT8: ("#8fd0d0", "#3a8f8f", "#1d5c5c", "#0d3535"),
    FITTED_FP8: ("#d9a0a0", "#b06a6a", "#7a3f3f", "#4a2020"),
    FITTED_INT8: ("#b7c48a", "#8a9a4e", "#5d6a2b", "#363f14"),
}
_MARKERS = {
    POP: "o",
    FITTED: "^",
    DISTILLED: "P",
    NO_KV: "s",
    NO_BOUNDARY: "D",
    DROPPED: "x",
    FULL_FP8: "*",
    POP_FP8: "v",
    FULL_INT8: "p",
    POP_INT8: "<",
    FITTED_FP8: ">",
    FITTED_INT8: "h",
}
_LINEAR_BELOW = 0.01  # nats per token; below it the loss axis is linear, so that zero and noise can be shown


def draw_cost(result: Evaluation, path: StrPath) -> bool:
    """Draw the loss of each arm above full depth, by the number of omitted layers."""
    rows = _widest_set(result, "text")
    lines = _lines(rows, _count, "delta_loss")
    if not _has_line(lines):
        return False
    figure, [ax] = new_figure(1, width=7.6, height=4.6)
    _draw_lines(ax, lines)
    _loss_axis(ax, "loss above full depth, nats a token")
    ax.set_xlabel("omitted layers")
    ax.xaxis.get_major_locator().set_params(integer=True)
    _title(figure, result, f"{rows[0]['prompts']} prompts{_of_length(rows[0])}")
    _legend(figure)
    figure.savefig(path)
    return True


def draw_recall(result: Evaluation, path: StrPath) -> bool:
    """Draw the share of exact answers by the number of omitted layers, in one panel per set of prompts with answers."""
    sets = [rows for rows in _sets(result) if "exact" in rows[0] and _has_line(_lines(rows, _count, "exact"))]
    if not sets:
        return False
    figure, axes = new_figure(len(sets), width=2.4 + 5.2 * len(sets), height=4.4)
    for ax, rows in zip(axes, sets, strict=True):
        _draw_lines(ax, _lines(rows, _count, "exact"))
        for row in rows:
            if row["kind"] == FULL:
                ax.axhline(row["exact"].value, color="black", linewidth=1, linestyle=":", label="full depth")
        ax.set_ylim(-0.03, 1.03)
        ax.set_title(f"{rows[0]['prompts']} {rows[0]['set']} prompts{_of_length(rows[0])}", fontsize=10)
        ax.set_xlabel("omitted layers")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("share of exact answers")
    _title(figure, result, "answers from the prompt")
    _legend(figure)
    figure.savefig(path)
    return True


def draw_lengths(result: Evaluation, path: StrPath) -> bool:
    """Draw the loss of each arm above full depth, by prompt length, in one panel for each of up to three plans."""
    rows = [row for row in result.summary() if row["set"] == "text" and row["length"] is not None]
    by_plan: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        if row["kind"] != FULL:
            by_plan.setdefault(tuple(row["omit"]), []).append(row)
    by_plan = {omit: own for omit, own in by_plan.items() if len({row["length"] for row in own}) > 1}
    chosen = sorted(by_plan, key=len)[:3]
    if not chosen:
        return False
    figure, axes = new_figure(len(chosen), width=1.6 + 4.6 * len(chosen), height=4.4)
    low, high = math.inf, -math.inf
    for ax, omit in zip(axes, chosen, strict=True):
        _draw_lines(ax, _lines(by_plan[omit], lambda row: row["length"], "delta_loss"))
        _loss_axis(ax, "loss above full depth, nats a token" if ax is axes[0] else "")
        low, high = min(low, ax.get_ylim()[0]), max(high, ax.get_ylim()[1])
        ax.set_title(f"{len(omit)} of {result.facts['num_layers']} layers omitted", fontsize=10)
        _length_axis(ax, {row["length"] for row in by_plan[omit]})
    for ax in axes:
        ax.set_ylim(low, high)
    _title(figure, result, f"{by_plan[chosen[0]][0]['prompts']} prompts of each length")
    _legend(figure)
    figure.savefig(path)
    return True


def draw_frontier(result: Evaluation, path: StrPath) -> bool:
    """Draw quality against measured speed, one point per plan, and join the plans that no other beats in both.

    Error bars are standard errors of the loss, and quartiles of the speed over rounds. The speed is measured at the
    prompt length of the loss if it was timed, because a wide boundary costs a short prompt more. Otherwise the longest
    timed length is used.
    """
    rows = [row for row in _widest_set(result, "text") if row["kind"] in (POP, FITTED)]
    timed: set[int] = {timing["tokens"] for timing in result.timings}
    length: int | None = rows[0]["length"] if rows else None
    tokens = length if length is not None and length in timed else max(timed, default=0)
    points = []
    for row in rows:
        gain = speed_range(result.timings, plan_arm(row["omit"], row["boundary"]), tokens)
        if gain is not None:
            points.append((gain, row["delta_loss"], row))
    if len(points) < 2:
        return False
    figure, [ax] = new_figure(1, width=9.0, height=5.6)
    style = {"fmt": "none", "ecolor": "#bbbbbb", "elinewidth": 0.8, "zorder": 1}
    ax.errorbar(
        [x.median for x, _, _ in points],
        [y.value for _, y, _ in points],
        yerr=[y.error for _, y, _ in points],
        xerr=[[x.median - x.low for x, _, _ in points], [x.high - x.median for x, _, _ in points]],
        **style,
    )
    boundaries = sorted({row["boundary"] for _, _, row in points})
    for kind, boundary in sorted({(_look(row), row["boundary"]) for _, _, row in points}):
        own = [(x.median, y) for x, y, row in points if (_look(row), row["boundary"]) == (kind, boundary)]
        colour = _shade(kind, boundaries.index(boundary))
        label = f"{_kind_text(kind)}, boundary {boundary}"
        ax.scatter(*zip(*[(x, y.value) for x, y in own], strict=True), color=colour, marker=_MARKERS[kind], label=label)
    best = _frontier([(x.median, y.value) for x, y, _ in points])
    ax.plot(*zip(*best, strict=True), color="#999999", linewidth=1, linestyle="--", zorder=0, label="frontier")
    _loss_axis(ax, f"loss above full depth, nats a token{_after_prompts(length)}")
    _label_plans(ax, points)
    ax.set_xlabel(f"times as fast as the native full prefill, prompts of {tokens} tokens, measured")
    _title(figure, result, "quality against speed; at a point: the omitted layers")
    _legend(figure)
    figure.savefig(path)
    return True


def _label_plans(ax: Any, points: Sequence[tuple[SpeedRange, Mean, Row]]) -> None:
    """Label each point with its omitted layers. A plan with and without a fit is equally fast and gets one label."""
    highest: dict[tuple[tuple[int, ...], int], tuple[float, float]] = {}
    for x, y, row in points:
        plan, at = (tuple(row["omit"]), row["boundary"]), (x.median, y.value)
        highest[plan] = max(highest.get(plan, at), at)
    for (omit, _), at in highest.items():
        offset = {"xytext": (2, 4), "textcoords": "offset points", "rotation": 45}
        ax.annotate(omitted_text(omit), at, fontsize=7, ha="left", va="bottom", **offset)


def draw_ttft(result: Evaluation, path: StrPath) -> bool:
    """Draw time to first token by prompt length: stock model, native full, and plans of the smallest boundary."""
    lengths = {timing["tokens"] for timing in result.timings}
    if len(lengths) < 2:
        return False
    pruned = [timing for timing in result.timings if timing.get("omit")]
    narrowest = min((timing["boundary"] for timing in pruned), default=1)
    counts = sorted({len(timing["omit"]) for timing in pruned})
    shown = {counts[len(counts) // 2], counts[-1]} if counts else set()
    lines: dict[str, list[tuple[int, float]]] = {}
    for timing in result.timings:
        if timing.get("omit") and (timing["boundary"] != narrowest or len(timing["omit"]) not in shown):
            continue
        lines.setdefault(timing["arm"], []).append((timing["tokens"], 1e3 * statistics.median(timing["seconds"])))
    figure, [ax] = new_figure(1, width=7.2, height=4.4)
    colours = {STOCK: "#666666", NATIVE_FULL: "#e0842b"}
    shades = iter(_SHADES[POP])
    for name, points in lines.items():
        points.sort()
        ax.plot(*zip(*points, strict=True), "o-", markersize=4, color=colours.get(name) or next(shades), label=name)
    _length_axis(ax, lengths)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_ylabel("time to first token, ms")
    _title(figure, result, "medians, batch 1")
    _legend(figure)
    figure.savefig(path)
    return True


FIGURES: dict[str, Callable[[Evaluation, StrPath], bool]] = {
    "cost": draw_cost,
    "frontier": draw_frontier,
    "lengths": draw_lengths,
    "recall": draw_recall,
    "ttft": draw_ttft,
}
"""File name without its ending -> the function that draws the figure."""


def _sets(result: Evaluation) -> list[list[Row]]:
    """Return the summary rows of each set of prompts."""
    sets: dict[int, list[Row]] = {}
    for row, cell in zip(result.summary(), result.cells, strict=True):
        sets.setdefault(cell["set"], []).append(row)
    return [sets[number] for number in sorted(sets)]


def _widest_set(result: Evaluation, kind: str) -> list[Row]:
    """Return the summary rows of the set of a kind with the most arms; of several, that of the longest prompts."""
    sets = [rows for rows in _sets(result) if rows[0]["set"] == kind]
    return max(sets, key=lambda rows: (len(rows), rows[0]["length"] or 0), default=[])


def _look(row: Row) -> str:
    """Return the key of a row's shades, marker and label: its kind, except for distilled fits."""
    return DISTILLED if (row["kind"], row["method"]) == (FITTED, DISTILL) else str(row["kind"])


def _count(row: Row) -> int:
    return len(row["omit"])


def _has_line(lines: dict[tuple[str, int | None], list[Any]]) -> bool:
    return any(len(points) > 1 for points in lines.values())


def _lines(rows: Iterable[Row], x: Callable[[Row], int], value: str) -> dict[tuple[str, int | None], list[Any]]:
    """Return the points of each line: (kind, boundary) -> (x, Mean, omitted layers), sorted by x."""
    lines: dict[tuple[str, int | None], list[tuple[int, Mean, tuple[int, ...]]]] = {}
    for row in rows:
        if row["kind"] != FULL:
            lines.setdefault((_look(row), row["boundary"]), []).append((x(row), row[value], tuple(row["omit"])))
    for points in lines.values():
        points.sort()
    return lines


def _draw_lines(ax: Any, lines: dict[tuple[str, int | None], list[Any]]) -> None:
    boundaries = sorted({boundary for _, boundary in lines if boundary is not None})
    for (kind, boundary), points in lines.items():
        label = _kind_text(kind) + ("" if boundary is None else f", boundary {boundary}")
        colour = _shade(kind, boundaries.index(boundary) if boundary is not None else 0)
        style = {"marker": _MARKERS[kind], "markersize": 4, "linewidth": 1.3, "capsize": 2, "color": colour}
        for number, chain in enumerate(_chains(points)):
            xs, means, _ = zip(*chain, strict=True)
            errors = [mean.error for mean in means]
            ax.errorbar(xs, [mean.value for mean in means], yerr=errors, label=label if number == 0 else None, **style)


def _chains(points: Sequence[Any]) -> list[list[Any]]:
    """Split points into lines: each point of a line omits all layers that the point before it omits."""
    chains: list[list[Any]] = []
    for point in points:
        fitting = [chain for chain in chains if chain[-1][0] < point[0] and {*chain[-1][2]} <= {*point[2]}]
        if fitting:
            max(fitting, key=lambda chain: chain[-1][0]).append(point)
        else:
            chains.append([point])
    return chains


def _frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto frontier of points (speed, loss): those to which no other is better in both speed and loss."""
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (-p[0], p[1])):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _shade(kind: str, index: int) -> str:
    shades = _SHADES[kind]
    return shades[min(index, len(shades) - 1)]


def _kind_text(kind: str) -> str:
    names = {
        POP: "POP",
        FITTED: "POP, ridge fit",
        DISTILLED: "POP, distilled fit",
        NO_KV: "no KV projection",
        NO_BOUNDARY: "no boundary handling",
        DROPPED: "dropped in both stages",
        FULL_FP8: "full depth, fp8",
        POP_FP8: "POP, fp8",
        FULL_INT8: "full depth, int8",
        POP_INT8: "POP, int8",
        FITTED_FP8: "POP, fitted, fp8",
        FITTED_INT8: "POP, fitted, int8",
    }
    return names[kind]


def _loss_axis(ax: Any, label: str) -> None:
    ax.set_yscale("symlog", linthresh=_LINEAR_BELOW, linscale=0.5)
    ticks = [-0.1, -0.01, 0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10]
    low, high = ax.get_ylim()
    ax.set_yticks([tick for tick in ticks if low <= tick <= high])
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value else "full depth  0")
    ax.minorticks_off()
    ax.axhline(0, color="black", linewidth=0.7)
    ax.set_ylabel(label)


def _length_axis(ax: Any, lengths: Iterable[int]) -> None:
    ax.set_xscale("log", base=2)
    ordered = sorted(lengths)
    ax.set_xticks(ordered, [str(length) for length in ordered])
    ax.minorticks_off()
    ax.set_xlabel("tokens of the prompt")


def _title(figure: Any, result: Evaluation, what: str) -> None:
    name = str(result.facts["model"] or "model").rstrip("/")
    figure.suptitle(f"{name}: {what}", fontsize=10, x=0.01, ha="left")


def _legend(figure: Any) -> None:
    """Draw one legend for all axes of a figure, without duplicates."""
    shown: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(shown.values(), shown.keys(), loc="outside right center", frameon=False, fontsize=8)


def _after_prompts(length: int | None) -> str:
    return ", after prompts of their own lengths" if length is None else f", after prompts of {length} tokens"


def _of_length(row: Row) -> str:
    return "" if row["length"] is None else f" of {row['length']} tokens"
