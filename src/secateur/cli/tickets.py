"""`secateur tickets`: what folders of lottery-ticket experiments hold, as tables, pages and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from secateur.cli.shared import say
from secateur.core.errors import ArtifactError
from secateur.core.files import write_text
from secateur.lottery import Experiment, Store, TicketTable, barriers
from secateur.ticket_demo import experiment
from secateur.ticket_page import compare_page, plot_tickets

app = typer.Typer(
    help="Winning tickets: experiments with iterative pruning and rewinding.", no_args_is_help=True
)

Runs = Annotated[Path, typer.Argument(metavar="RUNS", help="A folder that sc.Lottery wrote.")]
Name = Annotated[str | None, typer.Option(help="Of the experiment, where the folder holds several.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the trainings, the page and the picture.")] = Path(
        "tickets-demo"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Networks; the bands are over them.")] = 5,
) -> None:
    """Find winning tickets in small networks on handwritten digits, and show them beside their controls.

    Stopped and called again, it goes on with what is missing.
    """
    lottery = experiment(range(seeds))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are so small that a second thread gains nothing
    try:
        table = lottery(out / "runs")
        barriers(lottery, out / "runs")
    finally:
        torch.set_num_threads(threads)
    plot_tickets(table, out / "runs", out, lottery.name)
    say(str(table))
    say(f"The page: {out / 'tickets.html'}; the picture: {out / 'tickets.png'}")


@app.command()
def show(runs: Runs, name: Name = None) -> None:
    """Print accuracies at each level: mean over seeds, and half the 95 % confidence interval, in per cent."""
    for found, table in _chosen(runs, name):
        done = f"{len(table)} of {len(found.keys)} trainings finished"
        say(f"{found.name}: {done}\n{table}" if len(table) else f"{found.name}: {done}")


@app.command()
def plot(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="Folder for tickets.html, tickets.png and tickets.csv.")],
    name: Name = None,
) -> None:
    """Write the page, the picture and the table of an experiment."""
    found, table = _one(runs, name)
    plot_tickets(table, runs, out, found.name)
    say(f"The page: {out / 'tickets.html'}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="Folders that sc.Lottery wrote.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
) -> None:
    """Show the tickets of several experiments side by side: rewinding policies, criteria, data sets."""
    tables: dict[str, TicketTable] = {}
    for folder in runs:
        for found, table in _chosen(folder, None):
            if len(table):
                name = found.name if found.name not in tables else f"{found.name} ({folder})"
                tables[name if name not in tables else f"{name}, {len(tables)}"] = table
    if not tables:
        raise ArtifactError("No training in these folders is finished yet.")
    write_text(out, compare_page(tables))
    say(f"{len(tables)} experiments. The page: {out}")


def _chosen(folder: Path, name: str | None) -> list[tuple[Experiment, TicketTable]]:
    """The experiments of a folder, or those of a name, with what is finished of each."""
    if not (folder / "experiments").is_dir():
        raise ArtifactError(f"{folder} holds no experiment that sc.Lottery wrote.")
    store = Store(folder)
    all_ = store.experiments()
    chosen = [e for e in all_ if name is None or e.name == name]
    if not chosen:
        names = ", ".join(dict.fromkeys(e.name for e in all_))
        raise ArtifactError(f"{folder} holds no experiment named {name!r}, but {names}.")
    return [(e, TicketTable(tuple(store.get(k) for k in e.keys if store.has(k)))) for e in chosen]


def _one(folder: Path, name: str | None) -> tuple[Experiment, TicketTable]:
    """The largest experiment: one that was extended contains what it was."""
    found = [pair for pair in _chosen(folder, name) if len(pair[1])]
    if not found:
        raise ArtifactError(f"No training in {folder} is finished yet.")
    return max(found, key=lambda pair: len(pair[1]))
