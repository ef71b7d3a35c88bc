"""Measure what plans cost on the real model, and what fits win back: ``python examples/real_model/quality.py``.

Each count of omitted layers is measured unfitted, with a ridge fit, and distilled with and without retrieval tasks, on
held-out texts of every domain. Fits of all counts and the samples of each arm are kept in the output folder, where a
stopped run goes on. ``--fit-only`` ends after the fits, so that several processes can make them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from model import fetch_model
from pop_ext import Plan, env_info, fit, importance
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
    time_plans,
)
from pop_ext.evaluation.prompts import Texts, calibration_batches, texts_before_holdout
from pop_ext.evaluation.timing import NATIVE_FULL, median_ms, speed_range
from texts import Domain, fetch_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

CONTEXT, CONTINUATION = 512, 64
CALIBRATED = ("prose", "code")
"""Domains that the fits read. The others are measured only."""
_FIGURES = {"delta_loss": "loss", "kl": "KL", "exact": "exact", "delta_exact": "exact to full"}
SECOND_TURN = "second-turn"
FITS = ("ridge", "distill", "distill-text")


def main() -> None:
    """Fit, measure and print."""
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    folder = fetch_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    domains, missing = fetch_texts()
    for line in missing:
        print(line, file=sys.stderr)
    calibration = _Calibration(domains, tokenizer, arguments)
    plans = _plain_plans(model, calibration, arguments)
    for name in arguments.fits:
        fitted = calibration.fitted(model, plans, name, arguments.out)
        plans |= {f"{name}-{key}": plan for key, plan in fitted.items()}
    if arguments.fit_only:
        return
    boundaries = (1, *arguments.boundaries)
    every = [plan.replace(boundary=rows) for plan in plans.values() for rows in boundaries]
    for name, sets in _sets(domains, tokenizer, arguments).items():
        path = arguments.out / f"{name}.json"
        how = {"greedy_tokens": arguments.greedy, "batch_size": 4, "reuse_states": True}
        kinds = ["pop", "pop-fitted", *arguments.ablations]
        _print(name, evaluate(model, sets, every, kinds=kinds, **how, resume=path, progress=True))

    if arguments.times:
        _time(model, list(plans.values()), arguments)


def _time(model: Any, plans: list[Plan], arguments: Any) -> None:
    """Time unfitted and fitted plans in one run, write all rounds to ``times.json`` and print medians."""
    times = time_plans(model, plans, arguments.times, fits=True, repeats=11, progress=True)
    facts = {"processor": env_info.processor(), "threads": torch.get_num_threads(), **env_info.installation()}
    (arguments.out / "times.json").write_text(json.dumps({"facts": facts, "times": times}, indent=1))
    print_times(times)


def print_times(times: list[dict[str, Any]]) -> None:
    """Print medians of the time to the first token, and speed-ups over the native full prefill."""
    for length in sorted({one["tokens"] for one in times}):
        print(f"\n| {length} tokens | ms, median | times as fast as {NATIVE_FULL} (quartiles) |\n|---|---|---|")
        for arm in dict.fromkeys(one["arm"] for one in times):
            speed = speed_range(times, arm, length)
            if speed is not None:
                quartiles = f"{speed.median:.3f} ({speed.low:.3f} to {speed.high:.3f})"
                print(f"| {arm} | {median_ms(times, arm, length):.1f} | {quartiles} |")


def _plain_plans(model: Any, calibration: _Calibration, arguments: Any) -> dict[str, Plan]:
    """Return the unfitted plans by name: the deepest layers of each count, and other choices if asked for."""
    depth = model.config.num_hidden_layers
    plans = {str(count): Plan.last(depth, count) for count in arguments.counts}
    if arguments.choices:
        some = calibration.batches[::2]
        scores = importance(model, some, progress=True, resume=arguments.out / "importance.json")
        for count in arguments.counts:
            plans[f"{count}-interleaved"] = Plan(depth, tuple(range(depth + 1 - 2 * count, depth, 2)))
            plans[f"{count}-gates"] = scores.plan(count, contiguous=False)
            plans[f"{count}-gates-run"] = scores.plan(count)
    kept: dict[tuple[int, ...], str] = {}
    return {name: plan for name, plan in plans.items() if kept.setdefault(plan.omit, name) == name}


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/real_model"), help="folder of fits and results")
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 5, 8, 10, 12, 15], help="omitted layers")
    parser.add_argument("--boundaries", type=int, nargs="*", default=[64], help="beside 1")
    parser.add_argument("--fits", nargs="*", choices=FITS, default=FITS)
    parser.add_argument("--choices", action="store_true", help="also layers chosen by gates, and every other layer")
    parser.add_argument("--fit-only", action="store_true", help="measure nothing")
    parser.add_argument("--ablations", nargs="*", default=[], help="such as no-kv and dropped")
    parser.add_argument("--sequences", type=int, default=112, help="calibration sequences of 576 tokens")
    parser.add_argument("--tasks", type=int, default=96, help="retrieval tasks for distill")
    parser.add_argument("--steps", type=int, default=120, help="training steps")
    parser.add_argument(
        "--prompts", type=int, default=48, help="held-out prompts of each set; of second turns twice as many"
    )
    parser.add_argument("--retrieval", type=int, nargs="*", default=[512, 2000], help="lengths of retrieval prompts")
    parser.add_argument("--greedy", type=int, default=0, help="greedy tokens to compare")
    parser.add_argument("--domains", nargs="*", help="domains to measure; all if not given")
    parser.add_argument("--times", type=int, nargs="*", default=[], help="prompt lengths to time")
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

    def fitted(self, model: Any, plans: dict[str, Plan], name: str, out: Path) -> dict[str, Plan]:
        """Return plans with the fit called ``name``, from their files if they were made before."""
        paths = {key: out / f"{name}-{key}" / "plan.json" for key in plans if plans[key].projections is None}
        missing = [key for key, path in paths.items() if not path.exists()]
        if missing:
            print(f"{name} of {', '.join(missing)}", file=sys.stderr)
            more: dict[str, Any] = {"lambdas": [0.01], "holdout": self.holdout}
            if name != "ridge":
                more |= {"method": "distill", "steps": self.steps}
            if name != "distill-text":
                more["tasks"] = self.tasks
            for key, plan in zip(
                missing, fit(model, [plans[key] for key in missing], self.batches, progress=True, **more), strict=True
            ):
                paths[key].parent.mkdir(parents=True, exist_ok=True)
                plan.save(paths[key])
        return {key: Plan.load(path) for key, path in paths.items()}


def _sets(domains: dict[str, Domain], tokenizer: Any, arguments: Any) -> dict[str, list[PromptSet]]:
    """Return the sets of prompts by the name of their result file."""
    limits = {"samples": arguments.prompts}
    sets = {
        name: text_sets(read_texts(domain.heldout, tokenizer), tokenizer, [CONTEXT], CONTINUATION, arguments.prompts)
        for name, domain in domains.items()
        if arguments.domains is None or name in arguments.domains
    }
    texts = read_texts(domains[next(iter(domains))].heldout, tokenizer)
    for length in arguments.retrieval:
        sets[f"retrieval-{length}"] = retrieval_sets(texts, tokenizer, [length], **limits)
    if arguments.retrieval:
        twice = 2 * arguments.prompts  # answers to second questions vary the most
        sets[SECOND_TURN] = second_turn_sets(texts, tokenizer, [min(arguments.retrieval)], samples=twice)
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
