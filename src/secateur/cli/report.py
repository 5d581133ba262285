"""`secateur report`: what was done to a saved model, as a table and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import shared
from secateur.core.errors import SecateurError
from secateur.core.files import write_text
from secateur.saved_report import load_report
from secateur.shrink_page import page_of


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Of a saved model; or a report.json.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; report.html beside the report if not given.")
    ] = None,
) -> None:
    """Show what was done to a saved model, and write the page: for models saved from Python.

    The page has no histograms of weights: those `secateur prune` draws, from the model itself.
    """
    found = load_report(folder)
    target = out or (folder if folder.is_dir() else folder.parent) / "report.html"
    if out is None and target.exists():
        shared.console.print(found)
        shared.say(f"The page is there: {target}. Give --out to write another.")
        return
    if not target.parent.is_dir():
        raise SecateurError(f"There is no folder {target.parent}.")
    write_text(target, page_of(found))
    shared.console.print(found)
    shared.say(f"The page: {target}")
