"""Options that commands share, and the models, plans and files that they name."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pop_ext import env_info
from pop_ext.hf.decision import Products
from pop_ext.plans.default import ChosenPlan
from pop_ext.plans.plan import Plan
from pop_ext.utils.layer_ranges import parse_layers, parse_ranges

LAYERS, MACHINE = "Choice of layers", "Model and machine"
"""Panels of a command's help."""

_MODEL_HELP = "Folder or Hugging Face name of a causal language model."
ModelOption = Annotated[str, typer.Option(help=_MODEL_HELP, metavar="MODEL")]
ModelArgument = Annotated[str, typer.Argument(help=_MODEL_HELP, metavar="MODEL")]
TextOption = Annotated[
    list[str],
    typer.Option(
        help="A text file, or a .jsonl file whose lines are objects with a prompt and a continuation. "
        "Repeat the option for more files, or quote a pattern: 'texts/**/*.txt'.",
        metavar="FILE",
        show_default=False,
    ),
]
WindowOption = Annotated[int, typer.Option(min=4, help="Length of each sequence, in tokens.")]
PLAN_HELP = (
    "Plan file, as calibrate, fit or Plan.save writes it, or a folder with a plan.json. third: the deepest third of "
    "the layers. preset: the preset of a model of this shape, published or not."
)
PlanOption = Annotated[str | None, typer.Option(help=PLAN_HELP, metavar="PLAN", rich_help_panel=LAYERS)]
OmitOption = Annotated[
    str | None,
    typer.Option(help="Layers to omit: 22-31 or 8,9,11.", metavar="LAYERS", rich_help_panel=LAYERS),
]
CountOption = Annotated[int | None, typer.Option(help="Omit this many of the deepest layers.", rich_help_panel=LAYERS)]
BoundaryOption = Annotated[
    int | None,
    typer.Option(
        help="Last tokens of the prompt that run through all layers (boundary rows). Default: the plan's.",
        rich_help_panel=LAYERS,
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Data type of the weights: float32, bfloat16, float16, or auto, which takes the checkpoint's.",
        metavar="DTYPE",
        rich_help_panel=MACHINE,
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", metavar="DEVICE", rich_help_panel=MACHINE)]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.", rich_help_panel=MACHINE)
]
Int8Option = Annotated[
    bool,
    typer.Option(
        "--int8",
        help="Compute q, o, gate, up and down of native prefills in 8-bit integers, on a CPU.",
        rich_help_panel=MACHINE,
    ),
]
Fp8Option = Annotated[
    bool,
    typer.Option(
        "--fp8",
        help="Compute the matrix products of native prefills in 8-bit floats, on a GPU (on a CPU for checks only).",
        rich_help_panel=MACHINE,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a JSON object on standard output and nothing else.")]


def parse_numbers(option: str, text: str) -> list[int]:
    """Parse the numbers of an option: ``"1-3,8"`` -> ``[1, 2, 3, 8]``; blank text -> ``[]``.

    Raises:
        ValueError: The text is no list of numbers and ranges; the message names ``option``.
    """
    try:
        return parse_ranges(text.strip())
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def find_files(option: str, names: Sequence[str]) -> list[Path]:
    """Return the files of an option, in order; a pattern stands for the files that match it, sorted.

    Raises:
        ValueError: A pattern matches no file; the message names ``option``.
    """
    files: list[Path] = []
    for name in names:
        if not glob.has_magic(name) or Path(name).exists():
            files.append(Path(name))
            continue
        found = sorted(path for path in map(Path, glob.glob(name, recursive=True)) if path.is_file())
        if not found:
            raise ValueError(f"{option}: expected a pattern that matches a file, got {name!r}")
        files += found
    return files


def chosen_plan(
    model: Any, plan: str | None, omit: str | None, count: int | None, boundary: int | None, measure: bool = False
) -> ChosenPlan:
    """Return the plan that --plan, --omit or --count names, else the one for a model whose caller names none.

    Args:
        model: Loaded model.
        plan: Value of --plan.
        omit: Value of --omit.
        count: Value of --count.
        boundary: Value of --boundary; replaces the plan's own.
        measure: Without a named plan: True for one worth measuring, False for the one that ``pop_ext.enable`` runs.

    Raises:
        OSError: The plan file cannot be read.
        ValueError: More than one of the three is given, or one does not fit the model.
    """
    require_one({"--plan": plan, "--omit": omit, "--count": count})
    depth = model.config.get_text_config().num_hidden_layers
    if plan is not None:
        chosen = named_plan(model, plan)
    elif omit is not None:
        chosen = ChosenPlan(Plan(depth, parse_layers(omit)), f"--omit {omit}")
    elif count is not None:
        chosen = ChosenPlan(Plan.last(depth, count=count), f"--count {count}")
    else:
        chosen = plan_for(model, measure=measure)
    if boundary is None:
        return chosen
    return dataclasses.replace(chosen, plan=chosen.plan.replace(boundary=boundary))


def named_plan(model: Any, plan: str) -> ChosenPlan:
    """Return the plan of a value of --plan.

    Raises:
        OSError: The plan file cannot be read.
        ValueError: The value names no plan, or one that does not fit the model.
    """
    return dataclasses.replace(plan_for(model, plan), reason=f"--plan {plan}")


def plan_for(model: Any, plan: str | None = None, *, measure: bool = False) -> ChosenPlan:
    """Call ``pop_ext.hf.choice.plan_for``, which needs transformers."""
    from pop_ext.hf.choice import plan_for as choose

    return choose(model, plan, measure=measure)


def require_one(given: dict[str, Any]) -> None:
    """Raise ValueError if more than one of these options has a value."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)}: expected one of them")


def chosen_products(int8: bool, fp8: bool) -> Products | None:
    """Return the 8-bit products that --int8 or --fp8 choose; None without them.

    Raises:
        ValueError: Both are given.
    """
    require_one({"--int8": int8 or None, "--fp8": fp8 or None})
    return "int8" if int8 else "fp8" if fp8 else None


def given_options(context: typer.Context) -> set[str]:
    """Return the options that the user gave on the command line, by their long names, even with their default value."""
    given = set()
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            given.add(parameter.opts[0])
    return given


def refuse_ignored(given: set[str], option: str, needed: Sequence[str], when: str = "") -> None:
    """Raise ValueError if ``option`` was given without one of the options that make a command read it.

    Args:
        given: Result of ``given_options``.
        option: The option.
        needed: Options, one of which it needs.
        when: Option that was given and makes it so, for the error.
    """
    if option in given and given.isdisjoint(needed):
        beside = f" beside {when}" if when else ""
        raise ValueError(f"{option}: expected it{beside} only with {' or '.join(needed)}, got it without")


def load_model(name: str, dtype: str, device: str) -> Any:
    """Load a causal language model of transformers in evaluation mode.

    Raises:
        OSError: There is no such model.
        ValueError: The dtype is unknown, or the device cannot run it.
    """
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
    has_cuda = bool(env_info.installation()["built_with"]["cuda"])
    expected = "cpu or cuda" if has_cuda else "cpu (this build has no CUDA kernels)"
    try:
        kind = torch.device(device).type
    except RuntimeError:  # torch has no such device
        kind = None
    if kind != "cpu" and not (kind == "cuda" and has_cuda):
        raise ValueError(f"--device: expected {expected}, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: expected cpu (torch finds no CUDA device), got {device!r}")


def check_tokens(model: Any, tokens: int) -> None:
    """Raise ValueError if sequences of --tokens are longer than a model takes."""
    from pop_ext.methods.calibration import longest_input

    limit = longest_input(model)
    if limit is not None and tokens > limit:
        raise ValueError(f"--tokens: expected at most the {limit} that the model takes, got {tokens}")


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model of transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads of torch; None leaves it."""
    if threads is not None:
        torch.set_num_threads(threads)
