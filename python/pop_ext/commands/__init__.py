"""The commands of ``pop-ext``, a module each. Needs the extras ``cli`` and, for a model, ``hf``."""

from __future__ import annotations

import typer

from pop_ext.commands.evaluate import evaluate
from pop_ext.commands.generate import generate
from pop_ext.commands.info import info
from pop_ext.commands.shared import ManyValues
from pop_ext.layer_ranges import parse_layers

__all__ = ["app", "parse_layers"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prefill-Only Pruning for Hugging Face language models.",
)
for command in (generate, info):
    app.command()(command)
app.command("eval", cls=ManyValues)(evaluate)
