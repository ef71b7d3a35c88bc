"""Format results as tables, and convert them to JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.arms import Arm
from bench.cases import Case, Comparison
from bench.kernel_table import KernelTable, Row
from bench.measure import Summary, Timed
from bench.shapes import spec_facts

SCHEMA = 1
_MIB = 2**20


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table: the first column is left-aligned, the others right-aligned.

    A row of two cells is a name and a sentence; the sentence may span the other columns.
    """
    full = [row for row in rows if len(row) == len(header)]
    widths = [max(len(row[i]) for row in [header, *full]) for i in range(len(header))]
    widths[0] = max(widths[0], *(len(row[0]) for row in rows)) if rows else widths[0]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    body = [line(row) if len(row) == len(header) else f"{row[0].ljust(widths[0])}  {row[1]}" for row in rows]
    return "\n".join([line(header), rule, *body])


def environment_text(facts: dict[str, Any]) -> str:
    """Format the environment for the head of a report."""
    commit = facts["git_commit"] or "unknown commit"
    modified = ", modified" if facts["git_modified"] else ""
    lines = [
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, {facts['isa']} kernels",
        f"pop_ext {facts['pop_ext']} ({commit}{modified}), torch {facts['torch']}, "
        f"transformers {facts['transformers']}, Python {facts['python']}",
    ]
    if facts["device"] != "cpu":
        lines.insert(0, f"{facts['device']}, {facts['device_memory_gib']} GiB, CUDA {facts['cuda']}")
    load = facts["load_average"]
    if load is not None and load > 0.5:
        lines.append(
            f"warning: the machine was busy before the run (load average {load}); ratios hold better than times"
        )
    return "\n".join(lines)


def case_text(case: Case) -> str:
    """Format a case: its table, comparisons, memory and warnings."""
    baseline = case.baseline()
    against = baseline.name if baseline else "baseline"
    header = ["arm", "median ms", "IQR", "min", f"vs {against}", "paired", "ceiling", "of ceiling"]
    header += ["roofline", "of roofline", "GFLOP/s", "of GEMM", "extra MiB"]
    lines = [f"{case.title}, {case.model.weights} weights; {case.rounds} rounds", ""]
    if case.model.note:
        lines.insert(1, f"note: {case.model.note}")
    lines += [f"warning: {warning}" for warning in case.warnings]
    lines.append(table(header, [_arm_cells(case, arm, baseline) for arm in case.arms]))
    lines += ["", *_comparison_lines(case, baseline), *_memory_lines(case), _gemm_line(case)]
    lines += [f"{arm.name}: {arm.what}" for arm in case.arms]
    return "\n".join(lines)


def length_text(cases: Sequence[dict[str, Any]], model: str) -> str:
    """Format the results of a model by length and batch size.

    A row has the median of hf-eager and the paired speed-up of every other arm. Takes the cases as JSON values.
    """
    of_model = [case for case in cases if case["model"] == model]
    names = list(dict.fromkeys(arm["name"] for case in of_model for arm in case["arms"]))
    rows = []
    for case in sorted(of_model, key=lambda case: (case["batch"], case["tokens"])):
        arms = {arm["name"]: arm for arm in case["arms"] if not arm["failed"]}
        stock = arms.get(names[0])
        cells = [f"{case['batch']} x {case['tokens']}"]
        for name in names:
            if stock is None or name not in arms:
                cells.append("-")
            elif name == names[0]:
                cells.append(f"{1e3 * statistics.median(stock['samples_s']):.1f} ms")
            else:
                pairs = zip(stock["samples_s"], arms[name]["samples_s"], strict=True)
                cells.append(f"{statistics.median(theirs / ours for theirs, ours in pairs):.2f}x")
        rows.append(cells)
    return table(["batch x tokens", *names], rows)


def _arm_cells(case: Case, arm: Arm, baseline: Arm | None) -> list[str]:
    if arm.failed or not arm.samples:
        return [arm.name, f"failed: {arm.failed}"]
    summary = Summary.of(arm.samples)
    against = case.compare(arm, baseline) if baseline is not None else None
    rate = arm.flops / summary.median
    return [
        arm.name,
        f"{1e3 * summary.median:.1f}",
        f"{1e3 * (summary.q3 - summary.q1):.1f}",
        f"{1e3 * summary.minimum:.1f}",
        *([f"{against.speedup:.2f}x", f"{against.paired:.2f}x"] if against else ["-", "-"]),
        *([f"{against.ceiling:.2f}x", _percent(against.share)] if against else ["-", "-"]),
        *_roofline_cells(against),
        f"{rate / 1e9:,.0f}",
        _percent(rate / case.peak if case.peak else None),
        f"{arm.memory.working / _MIB:.1f}" if arm.memory else "-",
    ]


def _roofline_cells(comparison: Comparison | None) -> list[str]:
    if comparison is None or comparison.roofline is None:
        return ["-", "-"]
    return [f"{comparison.roofline:.2f}x", _percent(comparison.share_of_roofline)]


def _comparison_lines(case: Case, baseline: Arm | None) -> list[str]:
    """Format the comparisons that are not in the table."""
    shown = baseline.name if baseline else None
    return [_comparison_line(comparison) for comparison in case.comparisons() if comparison.baseline != shown]


def _comparison_line(comparison: Comparison) -> str:
    return (
        f"{comparison.arm} against {comparison.baseline}: {comparison.speedup:.2f}x (paired {comparison.paired:.2f}x), "
        f"ceiling {comparison.ceiling:.2f}x, {_percent(comparison.share)} of it"
        + ("" if comparison.roofline is None else f"; roofline {comparison.roofline:.2f}x, ")
        + ("" if comparison.roofline is None else f"{_percent(comparison.share_of_roofline)} of it")
    )


