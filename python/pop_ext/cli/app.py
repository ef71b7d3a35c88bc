"""The typer application of ``pop-ext``; each command is a module beside this one."""

from __future__ import annotations

import typer

from pop_ext.cli.calibrate import calibrate
from pop_ext.cli.evaluate import evaluate
from pop_ext.cli.fit import fit
from pop_ext.cli.generate import generate
from pop_ext.cli.info import info
from pop_ext.cli.report import report
from pop_ext.cli.serve import serve

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # wraps the paragraphs of a docstring
    help="Prefill-Only Pruning (POP) for Hugging Face language models.\n\n"
    "A plan names layers to omit. Most tokens of a prompt skip them during prefill. Its last tokens and all of "
    "decoding run through every layer.",
)
app.command()(info)
app.command()(generate)
app.command()(calibrate)
app.command()(fit)
app.command("eval")(evaluate)
app.command()(report)
# Options that it does not know are those of the server.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
