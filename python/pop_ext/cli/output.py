"""Print for the commands: errors on one line, JSON, tables, and a spinner while a model loads."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from pop_ext.utils.json import finite


@contextmanager
def errors_on_one_line() -> Iterator[None]:
    """Print an exception's message on standard error and exit, and warnings of pop_ext on a line each.

    The status is 2 for errors that the user can mend (ValueError, OSError, ImportError), 1 for failures (RuntimeError,
    MemoryError).
    """
    try:
        with _warnings_on_one_line():
            yield
    except (ValueError, OSError, ImportError) as error:
        hint = " (pip install 'pop_ext[hf]')" if "transformers" in str(getattr(error, "name", "")) else ""
        print(f"pop-ext: {error}{hint}", file=sys.stderr)
        raise typer.Exit(2) from None
    except (RuntimeError, MemoryError) as error:
        print(f"pop-ext: {str(error).strip() or type(error).__name__}", file=sys.stderr)
        raise typer.Exit(1) from None


@contextmanager
def _warnings_on_one_line() -> Iterator[None]:
    """Print warnings that pop_ext gives inside the block as a line on standard error; others as ever."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_line(message: Warning | str, *where: Any, **more: Any) -> None:
            text = str(message)
            if text.startswith("pop_ext: "):
                print(f"pop-ext: warning: {text.removeprefix('pop_ext: ')}", file=sys.stderr, flush=True)
            else:
                show(message, *where, **more)

        warnings.showwarning = show_line
        yield


@contextmanager
def option_named(option: str, argument: str) -> Iterator[None]:
    """Let errors of a function's argument name the option that set it."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        if not text.startswith(f"{argument}:"):
            raise
        raise ValueError(option + text.removeprefix(argument)) from None


@contextmanager
def products_named(products: str | None) -> Iterator[None]:
    """Let errors of the argument ``int8`` or ``fp8``, and of a model without a native form, name the option."""
    if products is None:
        yield
        return
    from pop_ext.hf.architectures import UnsupportedModelError

    option = f"--{products}"
    try:
        with option_named(option, products):
            yield
    except UnsupportedModelError as error:
        raise ValueError(f"{option}: expected a model with a native form; {error}") from None


def loading_spinner(quiet: bool) -> AbstractContextManager[Any]:
    """Show a spinner while a model loads, if standard error is a terminal.

    A thread draws it, so it must end before anything is timed.
    """
    console = Console(stderr=True)
    return nullcontext() if quiet or not console.is_terminal else console.status("loading")


def print_json(report: dict[str, Any]) -> None:
    """Print a report as JSON; NaN and infinity, such as the standard error of a single prompt, become null."""
    print(json.dumps(finite(report), indent=2, allow_nan=False))


def new_table(*headings: str) -> Table:
    """Return an empty table: a left-aligned column of names, then right-aligned columns of numbers."""
    table = Table(box=box.SIMPLE)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return table


def draw_figures(draw: Callable[..., list[str]], *arguments: Any) -> list[str]:
    """Call ``draw`` and return the paths of its figures; without matplotlib print a note and return none."""
    try:
        return draw(*arguments)
    except ImportError as error:
        print(f"pop-ext: no figures: {error}", file=sys.stderr)
        return []
