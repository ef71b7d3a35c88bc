"""``pop-ext generate`` and ``pop-ext info``. Needs the extras ``cli`` and, for a model, ``hf``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pop_ext import info as facts
from pop_ext.plan import Plan
from pop_ext.presets import default_plan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prefill-Only Pruning for Hugging Face language models.",
)

ModelOption = Annotated[str, typer.Option(help="Folder or Hugging Face name of a causal language model.")]
PlanOption = Annotated[Path | None, typer.Option(help="Plan to read, as Plan.save wrote it.")]
OmitOption = Annotated[str | None, typer.Option(help="Layers to omit, like 22-31 or 8,9,11.")]
CountOption = Annotated[int | None, typer.Option(help="How many of the deepest layers to omit.")]
BoundaryOption = Annotated[int | None, typer.Option(help="Last rows of the prompt that run at full depth.")]
DtypeOption = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="Where the model runs.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch's choice.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]


@app.command()
def generate(
    model: ModelOption,
    prompt_file: Annotated[Path, typer.Option(help="Text of the prompt and, after it, its true continuation.")],
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the prompt; by default all before the continuation.")
    ] = None,
    continuation: Annotated[
        int, typer.Option(min=0, help="Tokens after the prompt that are held back as its true continuation.")
    ] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the greedy continuations.")] = 48,
    plan: PlanOption = None,
    omit: OmitOption = None,
    count: CountOption = None,
    boundary: BoundaryOption = None,
    repeats: Annotated[int, typer.Option(min=3, help="Rounds of timing; medians are shown.")] = 7,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text three ways: stock model, native at full depth, pruned; compare time, text and likelihood."""
    with _errors():
        _set_threads(threads)
        text = prompt_file.read_text(encoding="utf-8")
        with _loading(as_json):
            loaded = _load_model(model, dtype, device)
            tokenizer = _load_tokenizer(model)
        chosen = _choose_plan(loaded.config, plan, omit, count, boundary)

        from pop_ext.compare import compare, count_steps, split_prompt

        limit = getattr(loaded.config, "max_position_embeddings", None)
        prompt = split_prompt(tokenizer(text)["input_ids"], continuation, prompt_tokens, limit, max_new_tokens)
        with _progress(as_json) as bar:
            task = bar.add_task("", total=count_steps(prompt, repeats))

            def advance(stage: str) -> None:
                bar.update(task, description=stage, advance=1, refresh=True)

            result = compare(loaded, prompt, chosen, repeats, max_new_tokens, advance)
        report = _generate_report(model, str(prompt_file), loaded, tokenizer, result)
    if as_json:
        _print_json(report)
    else:
        _print_generate(report)


