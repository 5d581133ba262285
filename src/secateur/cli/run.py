"""`secateur run`: a recipe, from the model's folder to the pruned one."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from secateur import recipe
from secateur.artifacts import save
from secateur.artifacts.steps import Surgery
from secateur.budget import Budget
from secateur.cli import shared
from secateur.cli.data import Data, example_input, overlap_note, read_data
from secateur.cli.training import Trainer
from secateur.core.errors import SecateurError
from secateur.core.files import write_text
from secateur.criteria import Criterion
from secateur.graph import Graph
from secateur.layers import drop_layers_
from secateur.masks import Masks
from secateur.prune import prune_
from secateur.recipe import Recipe
from secateur.record import Report
from secateur.shrink import shrink_
from secateur.shrink_page import page_of
from secateur.shrunk import Costs, ShrinkReport
from secateur.training import L0, GroupLasso, Method
from secateur.training.units import UnitMethod

RecipeFile = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help=f"A YAML file, or one that comes with Secateur: {', '.join(recipe.shipped())}.",
    ),
]


def run(
    name: RecipeFile,
    model: Annotated[Path | None, typer.Option(help="The model folder, instead of the recipe's.")] = None,
    data: Annotated[Path | None, typer.Option(help=f"To calibrate and train on: {shared.FORMATS}.")] = None,
    evaluate: Annotated[
        Path | None, typer.Option("--eval", help="To measure the loss on before and after, likewise.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the result and its report.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Check the recipe and stop after so many steps, saving nothing.")
    ] = None,
    save_every: Annotated[
        float, typer.Option(min=0, help="Minutes of training between states to go on from.")
    ] = 10.0,
    show: Annotated[bool, typer.Option("--show", help="Print the recipe, to begin one of your own.")] = False,
) -> None:
    """Carry out a recipe: prune, train, prune while training, and save the result with a report.

    The model, data and out that a recipe leaves open are given here. The same command goes on where training
    was killed.
    """
    file = recipe.find(name)
    if show:
        print(file.read_text(encoding="utf-8"), end="")
        return
    asked = recipe.load(file).filled(model=model, data=data, evaluate=evaluate, out=out)
    assert asked.model is not None and asked.data is not None and asked.out is not None
    shared.check_out(asked.model, asked.out)
    network, task = shared.open_dense(asked.model)
    read = partial(
        read_data, folder=asked.model, model=network, task=task, samples=asked.samples, length=asked.length
    )
    given = read(asked.data)
    if given.loss is None and asked.train is not None:
        raise SecateurError(f"A model for {task} has no loss to train on {asked.data}.")
    held_out = read(asked.evaluate) if asked.evaluate else None
    old = shared.loss_of(network, held_out)
    teacher = copy.deepcopy(network) if asked.train is not None and asked.train.distill is not None else None
    torch.manual_seed(asked.seed)
    pruned = _pruned(network, asked, given)
    report: Report | ShrinkReport | None = pruned
    method: Method | None = None
    trainer: Trainer | None = None
    if asked.train is not None:
        method = _method(network, asked, given)
        held = pruned.masks if pruned is not None else Masks({})
        trainer = Trainer(network, asked, given, held, method, teacher)
        if steps is not None:
            trainer.train(min(steps, asked.train.steps), None)
            shared.say(f"The recipe works for {steps} steps; nothing is saved.")
            return
        if trainer.resume():
            shared.say(f"Going on after step {trainer.step} of {asked.train.steps}.")
        trainer.train(asked.train.steps, save_every)
        if method is not None:
            method.check()
            report = method.report()
    assert report is not None
    surgery: Surgery | None = None
    if isinstance(method, UnitMethod | GroupLasso):
        shrunk, surgery = _shrunk(network, method)
        report = replace(shrunk, history=method.history)
    report = replace(report, settings={**report.settings, "seed": str(asked.seed)})
    if trainer is not None:
        settings = {**report.settings, "training": str(asked.train)}
        report = replace(report, settings=settings, losses=trainer.losses())
    notes = [*given.notes, overlap_note(given, held_out)]
    if held_out is not None:
        notes.append(shared.loss_note(asked.evaluate, task, old, shared.loss_of(network, held_out)))
    report = replace(report, notes=(*report.notes, *(note for note in notes if note)))
    save(network, asked.out, report=report, surgery=surgery, source=asked.model)
    write_text(asked.out / "report.html", page_of(report))
    if trainer is not None:
        trainer.remove()
    shared.console.print(report)
    shared.say(f"Saved in {asked.out}; the report: {asked.out / 'report.html'}")


def _pruned(model: nn.Module, asked: Recipe, given: Data) -> Report | None:
    if asked.prune is None:
        return None
    criterion = recipe.built("prune.criterion", asked.prune.get("criterion"))
    loss = given.loss if isinstance(criterion, Criterion) else None  # a solver measures none
    return recipe.call("prune", prune_, dict(asked.prune), model=model, batches=given.batches, loss=loss)


def _method(model: nn.Module, asked: Recipe, given: Data) -> Method | None:
    assert asked.train is not None
    if asked.train.method is None:
        return None
    more: dict[str, Any] = {"batches": given.batches[:16], "loss": given.loss}
    if recipe.takes_graph(asked.train.method):
        example = example_input(model)
        if example is None:
            raise SecateurError("The model does not say what input it takes, so its graph cannot be traced.")
        more["graph"] = Graph.trace(model, **example)
    return recipe.method_of(asked.train.method, model, **more)


def _shrunk(model: nn.Module, method: UnitMethod | GroupLasso) -> tuple[ShrinkReport, Surgery]:
    """Units and blocks that training closed or emptied are removed, which changes nothing of the function."""
    example = example_input(model)
    if isinstance(method, GroupLasso):
        report = shrink_(model, example, Budget.params(1.0), sparsity=method.zero_units())
        return report, report.cuts
    end: dict[str, Any] = {"criterion": method, "kinds": method.kinds, "sparsity": method.closed()}
    report = shrink_(model, example, Budget.params(1.0), **end)
    closed = method.closed_blocks() if isinstance(method, L0) else ()
    if not closed:
        return report, report.cuts
    dropped = drop_layers_(model, closed, example)
    after = Costs.of(model, example)
    report = replace(
        report,
        after=after.measured,
        operators_after=after.operators,
        why_not_faster=after.slower_than_expected(Costs(report.before, report.operators_before, after.width)),
        got=float(after.measured.parameters),
        notes=(*report.notes, *dropped.notes),
        dropped=closed,
    )
    return report, (*report.cuts, dropped)
