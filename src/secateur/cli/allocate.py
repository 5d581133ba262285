"""`secateur allocate`: how much to remove from each layer, measured; a file for `secateur prune`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from secateur.cli import choices, shared
from secateur.cli.data import read_data
from secateur.cli.options import Also, Exclude, Include, PatternText, where_of
from secateur.core.errors import SecateurError
from secateur.levels import Measured, by_error, by_search


class How(str, Enum):
    """What decides."""

    search = "search"
    error = "error"


_SEARCH = How.search
_SPARSEGPT = choices.SolverName("sparsegpt")


def allocate(
    model_dir: shared.Folder,
    data: Annotated[Path, typer.Option(help=f"Calibration data: {shared.FORMATS}; or self.")],
    sparsity: Annotated[float, typer.Option(help="Fraction of weights to remove in all, 0 to 1.")],
    out: Annotated[Path, typer.Option(help="The .json file, for `secateur prune --allocation`.")],
    how: Annotated[
        How,
        typer.Option(
            help="search: by evolution on the whole model's outputs; error: the least sum of layer errors, "
            "each weighted with what it does to the outputs.",
        ),
    ] = _SEARCH,
    method: Annotated[
        choices.SolverName, typer.Option(help="Solver that makes the layers at all levels that are tried.")
    ] = _SPARSEGPT,
    pattern: PatternText = None,
    generations: Annotated[int, typer.Option(min=0, help="Of the search.")] = 50,
    step: Annotated[float, typer.Option(help="Between the levels of a layer, as a sparsity.")] = 0.05,
    reach: Annotated[float, typer.Option(help="How far a layer may be from --sparsity.")] = 0.25,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the weights at all levels, as large as the model for each level, and the state "
            "of the search: a killed run goes on there, and one with more generations continues. In memory "
            "if not given."
        ),
    ] = None,
    samples: shared.Samples = 64,
    length: shared.Length = 512,
    data_seed: shared.DataSeed = None,
    pack: shared.Pack = False,
    include: Include = None,
    exclude: Exclude = None,
    also: Also = None,
    seed: shared.Seed = 0,
) -> None:
    """Measure how much each layer bears, at the same total; the model is loaded whole and not changed."""
    if out.suffix != ".json" or out.is_dir():
        raise SecateurError(f"--out is a .json file, for --allocation of `secateur prune`; got {out}.")
    model, task = shared.open_dense(model_dir)
    read = read_data(data, model_dir, model, task, samples, length, data_seed, pack)
    settings: dict[str, Any] = {
        "batches": read.batches,
        "solver": choices.SOLVERS[method.value](),
        "pattern": choices.pattern(pattern, method.value),
        "where": where_of(include, exclude, also),
        "step": step,
        "reach": reach,
        "folder": work,
    }
    if how is How.error:
        found = by_error(model, sparsity, **settings)
    else:
        found = by_search(model, sparsity, generations=generations, seed=seed, **settings)
    found.save(out)
    shared.console.print(_table(found))
    shared.say(_extremes(found))
    for note in read.notes:
        shared.say(note)
    shared.say(f"Saved as {out}: prune with --sparsity {sparsity:g} --allocation {out}")


def _table(found: Measured) -> Table:
    """What was tried."""
    table = Table(title=f"Distance from the dense model's outputs at a sparsity of {found.sparsity:g}")
    table.add_column("allocation")
    table.add_column("distance", justify="right")
    table.add_column("on data held out", justify="right")
    # Of the search only the starts and the generations that were better.
    best = float("inf")
    for i, tried in enumerate(found.history):
        if i < 2 or tried.distance < best:
            beside = "" if tried.held_out is None else f"{tried.held_out:.4f}"
            table.add_row(tried.what, f"{tried.distance:.4f}", beside)
        best = min(best, tried.distance)
    return table


def _extremes(found: Measured) -> str:
    least, most = (f(found.shares, key=lambda name: found.shares[name]) for f in (min, max))
    return f"Least from {least} ({found.shares[least]:.3f}), most from {most} ({found.shares[most]:.3f})."
