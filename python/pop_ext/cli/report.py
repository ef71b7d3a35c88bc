"""``pop-ext report``: one self-contained HTML page of the results in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pop_ext.cli import output
from pop_ext.cli.options import JsonOption


def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder with results of calibrate, fit, eval or bench/run.py.", metavar="FOLDER")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="HTML file to write. Default: FOLDER/report.html.", metavar="FILE"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Collect the tables and figures of a folder in one HTML page that loads nothing from the network."""
    with output.errors_on_one_line():
        from pop_ext.cli.html_report import make_page

        page = make_page(folder)
        path = out or folder / "report.html"
        path.write_text(page.html, encoding="utf-8")
    if as_json:
        output.print_json({"page": str(path), "from": page.sources, "bytes": path.stat().st_size})
    else:
        print(f"{path}: made from {', '.join(page.sources)}")
