"""``pop-ext calibrate``: choose the layers to omit by their importance on given texts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from pop_ext.cli import options, output
from pop_ext.cli.budget import Budget, calibrate_within, check_options, plan_folder
from pop_ext.cli.options import (
    LAYERS,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    TextOption,
    ThreadsOption,
)
from pop_ext.plans.plan import Plan

if TYPE_CHECKING:
    from pop_ext.methods.importance import Importance
    from pop_ext.methods.latency import BudgetedPlan

QUALITY = "Budget of quality"
"""Panel of a command's help."""
SAMPLES, TOKENS = 200, 256
"""Sequences to score, and their length, by default."""
STATE = ".importance.json"
_PAYS_FROM = "16,32,64,128,256,512,1024"


def calibrate(
    context: typer.Context,
    model: ModelArgument,
    text: TextOption,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Plan file to write, as JSON. With a budget of quality: the folder of the plan and its card.",
            metavar="FILE",
        ),
    ],
    samples: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Sequences of the texts to score or to fit on, at most. Default: 200; 112 with a budget of quality.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=4,
            help="Length of each sequence, in tokens; with a budget of quality, of the prompts that are measured. "
            "Default: 256; 512 with a budget of quality.",
        ),
    ] = None,
    branches: Annotated[
        bool, typer.Option("--branches", help="Also score the attention and the MLP of each layer separately.")
    ] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Recompute activations: less memory, about a third more time.")
    ] = False,
    pays_from: Annotated[
        str,
        typer.Option(
            help="Prompt lengths to time: 16,64,256. The shortest at which the plan is faster becomes its min_tokens; "
            "shorter prompts run all layers. Empty: time none, min_tokens is 0.",
            metavar="LENGTHS",
        ),
    ] = _PAYS_FROM,
    time_lengths: Annotated[
        str,
        typer.Option(
            help="Prompt lengths at which a plan within a budget of quality is timed: 256,1024. Empty: none.",
            metavar="LENGTHS",
        ),
    ] = "1024",
    max_loss: Annotated[
        float | None,
        typer.Option(help="Omit as many layers as add at most this loss, in nats a token.", rich_help_panel=QUALITY),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Omit as many layers as change the next token by at most this KL divergence, in nats a token.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    max_recall_drop: Annotated[
        float | None,
        typer.Option(
            help="Omit as many layers as lose at most this share of exact answers to questions about a fact in the "
            "prompt.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Held-out prompts that judge a budget of quality, at most. Default: 48.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    highest: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Largest number of layers to try within a budget of quality. Default: half of them.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Fit of the K/V projections within a budget of quality: ridge, distill or unfitted.",
            metavar="METHOD",
            rich_help_panel=QUALITY,
        ),
    ] = "ridge",
    by_importance: Annotated[
        bool,
        typer.Option(
            "--by-importance",
            help="Within a budget of quality, omit the consecutive layers of lowest importance, or any with --free. "
            "Default: the deepest.",
            rich_help_panel=QUALITY,
        ),
    ] = False,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Also say whether products in 8-bit integers (int8=True of pop_ext.enable) pay: what they gain at "
            "each of --time-lengths and what loss they add, at full depth and with the plan. On a CPU.",
            rich_help_panel=QUALITY,
        ),
    ] = False,
    count: Annotated[
        int | None, typer.Option(help="Omit this many layers. Default: a third.", rich_help_panel=LAYERS)
    ] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option(
            help="Omit as few layers as needed for a prefill within this many milliseconds.", rich_help_panel=LAYERS
        ),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            help="Omit as few layers as needed for this speed-up over pop_ext's prefill of all layers, such as 1.3.",
            rich_help_panel=LAYERS,
        ),
    ] = None,
    budget_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Prompt length at which --budget-ms or --speedup is measured.", rich_help_panel=LAYERS
        ),
    ] = 2048,
    free: Annotated[
        bool,
        typer.Option(
            "--free", help="Choose each layer by itself. Default: consecutive layers.", rich_help_panel=LAYERS
        ),
    ] = False,
    boundary: Annotated[
        str | None,
        typer.Option(
            help="Last tokens of a prompt that run through all layers (boundary rows). Default: 1. With a budget of "
            "quality several may be tried: 1,16,64, which is the default there.",
            metavar="ROWS",
            rich_help_panel=LAYERS,
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Choose the layers to omit by their importance on your texts, and save the plan.

    A layer that matters little for encoding a prompt is omitted first. Give one of --count, --budget-ms and --speedup
    at most.

    With --out PLAN.json two more files are written: PLAN.importance.json, from which a stopped run resumes, and the
    figure PLAN.importance.png.

    With a budget of quality (--max-loss, --max-kl, --max-recall-drop: one of them or more) the plan that omits the most
    layers within it is found, fitted, and written to a folder with a card that says what it costs and gains. A part of
    each text is held out to measure that. All limits must be kept by the mean plus one standard error. An option that
    the other options leave without effect is an error.
    """
    lengths = {"--pays-from": pays_from, "--time-lengths": time_lengths}
    with output.errors_on_one_line():
        timed, shown = (options.parse_numbers(option, text) for option, text in lengths.items())
        rows = options.parse_numbers("--boundary", boundary or "")
        budget = Budget(
            max_loss, max_kl, max_recall_drop, method, rows, samples, prompts, tokens, highest, timed, shown, int8
        )
        if not budget.given and len(rows) > 1:
            raise ValueError(f"--boundary: expected one number without a budget of quality, got {boundary}")
        check_options(options.given_options(context), method)
        options.require_one({"--count": count, "--budget-ms": budget_ms, "--speedup": speedup})
        folder = plan_folder(out) if budget.given else None
        files = options.find_files("--text", text)
        options.set_threads(threads)
        with output.loading_spinner(as_json):
            loaded = options.load_model(model, dtype, device)
            tokenizer = options.load_tokenizer(model)
        how = {"branches": branches, "recompute": recompute, "progress": not as_json}
        if folder is not None:
            scored = how if by_importance else None
            found = calibrate_within(loaded, tokenizer, files, folder, budget, scored, not free, as_json)
        else:
            found = True
            options.check_tokens(loaded, tokens or TOKENS)
            scores = _score(loaded, tokenizer, files, out, samples or SAMPLES, tokens or TOKENS, how)
            choose = functools.partial(scores.plan, contiguous=not free, boundary=rows[0] if rows else 1)
            chosen, within = _choose(loaded, choose, count, budget_ms, speedup, budget_tokens, not as_json)
            chosen.save(out)  # before anything is timed, so that a stopped run leaves a plan
            chosen = _with_min_tokens(loaded, chosen, timed, not as_json)
            chosen.save(out)
            plots = output.draw_figures(_draw, scores, out.with_suffix(".importance.png"))
            _show(_report(out, scores, chosen, within, plots), scores, chosen, as_json)
    if not found:
        raise typer.Exit(1)


def _show(report: dict[str, Any], scores: Importance, chosen: Plan, as_json: bool) -> None:
    if as_json:
        output.print_json(report)
    else:
        _print(scores, chosen, report)


def _score(
    model: Any, tokenizer: Any, files: list[Path], out: Path, samples: int, tokens: int, how: dict[str, Any]
) -> Importance:
    """Score the layers on the texts; resume from the file of scores beside ``out``."""
    from pop_ext.evaluation import calibration_batches, read_texts
    from pop_ext.methods.importance import importance

    batches = calibration_batches(read_texts(files, tokenizer), tokenizer, tokens, samples)
    out.parent.mkdir(parents=True, exist_ok=True)
    return importance(model, batches, resume=out.with_suffix(STATE), **how)


def _report(
    out: Path, scores: Importance, chosen: Plan, budget: BudgetedPlan | None, plots: list[str]
) -> dict[str, Any]:
    """Return plan and scores as JSON values."""
    return {
        "plan": str(out),
        "importance": str(out.with_suffix(STATE)),
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


def _choose(
    model: Any,
    choose: Callable[[int | None], Plan],
    count: int | None,
    budget_ms: float | None,
    speedup: float | None,
    tokens: int,
    bar: bool,
) -> tuple[Plan, BudgetedPlan | None]:
    """Return the plan of ``count`` layers, or the one that keeps the budget, and the times measured for it."""
    if budget_ms is None and speedup is None:
        return choose(count), None

    from pop_ext.methods.latency import plan_within

    limit: dict[str, Any] = {"speedup": speedup} if budget_ms is None else {"seconds": budget_ms / 1e3}
    found = plan_within(model, choose, tokens=tokens, progress=bar, **limit)
    return found.plan, found


def _with_min_tokens(model: Any, plan: Plan, lengths: list[int], bar: bool) -> Plan:
    """Return the plan with its ``min_tokens`` timed, if it omits layers of a native model."""
    from pop_ext.evaluation.arms import backend_of
    from pop_ext.methods.latency import with_min_tokens

    return with_min_tokens(model, plan, lengths, bar) if plan.omit and backend_of(model) == "native" else plan


def _draw(scores: Importance, path: Path) -> list[str]:
    scores.plot(path)
    return [str(path)]


def _print(scores: Importance, plan: Plan, report: dict[str, Any]) -> None:
    console = Console()
    table = output.new_table("layer", "prompt", "(error)", "continuation", "(error)", "omitted")
    columns = (scores.prefill, scores.prefill_error, scores.decode, scores.decode_error)
    for layer, values in enumerate(zip(*columns, strict=True)):
        table.add_row(str(layer), *(f"{value:.3g}" for value in values), "yes" if layer in plan.omit else "")
    console.print(table)
    if report["budget"] is not None:
        times = ", ".join(f"{n}: {1e3 * s:.1f} ms" for n, s in sorted(report["budget"]["measured_seconds"].items()))
        console.print(Text(f"median time of a prefill by the number of omitted layers: {times}"))
    console.print(
        Text(
            f"omits layers {list(plan.omit)} of prompts of {plan.min_tokens} tokens and more, boundary {plan.boundary} "
            f"({scores.samples} samples)"
        )
    )
    for name in ("plan", "importance", "plots"):  # print, because a console breaks long paths
        paths = report[name] if isinstance(report[name], str) else ", ".join(report[name])
        if paths:  # without matplotlib there is no figure
            print(f"{name}: {paths}")
