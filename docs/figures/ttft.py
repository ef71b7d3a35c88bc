"""Draws ttft.svg: time to first token of the stock model, native at full depth, and POP, from reports of the bench."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "bench" / "results"
PANELS = (
    ("Llama-3.1-8B on an NVIDIA H200", ("h200-llama-3.1-8b-batch-1.json", "h200-llama-3.1-8b-batch-8.json")),
    (
        "Llama-3.2-1B on 2 cores of a Zen 5",
        ("zen5-llama-3.2-1b-512-bfloat16.json", "zen5-llama-3.2-1b-2048-bfloat16.json"),
    ),
)
STOCK, NATIVE, POP = "#8fa9c9", "#3b6fb6", "#d9772b"
LEGEND = ((STOCK, "Hugging Face"), (NATIVE, "pop_ext, all layers"), (POP, "pop_ext, a third of the layers omitted"))
BAR, GAP, GROUP_GAP = 16, 2, 14
LEFT, TOP, WIDTH, PANEL = 110, 58, 240, 450


def text(x: float, y: float, content: str, size: int = 12, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}">{content}</text>'


def times(case: dict[str, Any]) -> list[float]:
    """Median seconds of the stock arm (the faster one where two ran), native at full depth, and POP."""
    medians = {arm["name"]: arm["median_s"] for arm in case["arms"]}
    [pop] = [name for name in medians if re.fullmatch(r"pop \d+/\d+", name)]
    return [medians[case["baseline"]], medians["native-full"], medians[pop]]


def label(seconds: float, first: float) -> str:
    shown = f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
    return shown if seconds == first else f"{shown}, {first / seconds:.2f}x"


def panel(left: int, title: str, files: tuple[str, ...]) -> tuple[list[str], int]:
    """The marks of one machine, and the y below them."""
    cases = [case for name in files for case in json.loads((RESULTS / name).read_text(encoding="utf-8"))["cases"]]
    cases = sorted(cases, key=lambda case: (case["batch"], case["tokens"]))
    scale = WIDTH / max(seconds for case in cases for seconds in times(case))
    parts, y = [text(left - LEFT + 10, TOP - 18, title, 14)], TOP
    for case in cases:
        size = f"{case['tokens']} tokens" if case["batch"] == 1 else f"{case['batch']} x {case['tokens']} tokens"
        parts.append(text(left - 8, y + 1.5 * BAR + 5, size, 12, "end"))
        seconds = times(case)
        for value, (fill, _) in zip(seconds, LEGEND, strict=True):
            parts.append(
                f'<rect x="{left}" y="{y}" width="{scale * value:.1f}" height="{BAR - GAP}" rx="2" fill="{fill}"/>'
            )
            parts.append(text(left + scale * value + 5, y + 11, label(value, seconds[0]), 11))
            y += BAR
        y += GROUP_GAP
    return parts, y


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg")
    drawn = [panel(LEFT + number * PANEL, title, files) for number, (title, files) in enumerate(PANELS)]
    bottom = max(y for _, y in drawn)
    width, height = len(PANELS) * PANEL + 10, bottom + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" fill="#222">',
        f'<rect width="{width}" height="{height}" rx="6" fill="#fff"/>',
        text(10, 20, "Time to first token, bfloat16 (shorter is better)", 12),
    ]
    for marks, _ in drawn:
        parts += marks
    x = 10
    for fill, name in LEGEND:
        parts.append(f'<rect x="{x}" y="{bottom + 6}" width="14" height="14" rx="2" fill="{fill}"/>')
        parts.append(text(x + 19, bottom + 17.5, name))
        x += 50 + 7 * len(name)
    parts.append("</svg>")
    out.write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
