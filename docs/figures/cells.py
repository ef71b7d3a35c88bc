"""Draws cells.svg: which layers compute what for which token, in the stock prefill and under POP."""

from __future__ import annotations

import sys
from pathlib import Path

LAYERS, OMITTED, PROMPT, DECODED = 12, 4, 14, 3
CELL, GAP = 16, 2
LEFT, TOP, PANEL = 70, 46, 340
FULL, BOUNDARY, KV_ONLY, DECODE = "#3b6fb6", "#d9772b", "#dfe7f2", "#8fa9c9"
LEGEND = (
    (FULL, "full layer, context rows"),
    (KV_ONLY, "K and V only"),
    (BOUNDARY, "full layer, boundary row"),
    (DECODE, "decode"),
)


def colour(layer: int, token: int, pruned: bool) -> str:
    """Of one cell; token PROMPT - 1 is the boundary row, those from PROMPT on are decoded."""
    if token >= PROMPT:
        return DECODE
    if token == PROMPT - 1:
        return BOUNDARY if pruned else FULL
    return KV_ONLY if pruned and layer >= LAYERS - OMITTED else FULL


def text(x: float, y: float, content: str, size: int = 12, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}">{content}</text>'


def cell(x: float, y: float, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{CELL - GAP}" height="{CELL - GAP}" rx="2" fill="{fill}"/>'


def panel(left: int, title: str, pruned: bool) -> list[str]:
    parts = [text(left, TOP - 14, title, 14)]
    for layer in range(LAYERS):
        y = TOP + (LAYERS - 1 - layer) * CELL
        for token in range(PROMPT + DECODED):
            x = left + token * CELL + (6 if token >= PROMPT else 0)
            parts.append(cell(x, y, colour(layer, token, pruned)))
    bottom = TOP + LAYERS * CELL + 14
    parts.append(text(left, bottom, "prompt tokens"))
    parts.append(text(left + PROMPT * CELL + 6, bottom, "new"))
    return parts


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg")
    width, height = LEFT + 2 * PANEL - 30, TOP + LAYERS * CELL + 62
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        text(LEFT - 8, TOP + 11, f"layer {LAYERS - 1}", 11, "end"),
        text(LEFT - 8, TOP + (LAYERS - 1) * CELL + 11, "layer 0", 11, "end"),
        *panel(LEFT, "stock prefill", pruned=False),
        *panel(LEFT + PANEL, "POP, a third omitted", pruned=True),
    ]
    x, y = LEFT, height - 24
    for fill, label in LEGEND:
        parts += [cell(x, y, fill), text(x + CELL + 3, y + 11.5, label)]
        x += 44 + 6 * len(label)
    parts.append("</svg>")
    out.write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
