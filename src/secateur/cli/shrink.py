"""`secateur shrink`: smaller for real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from secateur.artifacts import save
from secateur.budget import Budget
from secateur.cli import choices, shared
from secateur.cli.data import Data, example_input, overlap_note, read_data
from secateur.core.errors import SecateurError
from secateur.core.files import write_text
from secateur.dropped import DropReport, drop_least_
from secateur.graph import Graph
from secateur.shrink import DEFAULT_KINDS, shrink_
from secateur.shrink_page import drop_page, shrink_page
from secateur.shrunk import ShrinkReport

KINDS_HELP = (
    f"Kinds of groups to cut, separated by commas; by default {', '.join(DEFAULT_KINDS)}. Also width, "
    "head_dim and experts; all for every kind."
)
_MAGNITUDE = choices.GroupMethod("magnitude")
_PARALLEL = choices.RepairName("parallel")
_ISOMORPHIC = choices.ScopeName("isomorphic")


def shrink(
    model_dir: shared.Folder,
    out: Annotated[Path | None, typer.Option(help="Folder for the smaller model and its report.")] = None,
    params: Annotated[float | None, typer.Option(help="Fraction of the parameters that may remain.")] = None,
    macs: Annotated[
        float | None, typer.Option(help="Fraction of the multiply-accumulates that may remain.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="Fraction of the bytes of weights and KV cache that may remain.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Fraction of a forward pass's time, measured here, that may remain.")
    ] = None,
    drop_layers: Annotated[
        int, typer.Option(min=0, help="Blocks to drop first, those of least influence.")
    ] = 0,
    method: Annotated[
        choices.GroupMethod, typer.Option("--method", help="The criterion: what a unit is worth.")
    ] = _MAGNITUDE,
    scope: Annotated[
        choices.ScopeName, typer.Option("--scope", help="Which units are ranked together.")
    ] = _ISOMORPHIC,
    kinds: Annotated[str | None, typer.Option(help=KINDS_HELP)] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="No groups whose name, or a tensor of theirs, matches; repeatable."),
    ] = None,
    multiple_of: Annotated[
        int, typer.Option(min=1, help="Kept neurons and filters are a multiple of this.")
    ] = 1,
    minimum: Annotated[int, typer.Option(min=1, help="Units of a group that stay in any case.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Score and cut in so many steps.")] = 1,
    repair: Annotated[
        choices.RepairName, typer.Option(help="Fit the weights that stay to --data by least squares.")
    ] = _PARALLEL,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in the KV cache, for --memory.")] = 1,
    context: Annotated[int, typer.Option(min=0, help="Tokens in the KV cache, for --memory.")] = 0,
    data: shared.DataFile = None,
    evaluate: shared.EvalFile = None,
    samples: shared.Samples = 64,
    length: shared.Length = 512,
    data_seed: shared.DataSeed = None,
    pack: shared.Pack = False,
    seed: shared.Seed = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what can be cut and what would go; write nothing.")
    ] = False,
) -> None:
    """Remove neurons, heads, filters and whole layers from a model, and save what is left.

    The result is an ordinary, smaller model. Where its configuration can express it, plain from_pretrained
    loads it; else sc.load does, and the report says so.
    """
    if out is not None:
        shared.check_out(model_dir, out)
    elif not dry_run:
        raise SecateurError("Say where the smaller model goes, --out FOLDER, or look first with --dry-run.")
    budget = _budget(params, macs, memory, seconds, batch, context)
    if budget is None and not drop_layers:
        raise SecateurError("Say how small: one of --params, --macs, --memory, --seconds, or --drop-layers.")
    model, task = shared.open_dense(model_dir)
    example = example_input(model)
    if example is None:
        raise SecateurError(
            f"{model_dir} does not say what input its model takes: call sc.shrink_ with an example."
        )
    read = partial(read_data, folder=model_dir, model=model, task=task, samples=samples, length=length)
    calibration = read(data, seed=data_seed, pack=pack) if data is not None else None
    held_out = read(evaluate) if evaluate is not None else None
    old_loss = shared.loss_of(model, held_out)
    if dry_run:
        shared.say(str(Graph.trace(model, **example)))
    history: list[Any] = []
    notes: list[str] = [*calibration.notes] if calibration else []
    if overlap := overlap_note(calibration, held_out):
        notes.append(overlap)
    dropped: DropReport | None = None
    report: ShrinkReport | None = None
    if drop_layers:
        dropped = _drop(model, drop_layers, example, calibration)
        history.append(dropped.record)
        notes += dropped.record.notes
    if budget is not None:
        report = shrink_(
            model,
            example,
            budget,
            criterion=choices.GROUP_METHODS[method.value](seed),
            scope=choices.SCOPES[scope.value](),
            kinds=_kinds(kinds),
            exclude=tuple(exclude or ()),
            batches=calibration.batches if calibration else None,
            loss=calibration.loss if calibration else None,
            multiple_of=multiple_of,
            minimum=minimum,
            steps=steps,
            repair=choices.REPAIRS[repair.value],
        )
        history += report.cuts
    if held_out is not None:
        notes.append(shared.loss_note(evaluate, task, old_loss, shared.loss_of(model, held_out)))
    shown: ShrinkReport | DropReport
    if report is not None:
        gone = dropped.record.dropped if dropped is not None else ()
        shown = report = replace(report, notes=(*notes, *report.notes), dropped=gone)
        page = shrink_page(report)
    else:
        assert dropped is not None  # one of both was asked for
        shown = dropped = replace(dropped, notes=tuple(notes))  # those of the record are among them
        page = drop_page(dropped)
    shared.console.print(shown)
    if dry_run or out is None:
        shared.say("A dry run: nothing was written.")
        return
    save(model, out, report=shown, surgery=history, source=model_dir)
    write_text(out / "report.html", page)
    shared.say(f"Saved in {out}; the report: {out / 'report.html'}")


def _budget(
    params: float | None,
    macs: float | None,
    memory: float | None,
    seconds: float | None,
    batch: int,
    context: int,
) -> Budget | None:
    given: dict[str, tuple[float | None, Callable[[float], Budget]]] = {
        "--params": (params, Budget.params),
        "--macs": (macs, Budget.macs),
        "--memory": (memory, lambda f: Budget.memory(f, batch=batch, context=context)),
        "--seconds": (seconds, Budget.seconds),
    }
    asked = [(value, make) for value, make in given.values() if value is not None]
    if len(asked) > 1:
        raise SecateurError(f"One budget at a time: give one of {', '.join(given)}.")
    return asked[0][1](asked[0][0]) if asked else None


def _kinds(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return DEFAULT_KINDS
    return None if text == "all" else tuple(kind.strip() for kind in text.split(","))


def _drop(model: nn.Module, n: int, example: Any, calibration: Data | None) -> DropReport:
    if calibration is None:
        raise SecateurError("--drop-layers measures the influence of each block: give it --data.")
    return drop_least_(model, n, example, calibration.batches)
