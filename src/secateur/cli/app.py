"""The commands. Each reads its input, calls the API once, and writes a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import secateur
from secateur import demo as job
from secateur import pages
from secateur.cli import choices
from secateur.cli.allocate import allocate
from secateur.cli.bench import bench
from secateur.cli.data import read_data
from secateur.cli.evaluate import evaluate
from secateur.cli.options import Also, Exclude, Include, MethodName, PatternText, where_of
from secateur.cli.prune import prune
from secateur.cli.report import report
from secateur.cli.run import run as run_recipe
from secateur.cli.shared import FORMATS, Folder, Length, Samples, Seed, console, open_dense, say
from secateur.cli.shrink import shrink
from secateur.cli.tickets import app as tickets
from secateur.core.errors import SecateurError
from secateur.core.files import write_text
from secateur.inspection import inspect as inspect_model
from secateur.layerwise import sensitivity as scan_layers
from secateur.recipe_schema import recipe_schema
from secateur.report.figures import save as save_figure

app = typer.Typer(
    help="Pruning for PyTorch: exact, plain, small.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_MAGNITUDE = choices.Method("magnitude")


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
    model, _ = open_dense(model_dir)
    found = inspect_model(model, where_of(include, exclude, also))
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


app.command()(prune)
app.command()(allocate)
app.command()(shrink)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(report)
app.command("run")(run_recipe)


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(help="File to write instead of printing.")] = None,
) -> None:
    """Print the JSON Schema of recipes: with it editors complete and check them while they are written."""
    text = json.dumps(recipe_schema(), indent=1)
    if out is None:
        print(text)
        return
    write_text(out, text + "\n")
    say(f"Written: {out}. First line of a recipe: # yaml-language-server: $schema={out}")


app.add_typer(tickets, name="tickets")


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
    model, task = open_dense(model_dir)
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
        where=where_of(include, exclude, also),
        batches=read.batches,
        loss=read.loss,
    )
    found.save(out / "sensitivity.json")
    write_text(out / "sensitivity.html", pages.sensitivity_page(found))
    console.print(found)
    say(f"The page: {out / 'sensitivity.html'}")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SecateurError(f"--sparsities is a list of numbers such as 0.5,0.9; got {text!r}.") from None
