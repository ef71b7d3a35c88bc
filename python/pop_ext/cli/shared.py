"""What the commands share: options, models and plans by name, errors as one line, bars and tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperCommand

from pop_ext import env_info as facts
from pop_ext.plans.plan import Plan
from pop_ext.plans.presets import default_plan
from pop_ext.utils.json import finite
from pop_ext.utils.layer_ranges import parse_layers

ModelOption = Annotated[str, typer.Option(help="Folder or Hugging Face name of a causal language model.")]
ModelArgument = Annotated[str, typer.Argument(help="Folder or Hugging Face name of a causal language model.")]
TextOption = Annotated[
    list[Path],
    typer.Option(help="Texts: plain, or .jsonl with an object of prompt and continuation a line.", show_default=False),
]
WindowOption = Annotated[int, typer.Option(min=4, help="Tokens of each sequence of a calibration.")]
OutFolderOption = Annotated[Path, typer.Option("--out", "-o", help="Folder of the results; made where it is not.")]
BoundariesOption = Annotated[
    str | None, typer.Option(help="Last rows of a prompt at full depth, like 1,16,64: each a plan.")
]
PlanOption = Annotated[Path | None, typer.Option(help="Plan to read, as Plan.save wrote it.")]
OmitOption = Annotated[str | None, typer.Option(help="Layers to omit, like 22-31 or 8,9,11.")]
CountOption = Annotated[int | None, typer.Option(help="How many of the deepest layers to omit.")]
BoundaryOption = Annotated[int | None, typer.Option(help="Last rows of the prompt that run at full depth.")]
DtypeOption = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="Where the model runs.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch's choice.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]


def parse_numbers(option: str, text: str) -> list[int]:
    """``"1-3,8"`` -> ``[1, 2, 3, 8]``; "" is none.

    Raises:
        ValueError: anything else.
    """
    try:
        return parse_layers(text.strip())
    except ValueError:
        raise ValueError(f"{option}: expected numbers like 1,2,4 or 1-6, got {text!r}") from None


class ManyValues(TyperCommand):
    """A command whose ``--text`` and ``--plan`` take all words up to the next option, as a shell's ``*.txt`` gives."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        option = None
        for word in args:
            if word.startswith("-"):
                option, named = (word if word in ("--text", "--plan") else None), True
            else:
                if option is not None and not named:
                    spread.append(option)
                named = False
            spread.append(word)
        return super().parse_args(ctx, spread)


def draw(drawing: Any, *arguments: Any) -> list[str]:
    """The paths of what was drawn; where matplotlib is missing none, and a line that says so."""
    try:
        return list(drawing(*arguments))
    except ImportError as error:
        print(f"pop-ext: no figures: {error}", file=sys.stderr)
        return []


def choose_plan(config: Any, path: Path | None, omit: str | None, count: int | None, boundary: int | None) -> Plan:
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


def load_model(name: str, dtype: str, device: str) -> Any:
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


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


@contextmanager
def errors() -> Iterator[None]:
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


def loading(quiet: bool) -> AbstractContextManager[Any]:
    """A spinner while a model loads, drawn by a thread of its own: nothing is being timed yet."""
    console = Console(stderr=True)
    return nullcontext() if quiet or not console.is_terminal else console.status("loading")


def stepwise(quiet: bool) -> Progress:
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


def print_json(report: dict[str, Any]) -> None:
    """Prints a report; what is not finite, as the error of a single prompt, is null."""
    print(json.dumps(finite(report), indent=2, allow_nan=False))


def new_table(*headings: str) -> Table:
    """A left column of names and right-aligned numbers."""
    table = Table(box=box.SIMPLE)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return table
