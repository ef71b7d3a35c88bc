"""``pop-ext eval``: what plans cost in quality, beside full depth and beside their ablations, and what they gain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from pop_ext.cli import shared
from pop_ext.cli.shared import (
    BoundariesOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    OutFolderOption,
    TextOption,
    ThreadsOption,
)
from pop_ext.plans.plan import Plan
from pop_ext.plans.presets import default_plan

if TYPE_CHECKING:
    from pop_ext.evaluation import Evaluation

RESULT = "evaluation.json"


def evaluate(
    model: ModelArgument,
    text: TextOption,
    out: OutFolderOption,
    plan: Annotated[list[Path] | None, typer.Option(help="Plans to read, as Plan.save wrote them.")] = None,
    counts: Annotated[str | None, typer.Option(help="Numbers of the deepest layers, like 1-6: each a plan.")] = None,
    boundary: BoundariesOption = None,
    kinds: Annotated[str, typer.Option(help="Of pop, pop-fitted, no-kv, no-boundary, dropped, full-fp8, pop-fp8.")] = (
        "pop,pop-fitted,no-kv,no-boundary,dropped"
    ),
    lengths: Annotated[str, typer.Option(help="Tokens of prompts, like 128,256,512.")] = "256",
    continuation: Annotated[int, typer.Option(min=1, help="Tokens after each prompt that are scored.")] = 32,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each length at most.")] = 48,
    greedy: Annotated[int, typer.Option(min=0, help="Tokens of the greedy continuations; 0: none.")] = 8,
    recall: Annotated[str, typer.Option(help="Tokens of prompts that ask for their first line; empty: none.")] = "128",
    time_lengths: Annotated[str, typer.Option(help="Prompt lengths to time; empty: none.")] = "256",
    repeats: Annotated[int, typer.Option(min=3, help="Rounds of timing.")] = 7,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per forward.")] = 8,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure loss, greedy continuations and recall of plans beside full depth and ablations, and time them.

    A run that was stopped goes on where it was: results are saved into the folder after each arm.
    """
    with shared.errors():
        shared.set_threads(threads)
        with shared.loading(as_json):
            loaded = shared.load_model(model, dtype, device)
            tokenizer = shared.load_tokenizer(model)
        plans = _plans(loaded.config, plan or [], counts, boundary)

        from pop_ext.evaluation import evaluate as run
        from pop_ext.evaluation import read_texts, recall_sets, text_sets, time_plans

        limit = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
        texts = read_texts(text, tokenizer)
        sets = text_sets(texts, tokenizer, shared.parse_numbers("--lengths", lengths), continuation, samples, limit)
        asked = shared.parse_numbers("--recall", recall)
        sets += recall_sets(texts, tokenizer, asked, samples, limit=limit) if asked else []
        path, bar = out / RESULT, not as_json
        wanted = [kind.strip() for kind in kinds.split(",")]
        options: dict[str, Any] = {"greedy_tokens": greedy, "batch_size": batch_size, "resume": path, "progress": bar}
        result = run(loaded, sets, plans, kinds=wanted, **options)
        timed = shared.parse_numbers("--time-lengths", time_lengths)
        if timed and result.facts["backend"] == "native":
            # Times compare within their rounds alone, so plans of earlier calls into the folder run again with these.
            times = time_plans(loaded, [*result.plans(), *plans], timed, repeats=repeats, progress=bar)
            result.timings = [old for old in result.timings if old["tokens"] not in timed] + times
        result.facts["texts"] = [str(file) for file in text]
        result.save(path)
        plots = shared.draw(draw_evaluation, result, out)
    if as_json:
        shared.print_json({"result": str(path), "plots": plots, **result.facts, "rows": result.summary()})
    else:
        _print(result)
        print(f"{path}: every sample; pop-ext report {out} makes a page of it")


def _plans(config: Any, paths: list[Path], counts: str | None, boundary: str | None) -> list[Plan]:
    depth = config.get_text_config().num_hidden_layers
    plans = [Plan.load(path) for path in paths]
    plans += [Plan.last(depth, count=count) for count in shared.parse_numbers("--counts", counts or "")]
    plans = plans or [default_plan(config)]
    boundaries = shared.parse_numbers("--boundary", boundary or "")
    return [plan.replace(boundary=rows) for plan in plans for rows in boundaries] if boundaries else plans


def draw_evaluation(result: Evaluation, folder: Path) -> list[str]:
    """Every figure that the result has data for; returns their paths."""
    from pop_ext.evaluation import plots

    drawn = []
    for name, draw in plots.FIGURES.items():
        if draw(result, folder / f"{name}.png"):
            drawn.append(str(folder / f"{name}.png"))
    return drawn


def _print(result: Evaluation) -> None:
    console = Console()
    rows = result.summary()
    for number, prompts in enumerate(result.facts["sets"]):
        length = "" if prompts["length"] is None else f" of {prompts['length']} tokens"
        console.print(Text(f"{prompts['prompts']} {prompts['kind']} prompts{length}: nats a token, (standard error)"))
        recall = prompts["kind"] == "recall"
        shares = {"exact": "exact"} if recall else {"agreement": "as full", "match": "match"}
        table = shared.new_table("arm", "loss", "to full", "first token", *shares.values())
        of_set = [row for row, cell in zip(rows, result.cells, strict=True) if cell["set"] == number]
        for row in of_set:
            cells = [_mean(row["loss"]), _mean(row["delta_loss"], "+"), _mean(row["delta_first"], "+")]
            table.add_row(row["arm"], *cells, *(_mean(row[name], digits=2) if name in row else "-" for name in shares))
        console.print(table)
    note = (
        "To full, first token: difference to full depth, of all tokens and of the first one. As full: leading share of "
        "the full model's greedy continuation; match: all of it. Exact: the definition of the first line was found."
    )
    console.print(Text(note, style="dim"))


def _mean(mean: Any, sign: str = "", digits: int = 3) -> str:
    return f"{mean.value:{sign}.{digits}f} ({mean.error:.{digits}f})"
