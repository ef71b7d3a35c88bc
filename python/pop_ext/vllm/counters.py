"""Prometheus counters of pruned steps.

They live in the process that runs the model. A server that is started with ``PROMETHEUS_MULTIPROC_DIR`` set to an empty
folder shows them, summed over processes, at its ``/metrics``.
"""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter


@cache
def _counters() -> tuple[Counter, Counter, Counter, Counter]:
    return (
        Counter("pop_ext_pruned_steps", "Steps of the engine that skipped omitted layers for some rows"),
        Counter("pop_ext_context_rows", "Rows that skipped the omitted layers"),
        Counter("pop_ext_boundary_rows", "Rows of pruned steps that ran at full depth: boundary rows and decoding"),
        Counter("pop_ext_declined_steps", "Steps that prefilled at full depth: chunks below min_tokens"),
    )


def count_step(rows: int, boundary_rows: int) -> None:
    """Count a pruned step with so many rows, of which ``boundary_rows`` ran at full depth."""
    steps, context, boundary, _ = _counters()
    steps.inc()
    context.inc(rows - boundary_rows)
    boundary.inc(boundary_rows)


def count_declined() -> None:
    """Count a step that prefilled at full depth."""
    _counters()[3].inc()
