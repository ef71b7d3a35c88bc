"""``pop-ext fit``: K/V projections of omitted layers, fitted on one's own texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
from pop_ext.plans.projections import FitReport


def fit(
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(help="Plan whose layers get projections, as Plan.save wrote it.")],
    text: TextOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="The fitted plan, as JSON; matrices go beside it.")],
    samples: Annotated[int, typer.Option(min=2, help="Sequences at most, those held out included.")] = 200,
    tokens: WindowOption = 256,
    holdout: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Share of them, one at least, that chooses the pull.")
    ] = 0.2,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="All rows count alike, not as much as later rows attend to them.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit K/V projections of the plan's omitted layers, at no extra cost of a prefill.

    The last share of the sequences is held out: the loss after them chooses how strong the pull towards the original
    projections is. Use texts that no evaluation uses.
    """
    with shared.errors():
        shared.set_threads(threads)
        before = Plan.load(plan)
        with shared.loading(as_json):
            loaded = shared.load_model(model, dtype, device)
            tokenizer = shared.load_tokenizer(model)

        import pop_ext
        from pop_ext.evaluation import calibration_batches, read_texts

        batches = calibration_batches(read_texts(text, tokenizer), tokenizer, tokens, samples, batch=1)
        kept = min(len(batches) - 1, max(1, round(holdout * len(batches))))
        used, held = batches[: len(batches) - kept], batches[len(batches) - kept :]
        weighting = "uniform" if uniform else "attention"
        fitted = pop_ext.fit(loaded, before, used, holdout=held or None, weighting=weighting, progress=not as_json)
        out.parent.mkdir(parents=True, exist_ok=True)
        fitted.save(out)
    assert fitted.projections is not None  # fit's result
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
        shared.print_json(report)
    else:
        _print(found)
        print(f"fitted layers {report['omit']} on {len(used)} sequences, {len(held)} held out")
        print(f"{report['plan']}: the plan; {report['matrices']}: its matrices")


def _print(found: FitReport) -> None:
    """The pull's choice, and what the fit explains of each layer that it did not explain before."""
    console = Console()
    if found.losses:
        table = shared.new_table("pull (lambda)", "loss after held-out prompts", "")
        for ridge, loss, error in found.losses:
            table.add_row(
                found.ridge_text(ridge), f"{loss:.4f} ({error:.4f})", "chosen" if ridge == found.ridge else ""
            )
        console.print(table)
    table = shared.new_table("layer", "error of K, before", "after", "of V, before", "after")
    for layer, shares in sorted(found.residuals.items()):
        table.add_row(str(layer), *(f"{share:.1%}" for share in shares))
    console.print(table)
