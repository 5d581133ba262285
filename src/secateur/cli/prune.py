"""`secateur prune`: weights to zero, in memory or block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur import pages
from secateur.allocation import Allocation
from secateur.artifacts import load, load_hf, save, task_of
from secateur.checkpoint import Source, amend, prune_checkpoint
from secateur.cli import choices, shared
from secateur.cli.data import SELF, Data, example_input, overlap_note, read_data
from secateur.cli.options import Also, Exclude, Include, PatternText, where_of
from secateur.core.errors import SecateurError, StreamError
from secateur.core.files import write_text
from secateur.core.names import Where
from secateur.inspection import inspect as inspect_model
from secateur.patterns import Pattern
from secateur.prune import prune_
from secateur.record import Report
from secateur.stream import ranks
from secateur.stream.tuning import Reconstruct

PrunerName = Annotated[
    choices.Pruner,
    typer.Option(
        "--method",
        help="What a weight is worth, or (sparsegpt, alps) a solver, which also fits the weights that stay.",
    ),
]
AllocationText = Annotated[
    str,
    typer.Option(
        "--allocation",
        help=f"How much to remove from each layer: {', '.join(choices.ALLOCATIONS)}, or a .json file that "
        "`secateur allocate` wrote.",
    ),
]
SparsityValue = Annotated[
    float | None,
    typer.Option("--sparsity", help="Fraction of weights to remove, 0 to 1; a pattern N:M brings its own."),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        min=1, help="Measure and prune in so many steps: better at high sparsity for criteria that use data."
    ),
]
Epochs = Annotated[
    int,
    typer.Option(
        "--reconstruct",
        min=0,
        help="With a solver: epochs of tuning the kept weights of each block towards the dense model.",
    ),
]
Correction = Annotated[
    float | None,
    typer.Option(
        "--correction",
        help="With a solver: fit layers to the dense model's outputs, with this damping, such as 0.01.",
    ),
]
_MAGNITUDE = choices.Pruner("magnitude")
_CORRECTION = 0.01  # what goes with --reconstruct unless another is given


@dataclass(frozen=True)
class _Asked:
    """What the options say."""

    model_dir: Path
    out: Path
    method: str
    sparsity: float
    pattern: Pattern
    allocation: Allocation
    where: Where | None
    rounds: int | None
    seed: int
    correction: float | None
    reconstruct: Reconstruct | None
    data: Path | None
    evaluate: Path | None
    read: Callable[..., Data]  # of a file, with model and task
    calibrate: Callable[..., Data]  # of that of --data


def prune(
    model_dir: shared.Folder,
    out: Annotated[Path, typer.Option(help="Folder for the pruned model and its report.")],
    method: PrunerName = _MAGNITUDE,
    sparsity: SparsityValue = None,
    pattern: PatternText = None,
    allocation: AllocationText = "uniform",
    data: shared.DataFile = None,
    evaluate: shared.EvalFile = None,
    samples: shared.Samples = 64,
    length: shared.Length = 512,
    data_seed: shared.DataSeed = None,
    pack: shared.Pack = False,
    include: Include = None,
    exclude: Exclude = None,
    also: Also = None,
    rounds: Rounds = None,
    correction: Correction = None,
    reconstruct: Epochs = 0,
    in_memory: Annotated[
        bool, typer.Option("--in-memory", help="Load the whole model, also where blocks could be streamed.")
    ] = False,
    seed: shared.Seed = 0,
) -> None:
    """Prune a model in one shot and save it, loadable as before, with a report.

    The solvers (sparsegpt, alps) read, prune and write one block at a time, in the memory of one block:
    killed at any moment, the same command goes on behind the last block. Started by torchrun, several
    processes share the data and the layers. A model that cannot be run block by block is loaded whole, and
    the report says why.
    """
    shared.check_out(model_dir, out)
    chosen = choices.pattern(pattern, method.value)
    read = partial(read_data, folder=model_dir, samples=samples, length=length)
    asked = _Asked(
        model_dir,
        out,
        method.value,
        choices.sparsity(sparsity, chosen),
        chosen,
        choices.allocation_of(allocation),
        where_of(include, exclude, also),
        rounds,
        seed,
        _CORRECTION if reconstruct and correction is None else correction,
        Reconstruct(epochs=reconstruct) if reconstruct else None,
        data,
        evaluate,
        read,
        partial(read, seed=data_seed, pack=pack),
    )
    why = None
    if method.value in choices.SOLVERS and not in_memory:
        try:
            with ranks.start():
                _streamed(asked)
            return
        except StreamError as error:
            if ranks.started():
                raise  # each process would load, prune and save the whole model
            why = f"In memory, not block by block: {error}"
    _whole(asked, why)


def _streamed(asked: _Asked) -> None:
    """Block by block; the model is loaded only to write its own text or to be measured with --eval."""
    if asked.data is None:
        raise SecateurError(f"--method {asked.method} fits weights to data: give it with --data.")
    model: Any = Source(asked.model_dir).model
    task = task_of(model)
    if asked.data == SELF:
        model, task = load_hf(asked.model_dir)
    calibration = asked.calibrate(asked.data, model=model, task=task)
    model = None  # one block at a time from here on
    held_out, old = _measured(asked, load_hf) if asked.evaluate else (None, 0.0)
    report = prune_checkpoint(
        asked.model_dir,
        asked.out,
        choices.SOLVERS[asked.method](),
        asked.sparsity,
        batches=calibration.batches,
        pattern=asked.pattern,
        allocation=asked.allocation,
        where=asked.where,
        correction=asked.correction,
        reconstruct=asked.reconstruct,
    )
    if ranks.rank() > 0:
        return
    notes = [*calibration.notes, overlap_note(calibration, held_out)]
    if held_out is not None:
        pruned = load(asked.out)
        notes.append(shared.loss_note(asked.evaluate, task, old, shared.loss_of(pruned, held_out)))
    report = replace(report, notes=(*report.notes, *(note for note in notes if note)))
    amend(asked.out, report)
    write_text(asked.out / "report.html", pages.prune_page(report))
    _say(report, asked.out)


def _measured(asked: _Asked, open_: Callable[[Path], Any]) -> tuple[Data, float]:
    """The data of --eval, and the dense model's loss on it."""
    model, task = open_(asked.model_dir)
    held_out = asked.read(asked.evaluate, model=model, task=task)
    return held_out, shared.loss_of(model, held_out)


