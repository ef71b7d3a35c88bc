"""The commands of ``pop-ext``, a module each. Needs the extras ``cli`` and, for a model, ``hf``."""

from __future__ import annotations

import typer

from pop_ext.cli.bench import bench
from pop_ext.cli.calibrate import calibrate
from pop_ext.cli.evaluate import evaluate
from pop_ext.cli.fit import fit
from pop_ext.cli.generate import generate
from pop_ext.cli.info import info
from pop_ext.cli.report import report
from pop_ext.cli.shared import ManyValues
from pop_ext.utils.layer_ranges import parse_layers

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
