"""``pop-ext calibrate``: which layers to omit, chosen on one's own model and texts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from pop_ext.cli import shared
from pop_ext.cli.shared import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    TextOption,
    ThreadsOption,
    WindowOption,
)
from pop_ext.plans.plan import Plan

if TYPE_CHECKING:
    from pop_ext.methods.importance import Importance
    from pop_ext.methods.latency import BudgetedPlan


def calibrate(
    model: ModelArgument,
    text: TextOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan, as JSON; importance goes beside it.")],
    count: Annotated[int | None, typer.Option(help="How many layers to omit; by default a third.")] = None,
    budget_ms: Annotated[float | None, typer.Option(help="Or as few as a prefill within this time needs.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Or within the native full prefill's time by this.")] = None,
    budget_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that a budget is for.")] = 2048,
    free: Annotated[bool, typer.Option("--free", help="Each layer for itself, not consecutive ones.")] = False,
    boundary: Annotated[int, typer.Option(min=1, help="Last rows of a prompt at full depth.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Sequences at most.")] = 200,
    tokens: WindowOption = 256,
    branches: Annotated[bool, typer.Option("--branches", help="Score attention and MLP apart, too.")] = False,
    recompute: Annotated[bool, typer.Option("--recompute", help="Less memory, a third more time.")] = False,
    pays_from: Annotated[
        str, typer.Option(help="Prompt lengths to time for min_tokens, like 16,64,256; empty: min_tokens 0.")
    ] = "16,32,64,128,256,512,1024",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score layers by virtual gates, choose those to omit, and time from which prompt length on that pays.

    Beside the plan PLAN.json come PLAN.importance.json, which a stopped run goes on with, and PLAN.importance.png.
    """
    with shared.errors():
        given = {"--count": count, "--budget-ms": budget_ms, "--speedup": speedup}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)}: expected one of them")
        shared.set_threads(threads)
        with shared.loading(as_json):
            loaded = shared.load_model(model, dtype, device)
            tokenizer = shared.load_tokenizer(model)

        from pop_ext.evaluation import calibration_batches, read_texts
        from pop_ext.methods.importance import importance

        batches = calibration_batches(read_texts(text, tokenizer), tokenizer, tokens, samples)
        out.parent.mkdir(parents=True, exist_ok=True)
        beside, bar = out.with_suffix(".importance.json"), not as_json
        options: dict[str, Any] = {"branches": branches, "recompute": recompute, "resume": beside, "progress": bar}
        scores = importance(loaded, batches, **options)
        choose = functools.partial(scores.plan, contiguous=not free, boundary=boundary)
        chosen, budget = _chosen(loaded, choose, count, budget_ms, speedup, budget_tokens, bar)
        chosen = _with_min_tokens(loaded, chosen, shared.parse_numbers("--pays-from", pays_from), bar)
        chosen.save(out)
        plots = shared.draw(_draw, scores, out.with_suffix(".importance.png"))
    report = {
        "plan": str(out),
        "importance": str(beside),
        "plots": plots,
        "omit": list(chosen.omit),
        "boundary": chosen.boundary,
        "min_tokens": chosen.min_tokens,
        "origin": chosen.origin.to_dict() if chosen.origin else None,
        "budget": None if budget is None else {"seconds": budget.budget, "measured_seconds": budget.measured},
        "prefill": list(scores.prefill),
        "prefill_error": list(scores.prefill_error),
        "decode": list(scores.decode),
        "decode_error": list(scores.decode_error),
    }
    if as_json:
        shared.print_json(report)
    else:
        _print(scores, chosen, report)


def _chosen(
    model: Any, choose: Any, count: int | None, budget_ms: float | None, speedup: float | None, tokens: int, bar: bool
) -> tuple[Plan, BudgetedPlan | None]:
    if budget_ms is None and speedup is None:
        return choose(count), None

    from pop_ext.methods.latency import plan_within

    limit: dict[str, Any] = {"speedup": speedup} if budget_ms is None else {"seconds": budget_ms / 1e3}
    found = plan_within(model, choose, tokens=tokens, progress=bar, **limit)
    return found.plan, found


def _with_min_tokens(model: Any, plan: Plan, lengths: list[int], bar: bool) -> Plan:
    """Prompts shorter than where pruning pays run at full depth; where it never did, all that are not longer, too."""
    from pop_ext.evaluation.arms import backend_of
    from pop_ext.methods.latency import shortest_paying

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max(lengths, default=0)
    lengths = [length for length in lengths if length <= limit]
    if not lengths or not plan.omit or backend_of(model) != "native":
        return plan
    paying = shortest_paying(model, plan, lengths, progress=bar)
    return plan.replace(min_tokens=max(lengths) + 1 if paying is None else paying)


def _draw(scores: Importance, path: Path) -> list[str]:
    scores.plot(path)
    return [str(path)]


def _print(scores: Importance, plan: Plan, report: dict[str, Any]) -> None:
    console = Console()
    table = shared.new_table("layer", "prompt", "(error)", "what follows", "(error)", "omitted")
    columns = (scores.prefill, scores.prefill_error, scores.decode, scores.decode_error)
    for layer, values in enumerate(zip(*columns, strict=True)):
        table.add_row(str(layer), *(f"{value:.3g}" for value in values), "yes" if layer in plan.omit else "")
    console.print(table)
    if report["budget"] is not None:
        times = ", ".join(f"{n}: {1e3 * s:.1f} ms" for n, s in sorted(report["budget"]["measured_seconds"].items()))
        console.print(Text(f"prefill by omitted layers, median: {times}"))
    console.print(
        Text(
            f"omits layers {list(plan.omit)}, boundary {plan.boundary}, from {plan.min_tokens} tokens on "
            f"({scores.samples} samples)"
        )
    )
    for name in ("plan", "importance", "plots"):  # a console would break a long path
        print(f"{name}: {report[name] if isinstance(report[name], str) else ', '.join(report[name])}")
