"""The commands of ``pop-ext``, a module each. Needs the extras ``cli`` and, for a model, ``hf``."""

from __future__ import annotations

import typer

from pop_ext.commands.bench import bench
from pop_ext.commands.calibrate import calibrate
from pop_ext.commands.evaluate import evaluate
from pop_ext.commands.fit import fit
from pop_ext.commands.generate import generate
from pop_ext.commands.info import info
from pop_ext.commands.report import report
from pop_ext.commands.shared import ManyValues
from pop_ext.layer_ranges import parse_layers

__all__ = ["app", "parse_layers"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prefill-Only Pruning for Hugging Face language models.",
)
app.command()(info)
app.command()(generate)
app.command(cls=ManyValues)(calibrate)
app.command(cls=ManyValues)(fit)
app.command("eval", cls=ManyValues)(evaluate)
app.command()(report)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)
