"""``pop-ext report``: one self-contained page of what calibrate, eval and bench left in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pop_ext.cli import shared
from pop_ext.cli.shared import JsonOption


def report(
    folder: Annotated[Path, typer.Argument(help="Folder with results of calibrate, eval and bench.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; by default report.html there.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Bind tables and figures of a folder into one HTML page that needs no network."""
    with shared.errors():
        from pop_ext.cli.html_report import make_page

        page = make_page(folder)
        path = out or folder / "report.html"
        path.write_text(page.html, encoding="utf-8")
    if as_json:
        shared.print_json({"page": str(path), "from": page.sources, "bytes": path.stat().st_size})
    else:
        print(f"{path}: of {', '.join(page.sources)}")
