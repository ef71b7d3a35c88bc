"""Figures of a calibration and of a profile. They need matplotlib (extra ``plot``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import IO, Any

# The two colours differ in lightness, too, so that they can be told apart in grey and by the colour-blind.
PREFILL, DECODE = "#0b6fb8", "#e0842b"
STAGE_COLOURS = (
    "#0b4f86",
    "#1f7fc4",
    "#6db3e8",
    "#b9dcf5",
    "#e0842b",
    "#f2b36b",
    "#2f9e4f",
    "#7cc98a",
    "#8e5fb5",
    "#c4a5dd",
    "#bbbbbb",
)


def new_figure(columns: int, width: float = 7.0, height: float = 4.2) -> tuple[Any, Any]:
    """Create a figure outside pyplot, so that no window opens and no global state changes.

    Args:
        columns: Number of axes side by side.
        width: Width in inches.
        height: Height in inches.

    Returns:
        The figure and its axes, an array [columns].

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot: expected matplotlib: pip install 'pop_ext[plot]'", name=error.name) from None
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def plot_importance(panels: Mapping[str, Mapping[str, Sequence[float]]], title: str, path: str | PathLike[str]) -> None:
    """Draw importance by layer, context rows beside loss rows, one panel for each kind of gate.

    Args:
        panels: Kind of gate -> values by layer, in nats squared: ``prefill``, ``decode`` and their standard errors
            ``prefill_error`` and ``decode_error``.
        title: Text above the figure.
        path: File to write; its ending gives the format.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure, axes = new_figure(len(panels), width=2.2 + 4.8 * len(panels))
    for ax, (kind, scores) in zip(axes, panels.items(), strict=True):
        _draw_errorbars(ax, scores["prefill"], scores["prefill_error"], "context rows (prefill)", PREFILL, "o")
        _draw_errorbars(ax, scores["decode"], scores["decode_error"], "loss rows (decode)", DECODE, "s")
        ax.set_yscale("log")
        ax.set_xlabel("layer")
        ax.set_title({"layer": "whole layer"}.get(kind, kind), fontsize=10)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("importance  E[(dL/dg)²]")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def _draw_errorbars(
    ax: Any, values: Sequence[float], errors: Sequence[float], label: str, colour: str, marker: str
) -> None:
    """Draw one value per layer with its standard error, on an axis that becomes logarithmic."""
    # A logarithmic axis has no zero: write "0" at the foot of the axis instead (the last layer on context rows).
    shown = [value if value > 0 else math.nan for value in values]
    whiskers = [[min(error, 0.9 * value) for value, error in zip(values, errors, strict=True)], errors]
    style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4, "capsize": 2}
    ax.errorbar(range(len(values)), shown, yerr=whiskers, label=label, **style)
    for layer in (index for index, value in enumerate(values) if value == 0):
        at = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom", "color": colour}
        ax.annotate("0", (layer, 0.01), fontsize=9, **at)


def plot_stages(profiles: Sequence[dict[str, Any]], path: str | PathLike[str] | IO[bytes]) -> None:
    """Draw where the time of prefills goes: one bar per profile, one colour per stage.

    Args:
        profiles: Profiles that ``bench/run.py --profile`` writes, at least one.
        path: File or stream that takes the figure as PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    names = list(dict.fromkeys(stage["name"] for item in profiles for stage in item["stages"]))
    names.sort(key=lambda name: name == "rest")  # "rest" comes last
    figure, [ax] = new_figure(1, width=8.0, height=1.6 + 0.42 * len(profiles))
    ax.grid(visible=False)
    left = [0.0] * len(profiles)
    labels = [f"{item['arm']}, {item['tokens']} tokens" for item in profiles]
    for number, name in enumerate(names):
        widths = [1e3 * sum(s["seconds"] for s in item["stages"] if s["name"] == name) for item in profiles]
        ax.barh(labels, widths, left=left, color=STAGE_COLOURS[number % len(STAGE_COLOURS)], label=name, height=0.62)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    ax.invert_yaxis()
    ax.set_xlabel("ms")
    figure.suptitle(f"{profiles[0]['model']}, {profiles[0]['dtype']}: stages of a prefill", fontsize=10)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path, format="png")
