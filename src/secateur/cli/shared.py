"""What several commands share: options, the console, checks of folders, losses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from torch import nn

from secateur.artifacts import load_hf
from secateur.cli.data import Data, mean_loss
from secateur.core.errors import SecateurError
from secateur.runtime import SparseLinear

console = Console()

FORMATS = (
    ".txt, .json, .jsonl, .parquet, .csv, .arrow or a folder of datasets (texts or token ids; FILE:COLUMN), "
    "or .safetensors (the model's arguments)"
)
Folder = Annotated[
    Path,
    typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model folder (config.json and safetensors)."),
]
DataFile = Annotated[
    Path | None,
    typer.Option("--data", help=f"Calibration data: {FORMATS}; or self, what the model itself writes."),
]
EvalFile = Annotated[
    Path | None, typer.Option("--eval", help="Data to measure the loss on before and after, likewise.")
]
Samples = Annotated[int, typer.Option(help="Examples read from a data file, at most.")]
Length = Annotated[int, typer.Option(help="Tokens of an example, at most.")]
DataSeed = Annotated[
    int | None,
    typer.Option("--data-seed", help="Draw the examples at random places of --data, not from the beginning."),
]
Pack = Annotated[
    bool,
    typer.Option("--pack", help="Join the texts of --data and cut them into windows of --length tokens."),
]
Seed = Annotated[int, typer.Option(help="Of random criteria and probes.")]


def say(text: str) -> None:
    """Print a line as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def open_dense(model_dir: Path) -> tuple[nn.Module, str]:
    """As `load_hf`, for commands that look at weights or change them."""
    model, task = load_hf(model_dir)
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        raise SecateurError(f"{model_dir} holds a model with sparse layers: give the dense one, pruned.")
    return model, task


def check_out(model_dir: Path, out: Path) -> None:
    """Before hours of work, not after."""
    if out.resolve() == model_dir.resolve():
        raise SecateurError(f"{out} is the model's own folder: choose another, the original is kept.")
    if out.is_file() or _is_foreign(out):
        raise SecateurError(
            f"{out} exists and holds something else than a pruned model: choose another folder."
        )


def _is_foreign(out: Path) -> bool:
    """Whether a folder holds something, but neither a pruned model nor an unfinished run."""
    if not out.is_dir() or (out / "secateur.json").is_file():
        return False
    return any(not path.name.startswith(".secateur-") for path in out.iterdir())


def loss_of(model: nn.Module, data: Data | None) -> float:
    """Mean loss on data, NaN without any."""
    if data is None:
        return math.nan
    if data.loss is None:
        raise SecateurError("This model has no loss that can be measured on --eval data.")
    return mean_loss(model, data)


def loss_note(file: Path | None, task: str, old: float, new: float) -> str:
    """The losses before and after, in words."""
    text = f"Mean loss on {file}: {old:.4f} before, {new:.4f} after"
    if task == "text-generation":
        text += f" (perplexity {math.exp(old):.2f} and {math.exp(min(new, 700)):.2f})"
    return text + "."
