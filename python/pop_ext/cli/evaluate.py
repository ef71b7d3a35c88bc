"""``pop-ext eval``: what plans cost in quality and gain in time, beside full depth and ablations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from pop_ext.cli import options, output
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
    from pop_ext.evaluation import Evaluation

RESULT = "evaluation.json"
_KINDS = "pop,pop-fitted,no-kv,no-boundary,dropped"


def evaluate(
    model: ModelArgument,
    text: TextOption,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the results; made if it does not exist.", metavar="FOLDER")
    ],
    kinds: Annotated[
        str,
        typer.Option(
            help="Ways to run each plan, separated by commas; the full model always runs. pop: the plan. pop-fitted: "
            "the plan with its fitted projections, named pop-ridge or pop-distill. Ablations: no-kv (context "
            "rows leave no keys and values in omitted layers), no-boundary (no token of the prompt runs through all "
            "layers), dropped (decoding omits the layers, too). full-int8, pop-int8, pop-fitted-int8, and -fp8: "
            "these with matrix products in 8-bit integers or floats.",
            metavar="KINDS",
        ),
    ] = _KINDS,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens: 128,256,512.", metavar="LENGTHS")] = "256",
    continuation: Annotated[int, typer.Option(min=1, help="Tokens after each prompt whose loss is measured.")] = 32,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each length, at most.")] = 48,
    greedy: Annotated[
        int, typer.Option(min=0, help="Tokens of the full model's greedy continuation to compare with; 0: none.")
    ] = 8,
    recall: Annotated[
        str,
        typer.Option(
            help="Lengths of recall prompts, which ask at their end for a number on their first line. Empty: none.",
            metavar="LENGTHS",
        ),
    ] = "128",
    retrieval: Annotated[
        str,
        typer.Option(
            help="Lengths of retrieval prompts: a fact stands anywhere in a text, and the last line asks for it, in "
            "chat form if the tokenizer has a chat template: 512,2000. Empty: none.",
            metavar="LENGTHS",
        ),
    ] = "",
    second_turn: Annotated[
        str,
        typer.Option(
            help="Lengths of first prompts in dialogues whose second turn asks for another fact of the same text. "
            "Empty: none.",
            metavar="LENGTHS",
        ),
    ] = "",
    time_lengths: Annotated[
        str, typer.Option(help="Prompt lengths to time: 256,1024. Empty: none.", metavar="LENGTHS")
    ] = "256",
    repeats: Annotated[int, typer.Option(min=3, help="Timed prefills of each plan; medians are shown.")] = 7,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per forward.")] = 8,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{options.PLAN_HELP} Repeat the option for more plans.",
            metavar="PLAN",
            rich_help_panel=LAYERS,
        ),
    ] = None,
    counts: Annotated[
        str | None,
        typer.Option(
            help="Numbers of deepest layers to omit, one plan each: 1-6 or 4,8.",
            metavar="COUNTS",
            rich_help_panel=LAYERS,
        ),
    ] = None,
    boundary: Annotated[
        str | None,
        typer.Option(
            help="Last tokens of a prompt that run through all layers (boundary rows). 1,16,64 runs each plan three "
            "times. Default: the plan's.",
            metavar="ROWS",
            rich_help_panel=LAYERS,
        ),
    ] = None,
    reuse_states: Annotated[
        bool,
        typer.Option(
            "--reuse-states",
            help="Run the full model once per prompt and every plan from its states, in plain PyTorch: far faster "
            "with many plans. Takes more memory.",
        ),
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the loss, greedy continuations, recall, retrieval and time of plans, beside the full model and ablations.

    An ablation leaves out one part of the method.

    Without --plan and --counts the plan that pop_ext.enable runs is measured (pop-ext info --model shows it); if that
    omits no layer, the preset of a model of this shape (pop-ext info lists presets), else the deepest third.

    Results are saved after each way to run a plan; a stopped run resumes from them.
    """
    with output.errors_on_one_line():
        options.set_threads(threads)
        files = options.find_files("--text", text)
        with output.loading_spinner(as_json):
            loaded = options.load_model(model, dtype, device)
            tokenizer = options.load_tokenizer(model)
        plans = _plans(loaded, plan or [], counts, boundary)

        from pop_ext.evaluation import evaluate as run
        from pop_ext.evaluation import read_texts, recall_sets, retrieval_sets, second_turn_sets, text_sets, time_plans
        from pop_ext.evaluation.arms import backend_of
        from pop_ext.methods.calibration import longest_input

        limit = longest_input(loaded)
        texts = read_texts(files, tokenizer)
        with output.option_named("--lengths", "lengths"):
            asked = options.parse_numbers("--lengths", lengths)
            sets = text_sets(texts, tokenizer, asked, continuation, samples, limit)
        makers = {"--recall": (recall, recall_sets), "--retrieval": (retrieval, retrieval_sets)}
        for option, (given, make) in {**makers, "--second-turn": (second_turn, second_turn_sets)}.items():
            asked = options.parse_numbers(option, given)
            with output.option_named(option, "lengths"), output.option_named(option, "length"):
                sets += make(texts, tokenizer, asked, samples, limit=limit) if asked else []
        path, bar = out / RESULT, not as_json
        wanted = [kind.strip() for kind in kinds.split(",")]
        how: dict[str, Any] = {"greedy_tokens": greedy, "batch_size": batch_size, "reuse_states": reuse_states}
        result = run(loaded, sets, plans, kinds=wanted, **how, resume=path, progress=bar)
        timed = options.parse_numbers("--time-lengths", time_lengths)
        native = bool(timed) and backend_of(loaded) == "native"
        if timed and not native and not as_json:
            print("times: none, which need a native form; pop-ext generate compares times of one prompt")
        if native:
            # Only times of the same rounds compare, so the plans that the folder already holds are timed again.
            times = time_plans(loaded, [*result.plans(), *plans], timed, repeats=repeats, progress=bar)
            result.timings = [old for old in result.timings if old["tokens"] not in timed] + times
        result.facts["texts"] = [str(file) for file in files]
        result.save(path)
        plots = output.draw_figures(draw_evaluation, result, out)
    if as_json:
        output.print_json({"result": str(path), "plots": plots, **result.facts, "rows": result.summary()})
    else:
        _print(result)
        print(f"{path}: results of every sample; pop-ext report {out} makes a page of them")


