"""Measure what plans cost on the real model, and what fits win back: ``python examples/real_model/quality.py``.

Each count of omitted layers is measured unfitted, with a ridge fit, and distilled with and without retrieval tasks, on
held-out texts of every domain. Fits and samples are kept in the output folder, and a stopped run goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from model import fetch_model
from pop_ext import Plan, fit
from pop_ext.evaluation import (
    TRAINING,
    Evaluation,
    PromptSet,
    evaluate,
    read_texts,
    retrieval_pairs,
    retrieval_sets,
    second_turn_sets,
    text_sets,
)
from pop_ext.evaluation.prompts import Texts, calibration_batches, texts_before_holdout
from texts import Domain, fetch_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

CONTEXT, CONTINUATION = 512, 64
CALIBRATED = ("prose", "code")
"""Domains that the fits read. The others are measured only."""
_FIGURES = {"delta_loss": "loss", "kl": "KL", "exact": "exact", "delta_exact": "exact to full"}
FITS = ("ridge", "distill", "distill-text")


def main() -> None:
    """Fit, measure and print."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    folder = fetch_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    domains, missing = fetch_texts()
    for line in missing:
        print(line, file=sys.stderr)
    calibration = _Calibration(domains, tokenizer, arguments)
    depth, plans = model.config.num_hidden_layers, []
    for count in arguments.counts:
        plain = Plan.last(depth, count)
        plans += [plain.replace(boundary=rows) for rows in (1, *arguments.boundaries)]
        for name in arguments.fits:
            plans.append(calibration.fitted(model, plain, name, arguments.out / f"{name}-{count}" / "plan.json"))
    for name, sets in _sets(domains, tokenizer, arguments).items():
        path = arguments.out / f"{name}.json"
        kinds = ["pop", "pop-fitted", *arguments.ablations]
        result = evaluate(
            model,
            sets,
            plans,
            kinds=kinds,
            greedy_tokens=0,
            batch_size=4,
            resume=path,
            progress=True,
            reuse_states=True,
        )
        _print(name, result)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/real_model"), help="folder of fits and results")
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 5, 8, 10, 12, 15], help="omitted layers")
    parser.add_argument("--boundaries", type=int, nargs="*", default=[64], help="of unfitted plans, beside 1")
    parser.add_argument("--fits", nargs="*", choices=FITS, default=FITS)
    parser.add_argument("--ablations", nargs="*", default=[], help="such as no-kv and dropped")
    parser.add_argument("--sequences", type=int, default=112, help="calibration sequences of 576 tokens")
    parser.add_argument("--tasks", type=int, default=96, help="retrieval tasks for distill")
    parser.add_argument("--steps", type=int, default=120, help="training steps")
    parser.add_argument("--prompts", type=int, default=48, help="held-out prompts of each set")
    parser.add_argument("--retrieval", type=int, nargs="*", default=[512, 2000], help="lengths of retrieval prompts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


class _Calibration:
    """Sequences and tasks of the calibration files."""

    def __init__(self, domains: dict[str, Domain], tokenizer: Any, arguments: Any) -> None:
        used = {name: domains[name].calibration for name in CALIBRATED if name in domains}
        window = CONTEXT + CONTINUATION
        self.steps = arguments.steps
        each = arguments.sequences // len(used)
        kept = max(1, each // 8)  # judges lambda and the steps
        self.batches, self.holdout, before = [], [], []
        for files in used.values():
            texts = read_texts(files, tokenizer)
            batches = calibration_batches(texts, tokenizer, window, each, batch=1)
            self.batches += batches[:-kept]
            self.holdout += batches[-kept:]
            before += texts_before_holdout(texts, tokenizer, window, each, kept).plain
        rest = Texts(tuple(before), ())
        self.tasks = retrieval_pairs(rest, tokenizer, CONTEXT, arguments.tasks, kind=TRAINING)

    def fitted(self, model: Any, plan: Plan, name: str, path: Path) -> Plan:
        """Return the plan with the fit called ``name``, from its file if it was made before."""
        if path.exists():
            return Plan.load(path)
        print(f"{name} of {len(plan.omit)} layers", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        more: dict[str, Any] = {"lambdas": [0.01], "holdout": self.holdout}
        if name != "ridge":
            more |= {"method": "distill", "steps": self.steps, "resume": path.with_name("state.pt")}
        if name == "distill":
            more["tasks"] = self.tasks
        found = fit(model, plan, self.batches, progress=True, **more)
        found.save(path)
        return found


def _sets(domains: dict[str, Domain], tokenizer: Any, arguments: Any) -> dict[str, list[PromptSet]]:
    """Return the sets of prompts by the name of their result file."""
    limits = {"samples": arguments.prompts}
    sets = {
        name: text_sets(read_texts(domain.heldout, tokenizer), tokenizer, [CONTEXT], CONTINUATION, arguments.prompts)
        for name, domain in domains.items()
    }
    texts = read_texts(domains[next(iter(domains))].heldout, tokenizer)
    for length in arguments.retrieval:
        sets[f"retrieval-{length}"] = retrieval_sets(texts, tokenizer, [length], **limits)
    if arguments.retrieval:
        sets["second-turn"] = second_turn_sets(texts, tokenizer, [min(arguments.retrieval)], **limits)
    return sets


def _print(name: str, result: Evaluation) -> None:
    print(f"\n{name}: mean (standard error), paired with full depth")
    for row in result.summary():
        figures = [
            f"{title} {row[key].value:+.4f} ({row[key].error:.4f})" for key, title in _FIGURES.items() if key in row
        ]
        print(f"  {row['arm']:32} {', '.join(figures)}")


if __name__ == "__main__":
    main()
