"""``pop-ext fit``: K/V projections of omitted layers, fitted on one's own texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pop_ext.commands import shared
from pop_ext.commands.shared import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    TextOption,
    ThreadsOption,
    WindowOption,
)
from pop_ext.plan import Plan


def fit(
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(help="Plan whose layers get projections, as Plan.save wrote it.")],
    text: TextOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="The fitted plan, as JSON; matrices go beside it.")],
    samples: Annotated[int, typer.Option(min=2, help="Sequences at most, those held out included.")] = 200,
    tokens: WindowOption = 256,
    holdout: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of them that chooses the pull.")] = 0.2,
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
        kept = min(len(batches) - 1, round(holdout * len(batches)))
        used, held = batches[: len(batches) - kept], batches[len(batches) - kept :]
        fitted = pop_ext.fit(loaded, before, used, holdout=held or None, progress=not as_json)
        out.parent.mkdir(parents=True, exist_ok=True)
        fitted.save(out)
    report = {
        "plan": str(out),
        "omit": list(fitted.omit),
        "boundary": fitted.boundary,
        "samples": len(used),
        "held_out": len(held),
        "origin": fitted.origin.to_dict() if fitted.origin else None,
    }
    if as_json:
        shared.print_json(report)
    else:
        print(f"fitted layers {report['omit']} on {len(used)} sequences, {len(held)} held out: {out}")
