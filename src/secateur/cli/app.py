"""The commands. Each reads its input, calls the API once, and writes a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import secateur
from secateur import demo as job
from secateur import pages
from secateur.artifacts import load_hf, save
from secateur.cli import choices
from secateur.cli.data import example_input, read_data
from secateur.cli.evaluate import evaluate
from secateur.cli.shared import (
    FORMATS,
    DataFile,
    EvalFile,
    Folder,
    Length,
    Samples,
    Seed,
    check_out,
    console,
    loss_note,
    loss_of,
    say,
)
from secateur.cli.shrink import shrink
from secateur.core.errors import SecateurError
from secateur.core.files import write_text
from secateur.core.names import Where
from secateur.inspection import inspect as inspect_model
from secateur.layerwise import sensitivity as scan_layers
from secateur.prune import prune_
from secateur.report.figures import save as save_figure

app = typer.Typer(
    help="Pruning for PyTorch: exact, plain, small.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Globs = list[str] | None
Include = Annotated[Globs, typer.Option(help="Only weights whose name matches this glob; repeatable.")]
Exclude = Annotated[Globs, typer.Option(help="No weights whose name matches this glob; repeatable.")]
Also = Annotated[
    Globs,
    typer.Option(help="Add these whatever their role: head, embeddings, norms, biases; repeatable."),
]
MethodName = Annotated[
    choices.Method, typer.Option("--method", help="The criterion: what a weight is worth.")
]
PrunerName = Annotated[
    choices.Pruner,
    typer.Option(
        "--method",
        help="What a weight is worth, or (sparsegpt, alps) a solver, which also fits the weights that stay.",
    ),
]
AllocationName = Annotated[
    choices.AllocationName, typer.Option("--allocation", help="How much to remove from each layer.")
]
PatternText = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        help="unstructured, row, N:M such as 2:4, or a block such as 4x1. By default row for wanda and "
        "unstructured for all others.",
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
_MAGNITUDE = choices.Method("magnitude")
_PRUNE_MAGNITUDE = choices.Pruner("magnitude")
_UNIFORM = choices.AllocationName("uniform")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        say(secateur.__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")] = Path("demo-report"),
    seeds: Annotated[int, typer.Option(min=1, help="Networks trained; the spread is over them.")] = 3,
) -> None:
    """Train a small network on handwritten digits, prune it in many ways, and show what happened."""
    result = job.run(seeds)
    job.write(result, out)
    console.print(job.table(result))
    say(f"{result.seconds:.0f} seconds. The report: {out / 'report.html'}")


@app.command()
def inspect(
    model_dir: Folder,
    out: Annotated[Path | None, typer.Option(help="Folder for the page, the JSON and a picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    include: Include = None,
    exclude: Exclude = None,
    also: Also = None,
) -> None:
    """Show how the weights of each layer are distributed, and what is zero already."""
    model, _ = load_hf(model_dir)
    found = inspect_model(model, _where(include, exclude, also))
    if as_json:
        print(json.dumps(found.to_dict(), allow_nan=False))
    else:
        console.print(found)
    if out is None:
        return
    found.save(out / "inspect.json")
    write_text(out / "inspect.html", pages.inspect_page(found))
    for figure in pages.weights_section(found, None).figures:
        save_figure(figure, out / "weights.svg")
    if not as_json:
        say(f"The page: {out / 'inspect.html'}")


@app.command()
def prune(
    model_dir: Folder,
    out: Annotated[Path, typer.Option(help="Folder for the pruned model and its report.")],
    method: PrunerName = _PRUNE_MAGNITUDE,
    sparsity: SparsityValue = None,
    pattern: PatternText = None,
    allocation: AllocationName = _UNIFORM,
    data: DataFile = None,
    evaluate: EvalFile = None,
    samples: Samples = 64,
    length: Length = 512,
    include: Include = None,
    exclude: Exclude = None,
    also: Also = None,
    rounds: Rounds = None,
    seed: Seed = 0,
) -> None:
    """Prune a model in one shot and save it, loadable as before, with a report."""
    check_out(model_dir, out)
    chosen = choices.pattern(pattern, method.value)
    asked = choices.sparsity(sparsity, chosen)
    model, task = load_hf(model_dir)
    read = partial(read_data, folder=model_dir, model=model, task=task, samples=samples, length=length)
    calibration = read(data) if data is not None else None
    held_out = read(evaluate) if evaluate is not None else None
    where = _where(include, exclude, also)
    before = inspect_model(model, where)
    old_loss = loss_of(model, held_out)
    solver = choices.SOLVERS.get(method.value)
    report = prune_(
        model,
        solver() if solver else choices.METHODS[method.value](seed),
        asked,
        pattern=chosen,
        allocation=choices.ALLOCATIONS[allocation.value],
        where=where,
        batches=calibration.batches if calibration else None,
        loss=calibration.loss if calibration and not solver else None,
        rounds=rounds,
        example=example_input(model),
    )
    if held_out is not None:
        note = loss_note(evaluate, task, old_loss, loss_of(model, held_out))
        report = replace(report, notes=(*report.notes, note))
    save(model, out, report=report, source=model_dir)
    write_text(out / "report.html", pages.prune_page(report, before, inspect_model(model, where)))
    console.print(report)
    say(f"Saved in {out}; the report: {out / 'report.html'}")


app.command()(shrink)
app.command("eval")(evaluate)


@app.command()
def sensitivity(
    model_dir: Folder,
    data: Annotated[Path, typer.Option(help=f"Data to measure the loss on: {FORMATS}.")],
    out: Annotated[Path, typer.Option(help="Folder for the page and the JSON.")] = Path("sensitivity"),
    method: MethodName = _MAGNITUDE,
    sparsities: Annotated[str, typer.Option(help="To try, separated by commas.")] = "0.5,0.7,0.8,0.9,0.95",
    pattern: PatternText = None,
    samples: Samples = 16,
    length: Length = 256,
    include: Include = None,
    exclude: Exclude = None,
    also: Also = None,
    seed: Seed = 0,
) -> None:
    """Prune one layer at a time and measure the loss: which layers bear it, and which do not."""
    grid = _numbers(sparsities)
    model, task = load_hf(model_dir)
    read = read_data(data, model_dir, model, task, samples, length)
    if read.loss is None:
        raise SecateurError(
            f"A model for {task} has no loss to measure on {data}: call sc.sensitivity with your own metric."
        )
    found = scan_layers(
        model,
        choices.METHODS[method.value](seed),
        sparsities=grid,
        pattern=choices.pattern(pattern, method.value),
        where=_where(include, exclude, also),
        batches=read.batches,
        loss=read.loss,
    )
    found.save(out / "sensitivity.json")
    write_text(out / "sensitivity.html", pages.sensitivity_page(found))
    console.print(found)
    say(f"The page: {out / 'sensitivity.html'}")


def _where(include: Globs, exclude: Globs, also: Globs) -> Where | None:
    if not (include or exclude or also):
        return None
    return Where(tuple(include) if include else "*", tuple(exclude or ()), tuple(also or ()))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SecateurError(f"--sparsities is a list of numbers such as 0.5,0.9; got {text!r}.") from None