@app.command()
def info(
    model: Annotated[str | None, typer.Option(help="Also: folder or name of a model, its plan and ceilings.")] = None,
    plan: PlanOption = None,
    omit: OmitOption = None,
    count: CountOption = None,
    boundary: BoundaryOption = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Show what is installed and, for a model, what its plan omits and at most gains."""
    with _errors():
        report = facts.installation()
        if model is not None:
            with _loading(as_json):
                loaded = _load_model(model, dtype, "cpu")

                from pop_ext.native import load

                native = load(loaded, _choose_plan(loaded.config, plan, omit, count, boundary))
            report["model"] = {"name": model, **facts.model_summary(native)}
    if as_json:
        _print_json(report)
    else:
        _print_info(report)


def parse_layers(text: str) -> list[int]:
    """``"3,5-7"`` -> ``[3, 5, 6, 7]``; "" is no layer.

    Raises:
        ValueError: anything else.
    """
    layers: list[int] = []
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"--omit: expected layers like 22-31 or 8,9,11, got {text!r}")
        layers.extend(range(first, last + 1))
    return layers


def _choose_plan(config: Any, path: Path | None, omit: str | None, count: int | None, boundary: int | None) -> Plan:
    given = {"--plan": path, "--omit": omit, "--count": count}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)}: expected one of them")
    depth = config.get_text_config().num_hidden_layers
    if path is not None:
        plan = Plan.load(path)
    elif omit is not None:
        plan = Plan(depth, parse_layers(omit))
    elif count is not None:
        plan = Plan.last(depth, count=count)
    else:
        plan = default_plan(config)
    return plan if boundary is None else plan.replace(boundary=boundary)


def _load_model(name: str, dtype: str, device: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    dtypes = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"--dtype: expected one of {', '.join(dtypes)}, got {dtype!r}")
    _check_device(device)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtypes[dtype])
    return loaded.to(device).eval()


def _check_device(device: str) -> None:
    has_cuda = bool(facts.installation()["built_with"]["cuda"])
    expected = "cpu or cuda" if has_cuda else "cpu (this build has no CUDA kernels)"
    try:
        kind = torch.device(device).type
    except RuntimeError:  # no device of torch's
        kind = None
    if kind != "cpu" and not (kind == "cuda" and has_cuda):
        raise ValueError(f"--device: expected {expected}, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: expected cpu (torch finds no CUDA device), got {device!r}")


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


@contextmanager
def _errors() -> Iterator[None]:
    """An error becomes its message on standard error: status 2 for what the user can mend, 1 for what failed."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        hint = " (pip install 'pop_ext[hf]')" if "transformers" in str(getattr(error, "name", "")) else ""
        print(f"pop-ext: {error}{hint}", file=sys.stderr)
        raise typer.Exit(2) from None
    except (RuntimeError, MemoryError) as error:
        print(f"pop-ext: {str(error).strip() or type(error).__name__}", file=sys.stderr)
        raise typer.Exit(1) from None


def _loading(quiet: bool) -> AbstractContextManager[Any]:
    """A spinner while a model loads, drawn by a thread of its own: nothing is being timed yet."""
    console = Console(stderr=True)
    return nullcontext() if quiet or not console.is_terminal else console.status("loading")


def _progress(quiet: bool) -> Progress:
    """A bar that is drawn between steps only: a drawing thread would disturb the timing."""
    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    hidden = quiet or not console.is_terminal
    return Progress(*columns, console=console, transient=True, auto_refresh=False, disable=hidden)


def _generate_report(name: str, prompt_file: str, model: Any, tokenizer: Any, result: Any) -> dict[str, Any]:
    arms = []
    for index, arm in enumerate(result.arms):
        arms.append(
            {
                "name": arm.name,
                "ttft_ms": {
                    "median": 1e3 * arm.median,
                    "min": 1e3 * min(arm.seconds),
                    "max": 1e3 * max(arm.seconds),
                    "all": [1e3 * seconds for seconds in arm.seconds],
                },
                "gflops": arm.flops / 1e9,
                "log_likelihood_per_token": arm.log_likelihood,
                "continuation_ids": arm.continuation,
                "continuation": tokenizer.decode(arm.continuation),
                "agreement": result.agreement(index),
            }
        )
    pairs = [(1, 0), (2, 0), (2, 1)]
    installed = facts.installation()
    return {
        "model": name,
        "prompt_file": prompt_file,
        "prompt_tokens": len(result.prompt.context),
        "prompt_end": tokenizer.decode(result.prompt.context[-48:]),
        "true_continuation_ids": result.prompt.truth,
        "true_continuation": tokenizer.decode(result.prompt.truth) if result.prompt.truth else None,
        "plan": facts.describe_plan(result.plan),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": model.config._attn_implementation,
        "versions": {name: installed[name] for name in ("pop_ext", "torch", "transformers")},
        "cpu_isa": installed["cpu_isa"],
        "threads": installed["threads"],
        "arms": arms,
        "speedups": [
            {
                "arm": result.arms[arm].name,
                "baseline": result.arms[baseline].name,
                "measured": result.speedup(arm, baseline),
                "ceiling": result.ceiling(arm, baseline),
            }
            for arm, baseline in pairs
        ],
    }


def _print_json(report: dict[str, Any]) -> None:
    print(json.dumps(report, indent=2))


def _print_generate(report: dict[str, Any]) -> None:
    console = Console()
    plan = report["plan"]
    kernels = f"{report['cpu_isa']}, {report['threads']} threads"
    lines = [
        f"{report['model']}: {report['dtype']} on {report['device']} ({kernels})",
        f"prompt: the first {report['prompt_tokens']} tokens of {report['prompt_file']}",
        f"POP omits {len(plan['omit'])} of {plan['num_layers']} layers for all of them but the last {plan['boundary']}",
    ]
    if report["prompt_tokens"] < plan["min_tokens"]:
        lines.append(f"(enable() would run it at full depth: it is shorter than min_tokens, {plan['min_tokens']})")
    for line in lines:
        console.print(Text(line))
    _print_arms(console, report)
    texts = {
        "end of the prompt": report["prompt_end"],
        "true continuation": report["true_continuation"],
        **{f"continuation, {arm['name']}": arm["continuation"] for arm in report["arms"]},
    }
    for name, text in texts.items():
        if text is not None:
            console.print(Panel(Text(text), title=name, title_align="left"))


def _table(*headings: str) -> Table:
    """A left column of names and right-aligned numbers."""
    table = Table(box=box.SIMPLE)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return table


def _print_arms(console: Console, report: dict[str, Any]) -> None:
    times = _table("first token", "median ms", "range", "log p/token", "as stock")
    for arm in report["arms"]:
        ttft, likelihood = arm["ttft_ms"], arm["log_likelihood_per_token"]
        times.add_row(
            arm["name"],
            _milliseconds(ttft["median"]),
            f"{_milliseconds(ttft['min'])}-{_milliseconds(ttft['max'])}",
            "-" if likelihood is None else f"{likelihood:.4f}",
            f"{arm['agreement']} of {len(arm['continuation_ids'])}",
        )
    console.print(times)
    ratios = _table("speed-up", "measured", "ceiling")
    for row in report["speedups"]:
        ratios.add_row(f"{row['arm']} vs {row['baseline']}", f"{row['measured']:.2f}x", f"{row['ceiling']:.2f}x")
    console.print(ratios)
    repeats = len(report["arms"][0]["ttft_ms"]["all"])
    for note in (
        f"Time to first token: medians of {repeats} interleaved runs. log p: nats, of the true",
        "continuation. As stock: leading tokens of the greedy continuation. Ceiling: ratio",
        "of FLOPs, what omitting work alone can gain; more than that is owed to the kernels.",
    ):
        console.print(Text(note, style="dim"))


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _print_info(report: dict[str, Any]) -> None:
    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    schemas = report["aten_schemas"]
    rows = {
        "pop_ext": report["pop_ext"],
        "python": report["python"],
        "torch": f"{report['torch']} (built with the headers of {report['built_with']['torch_headers']})",
        "transformers": report["transformers"] or "not installed (extra hf)",
        "compiler": report["built_with"]["compiler"],
        "CPU kernels": f"{report['cpu_isa']}, {report['threads']} threads",
        "CUDA kernels": report["cuda"],
        "aten schemas": schemas if isinstance(schemas, str) else f"changed, native prefill disabled: {schemas}",
        "attention": ", ".join(f"{device}: {provider}" for device, provider in report["attention"].items()),
        "families": ", ".join(report["families"]),
        "presets": "\n".join(
            f"{preset['omitted']:2} of {preset['layers']} layers: {preset['names'][0]}"
            f"{' (published)' if preset['published'] else ''}"
            for preset in report["presets"]
        ),
    }
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(table)
    if "model" in report:
        _print_model(console, report["model"])


def _print_model(console: Console, model: dict[str, Any]) -> None:
    plan, windows = model["plan"], model["sliding_windows"]
    lines = [
        "",
        f"{model['name']}: {model['architecture']}, {model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}",
        f"{model['layers']} layers of hidden {model['hidden_size']}, {model['heads']} heads and {model['kv_heads']} "
        f"KV heads of {model['head_dim']}, MLP {model['intermediate_size']}; vocabulary {model['vocab_size']}",
        f"plan: omits {plan['omit']}, boundary {plan['boundary']}, min_tokens {plan['min_tokens']}",
        f"folded K/V weights: {model['extra_bytes'] / 2**20:.1f} MiB",
    ]
    if windows:
        lines.insert(3, f"sliding windows: {windows}")
    for line in lines:
        console.print(Text(line))
    table = _table("ceiling, batch 1", "POP vs HF full", "POP vs native full", "native full vs HF full")
    for row in model["ceilings"]:
        ratios = (row[name] for name in ("pop_over_stock", "pop_over_native_full", "native_full_over_stock"))
        table.add_row(f"{row['tokens']} tokens", *(f"{ratio:.3f}x" for ratio in ratios))
    console.print(table)