def _memory_lines(case: Case) -> list[str]:
    known = [arm for arm in case.arms if arm.memory is not None]
    if not known:
        return []
    folded = ", ".join(f"{arm.name} {arm.folded_bytes / _MIB:.1f}" for arm in known if arm.folded_bytes is not None)
    caches = sorted({arm.memory.kv_cache for arm in known if arm.memory})
    return [
        f"MiB: extra is the peak of one call above what was resident, without the K/V cache "
        f"({' or '.join(f'{size / _MIB:.1f}' for size in caches)}); folded and copied weights: {folded or 'none'}"
    ]


def _gemm_line(case: Case) -> str:
    rates = [f"{gemm.name} {gemm.rate / 1e9:,.0f}" for gemm in case.gemms if gemm.rate is not None]
    failed = [f"{gemm.name} failed: {gemm.failed}" for gemm in case.gemms if gemm.failed]
    memory = "" if case.bandwidth is None else f"; memory {case.bandwidth / 1e9:,.1f} GB/s"
    return f"GEMM of this run, GFLOP/s: {', '.join([*rates, *failed])}; shares are of the best{memory}"


def kernel_text(kernels: KernelTable) -> str:
    """Format the kernel table."""
    header = ["kernel", "tokens", "us", "IQR", "rate", "unit", "of peak", "beside"]
    bandwidth = ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in kernels.bandwidth.items())
    peak = f"{kernels.peak / 1e9:,.0f} GFLOP/s" if kernels.peak else "unknown"
    return "\n".join(
        [
            f"kernels of {kernels.model}, batch 1, {kernels.dtype}, cold caches; {kernels.repeats} rounds",
            f"peak: best matrix product below {peak}; memory {bandwidth}",
            *(f"warning: {warning}" for warning in kernels.warnings),
            "",
            table(header, [_kernel_cells(kernels, row) for row in kernels.rows]),
        ]
    )


def _kernel_cells(kernels: KernelTable, row: Row) -> list[str]:
    if row.failed or not row.samples:
        return [row.name, f"failed at {row.tokens} tokens: {row.failed}"]
    summary = Summary.of(row.samples)
    relative = kernels.relative(row)
    return [
        row.name,
        str(row.tokens),
        f"{1e6 * summary.median:,.0f}",
        f"{1e6 * (summary.q3 - summary.q1):,.0f}",
        f"{row.rate / 1e9:,.1f}" if row.rate is not None else "-",
        "GB/s" if row.flops is None else "GFLOP/s",
        _percent(kernels.share(row)),
        f"{relative:.2f}x {row.beside}" if relative is not None else "",
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def case_json(case: Case) -> dict[str, Any]:
    """Return a case as JSON values, with every sample."""
    baseline = case.baseline()
    return {
        "model": case.model.name,
        "weights": case.model.weights,
        "note": case.model.note,
        "spec": spec_facts(case.spec),
        "batch": case.batch,
        "tokens": case.tokens,
        "dtype": str(case.dtype).removeprefix("torch."),
        "rounds": case.rounds,
        "warnings": case.warnings,
        "gemm": [
            {"name": gemm.name, "m": gemm.m, "n": gemm.n, "k": gemm.k, **_timing(gemm, gemm.flops)}
            for gemm in case.gemms
        ],
        "gemm_peak_flop_per_s": case.peak,
        "arms": [_arm_json(case, arm) for arm in case.arms],
        "baseline": baseline.name if baseline else None,
        "bandwidth_bytes_per_s": case.bandwidth,
        "comparisons": [
            {**asdict(item), "share_of_ceiling": item.share, "share_of_roofline": item.share_of_roofline}
            for item in case.comparisons()
        ],
    }


def _arm_json(case: Case, arm: Arm) -> dict[str, Any]:
    timing = _timing(arm, arm.flops)
    rate = timing.get("flop_per_s")
    return {
        "name": arm.name,
        "what": arm.what,
        "plan": json.loads(arm.plan.to_json()) if arm.plan else None,
        "flops": arm.flops,
        **timing,
        "share_of_gemm": rate / case.peak if rate and case.peak else None,
        "warmup_s": list(arm.warmup),
        "memory": {**asdict(arm.memory), "working": arm.memory.working} if arm.memory else None,
        "folded_bytes": arm.folded_bytes,
        "logits_error": arm.error,
    }


def _timing(timed: Timed, flops: float | None) -> dict[str, Any]:
    if timed.failed or not timed.samples:
        return {"failed": timed.failed or "no sample", "samples_s": timed.samples}
    summary = {f"{name}_s": value for name, value in asdict(Summary.of(timed.samples)).items() if name != "repeats"}
    rate = {} if flops is None else {"flop_per_s": flops / summary["median_s"]}
    return {"failed": None, "samples_s": timed.samples, **summary, **rate}


def kernel_json(kernels: KernelTable) -> dict[str, Any]:
    """Return the kernel table as JSON values, with every sample."""
    return {
        "model": kernels.model,
        "dtype": kernels.dtype,
        "repeats": kernels.repeats,
        "warnings": kernels.warnings,
        "bandwidth_bytes_per_s": kernels.bandwidth,
        "gemm_peak_flop_per_s": kernels.peak,
        "rows": [
            {
                "name": row.name,
                "tokens": row.tokens,
                "flops": row.flops,
                "bytes": row.bytes,
                **_timing(row, row.flops),
                "bytes_per_s": row.rate if row.flops is None else None,
                "share_of_peak": kernels.share(row),
                "beside": row.beside,
                "times_as_fast": kernels.relative(row),
            }
            for row in kernels.rows
        ],
    }


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report; missing directories are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
