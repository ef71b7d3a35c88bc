"""Print a comparison with other engines as a table, and convert it to JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from bench.arms import HF_EAGER, NATIVE_FULL, plan_name
from bench.engines.comparison import PeerArm, PeerCase
from bench.measure import Summary, paired_ratio
from bench.report import table
from bench.shapes import spec_facts

_MIB = 2**20


def baselines(case: PeerCase) -> list[PeerArm]:
    """Return the arms of pop_ext that the others are compared with: full depth, and the first plan."""
    names = [NATIVE_FULL, *(plan_name(plan) for plan in case.engines.plans[:1])]
    return [arm for arm in case.arms if arm.name in names and arm.samples and not arm.failed]


def ratio(arm: PeerArm, native: PeerArm) -> dict[str, float]:
    """Return an arm's time relative to an arm of pop_ext: ratio of medians, and median of the ratios of rounds."""
    medians = [Summary.of(item.samples).median for item in (arm, native)]
    return {"of_medians": medians[0] / medians[1], "paired": paired_ratio(arm.samples, native.samples)}


def case_text(case: PeerCase) -> str:
    """Format the results at one length: a table, the engines that are missing, and how each arm is called."""
    engines, natives = case.engines, baselines(case)
    header = ["arm", "median ms", "IQR", "min", *(f"by {arm.name}" for arm in natives)]
    header += ["GFLOP/s", "same token", "error", "peak MiB"]
    dtype, threads = engines.options.dtype, len(engines.cpus)
    lines = [
        f"{engines.model}, {case.tokens} tokens, {dtype}, {engines.origin} weights, {threads} threads; "
        f"{case.rounds} rounds",
        "",
        *(f"warning: {warning}" for warning in case.warnings),
        table(header, [_cells(arm, natives) for arm in case.arms]),
        "",
        "by X: times as long as X (medians; in brackets the median of each round's ratio)",
        f"same token, error: most probable token, and log-probabilities, against {HF_EAGER}'s (RMS by their spread)",
        "peak: what the process of the engine held during a prefill, weights and K/V cache included",
    ]
    lines += [f"not measured: {name}: {why}" for name, why in case.missing.items()]
    lines += [f"{arm.name}: {arm.what}" for arm in case.arms]
    for engine in case.started:
        packages = ", ".join(f"{name} {version}" for name, version in engine.versions.items())
        lines.append(f"{engine.peer}: {packages}; loaded in {engine.seconds:.0f} s")
    return "\n".join(lines)


def _cells(arm: PeerArm, natives: list[PeerArm]) -> list[str]:
    if arm.failed or not arm.samples:
        return [arm.name, f"failed: {arm.failed}"]
    summary = Summary.of(arm.samples)
    ratios = [ratio(arm, native) for native in natives]
    return [
        arm.name,
        f"{1e3 * summary.median:.1f}",
        f"{1e3 * (summary.q3 - summary.q1):.1f}",
        f"{1e3 * summary.minimum:.1f}",
        *(f"{item['of_medians']:.2f}x ({item['paired']:.2f}x)" for item in ratios),
        f"{arm.flops / summary.median / 1e9:,.0f}",
        {True: "yes", False: "no", None: "-"}[arm.same_token],
        "-" if arm.error is None else f"{100 * arm.error:.2f} %",
        f"{arm.peak / _MIB:,.0f}" if arm.peak else "-",
    ]


def case_json(case: PeerCase) -> dict[str, Any]:
    """Return the results at one length as JSON values, with every sample."""
    engines, natives = case.engines, baselines(case)
    return {
        "model": engines.model,
        "weights": engines.origin,
        "spec": spec_facts(engines.spec),
        "dtype": engines.options.dtype,
        "tokens": case.tokens,
        "threads": len(engines.cpus),
        "rounds": case.rounds,
        "warnings": case.warnings,
        "plans": [json.loads(plan.to_json()) for plan in engines.plans],
        "arms": [_arm_json(arm, natives) for arm in case.arms],
        "engines": [
            {
                "name": engine.peer,
                "versions": engine.versions,
                "resident": engine.resident,
                "load_s": engine.seconds,
            }
            for engine in case.started
        ],
        "not_measured": case.missing,
    }


def _arm_json(arm: PeerArm, natives: list[PeerArm]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": arm.name,
        "engine": arm.peer,
        "what": arm.what,
        "flops": arm.flops,
        "failed": arm.failed,
        "samples_s": arm.samples,
        "warmup_s": list(arm.warmup),
        "logits_error": arm.error,
        "same_token": arm.same_token,
        "peak": arm.peak,
    }
    if arm.failed or not arm.samples:
        return facts
    summary = {f"{name}_s": value for name, value in asdict(Summary.of(arm.samples)).items() if name != "repeats"}
    return {**facts, **summary, "times_as_long_as": {native.name: ratio(arm, native) for native in natives}}
