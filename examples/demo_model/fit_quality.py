"""Measure how much of pruning's loss `pop_ext.fit` recovers: ``python examples/demo_model/fit_quality.py``.

The fit uses windows of training files, and chooses lambda on training files that it does not fit to. The loss is
measured on held-out files, which neither the model nor the fit has seen. Each window is a prompt and its continuation;
the loss of the continuation is compared with that at full depth, window by window.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import pop_ext
import torch
from data import SourceFile, split, stdlib_files
from pop_ext import Plan
from pop_ext.plans.projections import FitReport
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = Path(__file__).parent / "model"
HOLDOUT_FILES = 8  # every eighth training file is for the choice of lambda


def windows(files: list[SourceFile], tokenizer: Any, length: int, limit: int | None) -> Tensor:
    """Cut files into windows, and return a fixed random choice of them, int64 [windows, length]."""
    found: list[Tensor] = []
    for file in files:
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(file.text, verbose=False)["input_ids"]])
        if len(ids) >= length:
            found += ids.unfold(0, length, length)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.stack([found[i] for i in order[:limit]])


@torch.no_grad()
def losses(model: Any, plan: Plan, ids: Tensor, continuation: int) -> Tensor:
    """Return the loss of each window's continuation under the plan in nats a token, [windows] float64."""
    with pop_ext.enabled(model, plan):
        scores = pop_ext.score(model, list(ids[:, :-continuation]), list(ids[:, -continuation:]))
    return -torch.tensor([score.log_likelihood for score in scores], dtype=torch.float64) / continuation


def mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def row(plan: Plan, report: FitReport, pop: Tensor, fitted: Tensor) -> dict[str, Any]:
    """Print a row of the table, and return its JSON values; losses are differences to full depth."""
    values = {"pop": pop, "fitted": fitted, "difference": fitted - pop}
    found = {name: mean_and_error(value) for name, value in values.items()}
    shown = " | ".join(f"{mean:+.4f} ({error:.4f})" for mean, error in found.values())
    omitted = f"{len(plan.omit)}/{plan.num_layers} | {plan.boundary}"
    won = 1 - float(fitted.mean() / pop.mean())
    print(f"| {omitted} | {report.weighting} | {report.ridge:g} | {shown} | {won:.0%} |", flush=True)
    return {"omitted": len(plan.omit), "boundary": plan.boundary, "fit": report.to_dict(), **found}


def main() -> int:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description="Loss of POP on the demo model, fitted and not.")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a window, continuation included")
    parser.add_argument("--continuation", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=256, help="windows to fit on")
    parser.add_argument("--holdout", type=int, default=64, help="windows for the choice of lambda")
    parser.add_argument("--windows", type=int, default=None, help="held-out windows; by default all")
    parser.add_argument("--omit", type=int, nargs="+", default=[4, 6], help="omit the OMIT deepest layers; each a plan")
    parser.add_argument("--boundary", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument(
        "--weighting", nargs="+", default=["attention", "uniform"], help="weightings of calibration rows"
    )
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    train, held_out, _ = split(stdlib_files())
    train = [file for file in train if file.weight == 1.0]
    chosen = [file for number, file in enumerate(train) if number % HOLDOUT_FILES == 0]
    fitted_on = [file for number, file in enumerate(train) if number % HOLDOUT_FILES]
    calibration = windows(fitted_on, tokenizer, options.tokens, options.calibration).split(8)
    holdout = windows(chosen, tokenizer, options.tokens, options.holdout).split(8)
    ids = windows(held_out, tokenizer, options.tokens, options.windows)

    depth = model.config.num_hidden_layers
    full = losses(model, Plan(depth, ()), ids, options.continuation)
    report: dict[str, Any] = {"options": {name: str(value) for name, value in vars(options).items() if name != "json"}}
    report |= {"windows": len(ids), "full": mean_and_error(full), "rows": []}
    print(f"{len(ids)} windows; at full depth {full.mean():.4f} nats a token")
    print("| omitted | boundary | rows by | lambda | POP | fitted | fitted less POP | won back |")
    print("|---|---|---|---|---|---|---|---|")
    for count in options.omit:
        plans = [Plan.last(depth, count, boundary=boundary) for boundary in options.boundary]
        unfitted = [losses(model, plan, ids, options.continuation) - full for plan in plans]
        for weighting in options.weighting:
            how = {"holdout": holdout, "weighting": weighting, "progress": sys.stderr.isatty()}
            projections = pop_ext.fit(model, plans[0], calibration, **how).projections
            assert projections is not None
            for plan, pop in zip(plans, unfitted, strict=True):
                fit = losses(model, plan.replace(projections=projections), ids, options.continuation) - full
                report["rows"].append(row(plan, projections.report, pop, fit))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
