"""Print a comparison with other engines as a table, and convert it to JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from bench.arms import HF_EAGER, NATIVE_FULL, plan_name
from bench.engines.comparison import INT8, OURS, PeerArm, PeerCase, largest_error
from bench.measure import Summary, paired_ratio
from bench.report import table
from bench.shapes import spec_facts

_MIB = 2**20


def baselines(case: PeerCase) -> list[PeerArm]:
    """Return the arms of pop_ext that the others are compared with: full depth, the first plan, and both in int8."""
    plain = [NATIVE_FULL, *(plan_name(plan) for plan in case.engines.plans[:1])]
    arms = {arm.name: arm for arm in case.arms if arm.peer in OURS and _has_samples(arm)}
    return [arms[name] for name in (*plain, *(f"{name} {INT8}" for name in plain)) if name in arms]


def fastest_quantised(case: PeerCase) -> dict[int, PeerArm]:
    """Return bits of the weights -> the arm of another engine with such weights and the least median."""
    found: dict[int, PeerArm] = {}
    for arm in case.arms:
        if arm.bits is None or arm.peer in OURS or not _has_samples(arm):
            continue
        best = found.get(arm.bits)
        if best is None or Summary.of(arm.samples).median < Summary.of(best.samples).median:
            found[arm.bits] = arm
    return dict(sorted(found.items(), reverse=True))


def _has_samples(arm: PeerArm) -> bool:
    return bool(arm.samples) and not arm.failed


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
        _limits_text(case),
        "peak: what the process of the engine held during a prefill, weights and K/V cache included",
    ]
    lines += _fastest_lines(case, natives)
    lines += [f"not measured: {name}: {why}" for name, why in case.missing.items()]
    lines += [f"{arm.name}: {arm.what}" for arm in case.arms]
    for engine in case.started:
        packages = ", ".join(f"{name} {version}" for name, version in engine.versions.items())
        lines.append(f"{engine.peer}: {packages}; loaded in {engine.seconds:.0f} s")
    return "\n".join(lines)


def _limits_text(case: PeerCase) -> str:
    """Say up to which error an arm at full depth counts as right, for each kind of weights in the case."""
    kinds = sorted({arm.bits for arm in case.arms}, key=lambda bits: bits or 0)
    limits = [
        f"{100 * largest_error(bits):.0f} %" + (f" with {bits}-bit weights" if bits is not None else "")
        for bits in kinds
    ]
    return f"an arm at full depth has failed above an error of {', '.join(limits)}"


def _fastest_lines(case: PeerCase, natives: list[PeerArm]) -> list[str]:
    """Compare the fastest engines with quantised weights with pop_ext's arms in int8."""
    ours = [arm for arm in natives if arm.bits is not None]
    lines = []
    for bits, arm in fastest_quantised(case).items() if ours else ():
        ratios = ", ".join(f"{_ratio_text(arm, native)} by {native.name}" for native in ours)
        lines.append(f"fastest other engine with {bits}-bit weights: {arm.name}, {ratios}")
    return lines


def _ratio_text(arm: PeerArm, native: PeerArm) -> str:
    item = ratio(arm, native)
    return f"{item['of_medians']:.2f}x ({item['paired']:.2f}x)"


def _cells(arm: PeerArm, natives: list[PeerArm]) -> list[str]:
    if arm.failed or not arm.samples:
        return [arm.name, f"failed: {arm.failed}"]
    summary = Summary.of(arm.samples)
    return [
        arm.name,
        f"{1e3 * summary.median:.1f}",
        f"{1e3 * (summary.q3 - summary.q1):.1f}",
        f"{1e3 * summary.minimum:.1f}",
        *(_ratio_text(arm, native) for native in natives),
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
        "fastest_quantised": {str(bits): arm.name for bits, arm in fastest_quantised(case).items()},
        "not_measured": case.missing,
    }


def _arm_json(arm: PeerArm, natives: list[PeerArm]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": arm.name,
        "engine": arm.peer,
        "what": arm.what,
        "flops": arm.flops,
        "weight_bits": arm.bits,
        "failed": arm.failed,
        "samples_s": arm.samples,
        "warmup_s": list(arm.warmup),
        "logits_error": arm.error,
        "same_token": arm.same_token,
        "peak": arm.peak,
    }
    if not _has_samples(arm):
        return facts
    summary = {f"{name}_s": value for name, value in asdict(Summary.of(arm.samples)).items() if name != "repeats"}
    return {**facts, **summary, "times_as_long_as": {native.name: ratio(arm, native) for native in natives}}
