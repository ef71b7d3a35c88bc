"""Format the cells of ``bench/serve.py`` as tables."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import table
from bench.serving.figures import ARMS, Cell


def cells_text(cells: Sequence[Cell]) -> str:
    """Format all cells: processor time, time to first token, and throughput with decoding."""
    parts = [
        "processor time of the server a request",
        _costs(cells, "processor_s", 1.0, "s"),
        "time to first token, median of the requests of a round",
        _costs(cells, "ttft_s", 1e3, "ms"),
        "percentiles of the time to first token over all rounds; throughput; time per output token; end to end",
        _load(cells),
    ]
    failed = [f"failed: {_name(cell)}: {cell.failed}" for cell in cells if cell.failed]
    return "\n\n".join(parts) + "".join(f"\n{line}" for line in failed)


def _name(cell: Cell) -> str:
    return f"{cell.request.concurrency} x {cell.request.tokens} -> {cell.request.output_tokens}"


def _costs(cells: Sequence[Cell], name: str, scale: float, unit: str) -> str:
    header = ["requests at once x tokens", f"plain {unit}", f"POP {unit}", "ratio", "IQR"]
    header += ["ceiling", "of ceiling", "roofline", "of roofline"]
    return table(header, [_cost_row(cell, name, scale) for cell in cells])


def _cost_row(cell: Cell, name: str, scale: float) -> list[str]:
    ratio = None if cell.failed else cell.ratio(name)
    if ratio is None:
        return [_name(cell), "failed"]
    medians = [summary.median * scale for arm in ARMS if (summary := cell.summary(arm, name))]
    return [
        _name(cell),
        *(f"{value:,.3f}" if scale == 1.0 else f"{value:,.1f}" for value in medians),
        f"{ratio.median:.3f}x",
        f"{ratio.spread.q3 - ratio.spread.q1:.3f}",
        _times(cell.ceiling(name)),
        _percent(cell.share(name)),
        _times(cell.ceiling(name, "roofline")),
        _percent(cell.share(name, "roofline")),
    ]


def _load(cells: Sequence[Cell]) -> str:
    header = ["requests at once x tokens"]
    header += [
        f"{arm} {name}" for name in ("p50 ms", "p99 ms", "tokens/s", "req/s", "TPOT ms") for arm in ("plain", "POP")
    ]
    return table([*header, "TPOT ratio", "e2e ratio"], [_load_row(cell) for cell in cells])


def _load_row(cell: Cell) -> list[str]:
    if cell.failed:
        return [_name(cell), "failed"]
    cells = [f"{1e3 * cell.ttft_percentile(arm, share):,.1f}" for share in (0.5, 0.99) for arm in ARMS]
    for name, scale, digits in (("prompt_tokens_per_s", 1.0, 0), ("requests_per_s", 1.0, 2), ("tpot_s", 1e3, 1)):
        for arm in ARMS:
            summary = cell.summary(arm, name)
            cells.append("-" if summary is None else f"{scale * summary.median:,.{digits}f}")
    ratios = [cell.ratio(name) for name in ("tpot_s", "e2e_s")]
    return [_name(cell), *cells, *(_times(ratio.median if ratio else None) for ratio in ratios)]


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}x"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