def _plans(model: Any, names: list[str], counts: str | None, boundary: str | None) -> list[Plan]:
    """Return the plans of --plan, then those of --counts, each with every boundary of --boundary."""
    depth = model.config.get_text_config().num_hidden_layers
    plans = [options.named_plan(model, name).plan for name in names]
    plans += [Plan.last(depth, count=count) for count in options.parse_numbers("--counts", counts or "")]
    plans = plans or [options.plan_for(model, measure=True).plan]
    boundaries = options.parse_numbers("--boundary", boundary or "")
    return [plan.replace(boundary=rows) for plan in plans for rows in boundaries] if boundaries else plans


def draw_evaluation(result: Evaluation, folder: Path) -> list[str]:
    """Draw every figure that the result has data for; return their paths."""
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
        console.print(Text(f"{prompts['prompts']} {prompts['kind']} prompts{length}: nats per token (standard error)"))
        if prompts["kind"] == "text":
            columns = {"delta_first": "first token", "agreement": "as full", "match": "match"}
        else:
            columns = {"exact": "exact", "delta_exact": "exact, to full"}
        columns = {"loss": "loss", "delta_loss": "to full", "kl": "KL", **columns}
        table = output.new_table("arm", *columns.values())
        for row, cell in zip(rows, result.cells, strict=True):
            if cell["set"] == number:
                table.add_row(row["arm"], *(_mean(row[name], name) if name in row else "-" for name in columns))
        console.print(table)
    note = (
        "loss: of the true continuation. to full: its difference to the full model's loss. KL: divergence from the "
        "full model's distribution. first token: difference of the loss of the first token alone. as full: share of "
        "the full model's greedy continuation before the first token that differs. match: share of prompts where all "
        "of it is equal. exact: share of prompts whose whole answer was found. Differences are paired by prompt."
    )
    console.print(Text(note, style="dim"))
    if result.timings:
        _print_times(console, result.timings)


def _print_times(console: Console, timings: list[dict[str, Any]]) -> None:
    from pop_ext.evaluation.timing import NATIVE_FULL, median_ms, speed_range

    lengths = sorted({timing["tokens"] for timing in timings})
    console.print(Text(f"time to first token: median, and times as fast as {NATIVE_FULL} (quartiles over rounds)"))
    heads = [text for tokens in lengths for text in (f"{tokens} tokens, ms", "times as fast")]
    table = output.new_table("arm", *heads)
    for arm in dict.fromkeys(timing["arm"] for timing in timings):
        cells = []
        for tokens in lengths:
            median, speed = median_ms(timings, arm, tokens), speed_range(timings, arm, tokens)
            cells.append("-" if median is None else f"{median:.1f}")
            cells.append("-" if speed is None else f"{speed.median:.2f} ({speed.low:.2f} to {speed.high:.2f})")
        table.add_row(arm, *cells)
    console.print(table)
    console.print(Text("A fit takes the time of its plan: it replaces values, not work.", style="dim"))


def _mean(mean: Any, name: str) -> str:
    """Format a measure's mean and, in brackets, its standard error: shares with two digits, differences with a sign."""
    digits = 2 if name in ("agreement", "match", "exact", "delta_exact") else 3
    sign = "+" if name.startswith("delta_") else ""
    return f"{mean.value:{sign}.{digits}f} ({mean.error:.{digits}f})"