def _whole(asked: _Asked, why: str | None) -> None:
    """The model in memory."""
    model, task = shared.open_dense(asked.model_dir)
    calibration = asked.calibrate(asked.data, model=model, task=task) if asked.data else None
    held_out = asked.read(asked.evaluate, model=model, task=task) if asked.evaluate else None
    before = inspect_model(model, asked.where)
    old_loss = shared.loss_of(model, held_out)
    solver = choices.SOLVERS.get(asked.method)
    report = prune_(
        model,
        solver() if solver else choices.METHODS[asked.method](asked.seed),
        asked.sparsity,
        pattern=asked.pattern,
        allocation=asked.allocation,
        where=asked.where,
        batches=calibration.batches if calibration else None,
        loss=calibration.loss if calibration and not solver else None,
        rounds=asked.rounds,
        correction=asked.correction,
        reconstruct=asked.reconstruct,
        example=example_input(model),
    )
    notes = [why, *(calibration.notes if calibration else ()), overlap_note(calibration, held_out)]
    if held_out is not None:
        notes.append(shared.loss_note(asked.evaluate, task, old_loss, shared.loss_of(model, held_out)))
    report = replace(report, notes=(*report.notes, *(note for note in notes if note)))
    save(model, asked.out, report=report, source=asked.model_dir)
    page = pages.prune_page(report, before, inspect_model(model, asked.where))
    write_text(asked.out / "report.html", page)
    _say(report, asked.out)


def _say(report: Report, out: Path) -> None:
    shared.console.print(report)
    shared.say(f"Saved in {out}; the report: {out / 'report.html'}")
