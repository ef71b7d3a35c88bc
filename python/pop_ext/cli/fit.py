"""``pop-ext fit``: fit K/V projections of a plan's omitted layers on given texts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pop_ext.cli import options, output
from pop_ext.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    TextOption,
    ThreadsOption,
    WindowOption,
)
from pop_ext.methods.defaults import LEARNING_RATE, STEPS
from pop_ext.plans.plan import Plan
from pop_ext.plans.projections import FitReport

TRAINING = "Training"
"""Panel of the command's help."""
TASKS = 96
"""Retrieval tasks to make by default."""


def fit(
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(help="Plan file, as calibrate or Plan.save writes it.", metavar="PLAN")],
    text: TextOption,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Plan file to write, as JSON. Its matrices go to a .safetensors beside it.",
            metavar="FILE",
        ),
    ],
    samples: Annotated[int, typer.Option(min=2, help="Sequences of the texts, at most, held-out ones included.")] = 200,
    tokens: WindowOption = 256,
    holdout: Annotated[
        float,
        typer.Option(min=0.01, max=0.9, help="Share of the sequences to hold out, at least one sequence."),
    ] = 0.2,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform", help="Weight all rows alike. Default: a row weighs as much as later rows attend to it."
        ),
    ] = False,
    method: Annotated[
        str,
        typer.Option(
            help="ridge: least squares. distill: then train towards the full model, on the texts and on retrieval "
            "tasks made from them."
        ),
    ] = "ridge",
    tasks: Annotated[
        int | None,
        typer.Option(min=0, help=f"Retrieval tasks to make for --method distill. Default: {TASKS}."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"Training steps, at most. Default: {STEPS}.", rich_help_panel=TRAINING)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help=f"Largest learning rate. Default: {LEARNING_RATE}.", rich_help_panel=TRAINING)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed of training and tasks. Default: 0.", rich_help_panel=TRAINING),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="File of the training's state. A stopped run of the same command goes on from it.",
            metavar="FILE",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit the K/V projections of a plan's omitted layers on your texts, at no cost in prefill time.

    Decoding needs the prompt's keys and values of omitted layers, too. A prefill projects them from the hidden states
    before those layers, and the fit adapts these projections.

    The fit is a ridge regression towards the original projections. The last sequences are held out, and the loss after
    them chooses the strength of the ridge, lambda. With --method distill, training follows, and held-out sequences and
    tasks choose the number of steps. Use texts that no evaluation uses.
    """
    with output.errors_on_one_line():
        options.set_threads(threads)
        before = Plan.load(plan)
        files = options.find_files("--text", text)
        with output.loading_spinner(as_json):
            loaded = options.load_model(model, dtype, device)
            tokenizer = options.load_tokenizer(model)

        options.check_tokens(loaded, tokens)
        import pop_ext
        from pop_ext.evaluation import TRAINING as TRAINING_TASKS
        from pop_ext.evaluation import calibration_batches, read_texts, retrieval_pairs
        from pop_ext.evaluation.prompts import texts_before_holdout

        texts = read_texts(files, tokenizer)
        batches = calibration_batches(texts, tokenizer, tokens, samples, batch=1)
        kept = min(len(batches) - 1, max(1, round(holdout * len(batches))))
        used, held = batches[: len(batches) - kept], batches[len(batches) - kept :]
        weighting = "uniform" if uniform else "attention"
        for path in (out, resume):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
        more: dict[str, Any] = {**_training(method, steps, learning_rate, seed, tasks, resume)}
        count = TASKS if tasks is None else tasks
        if method == "distill" and count and texts.plain:
            rest = texts_before_holdout(texts, tokenizer, tokens, samples, len(held))
            with output.option_named("--tokens", "length"):
                more["tasks"] = retrieval_pairs(rest, tokenizer, tokens, count, kind=TRAINING_TASKS, seed=seed or 0)
        fitted = pop_ext.fit(
            loaded,
            before,
            used,
            method=method,
            holdout=held or None,
            weighting=weighting,
            progress=not as_json,
            **more,
        )
        fitted.save(out)
    assert fitted.projections is not None  # fit has set them
    found = fitted.projections.report
    report = {
        "plan": str(out),
        "matrices": str(out.with_suffix(".safetensors")),
        "omit": list(fitted.omit),
        "boundary": fitted.boundary,
        "samples": len(used),
        "held_out": len(held),
        "fit": found.to_dict(),
        "origin": fitted.origin.to_dict() if fitted.origin else None,
    }
    if as_json:
        output.print_json(report)
    else:
        _print(found)
        print(f"fitted layers {report['omit']} on {len(used)} sequences, {len(held)} held out")
        print(f"{report['plan']}: the plan; {report['matrices']}: its matrices")


def _training(
    method: str,
    steps: int | None,
    learning_rate: float | None,
    seed: int | None,
    tasks: int | None,
    resume: Path | None,
) -> dict[str, Any]:
    """Return the options of the training that were given, by argument of ``pop_ext.fit``.

    Raises:
        ValueError: One is given for a method that does not train.
    """
    options = {"steps": steps, "learning_rate": learning_rate, "seed": seed, "tasks": tasks, "resume": resume}
    given = {name: value for name, value in options.items() if value is not None}
    if given and method != "distill":
        name, value = next(iter(given.items()))
        raise ValueError(f"--{name.replace('_', '-')}: expected it with --method distill only, got {value}")
    given.pop("tasks", None)
    return given


def _print(found: FitReport) -> None:
    """Print the loss of each lambda, and each layer's error in K and V before and after the fit."""
    console = Console()
    if found.losses:
        table = output.new_table("lambda", "loss after held-out prompts", "")
        for ridge, loss, error in found.losses:
            table.add_row(
                found.ridge_text(ridge), f"{loss:.4f} ({error:.4f})", "chosen" if ridge == found.ridge else ""
            )
        console.print(table)
    if found.training:
        table = output.new_table("steps", "KL of held-out text", "of tasks", "exact answers", "")
        for step, *figures in found.training:
            cells = ("-" if math.isnan(figure) else f"{figure:.4f}" for figure in figures)
            table.add_row(str(step), *cells, "chosen" if step == found.steps else "")
        console.print(table)
    table = output.new_table("layer", "error of K, before", "after", "of V, before", "after")
    for layer, shares in sorted(found.residuals.items()):
        table.add_row(str(layer), *(f"{share:.1%}" for share in shares))
    console.print(table)
