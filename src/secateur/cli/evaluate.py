"""`secateur eval`: the loss of a model on a text, and the perplexity of a language model."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from secateur.artifacts import load_hf
from secateur.cli import shared
from secateur.cli.data import Data, read_data
from secateur.core.errors import SecateurError
from secateur.core.files import write_text
from secateur.core.modes import evaluation
from secateur.progress import track

_ALL = sys.maxsize


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on what.

    Attributes:
        task: what the model is for, as transformers' pipelines call it.
        loss: mean over all tokens that are predicted, in nats; over examples where a label is.
        perplexity: its exponential, for a language model; None for others.
        tokens: that were predicted.
        examples: windows or texts.
        protocol: in words, all that decides the number.
    """

    task: str
    loss: float
    perplexity: float | None
    tokens: int
    examples: int
    protocol: str


def evaluate(
    model_dir: shared.Folder,
    data: Annotated[Path, typer.Option(help=f"Data: {shared.FORMATS}.")],
    samples: Annotated[
        int | None, typer.Option(min=1, help="Windows or texts, from the beginning; all if not given.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window; of a longer text the beginning.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="File for the same JSON.")] = None,
) -> None:
    """Measure the loss of a model, pruned or not; for a language model the perplexity.

    A .txt file is one text, tokenised as a whole and cut into windows of --length tokens that do not overlap;
    each window stands alone, and its first token is not predicted. What does not fill a window is left out.
    """
    model, task = load_hf(model_dir)
    read = read_data(data, model_dir, model, task, samples or _ALL, length)
    if read.loss is None:
        raise SecateurError(f"A model for {task} has no loss to measure on {data}.")
    found = _measured(model, task, read, data)
    text = json.dumps(asdict(found), indent=1)
    if out is not None:
        write_text(out, text + "\n")
    if as_json:
        print(text)
        return
    if found.perplexity is not None:
        shared.say(f"perplexity {found.perplexity:.4f}")
    shared.say(f"loss       {found.loss:.6f}")
    shared.say(f"{found.tokens:,} tokens predicted in {found.examples:,} examples: {found.protocol}")


@torch.no_grad()
def _measured(model: nn.Module, task: str, data: Data, file: Path) -> Evaluation:
    """Sums over tokens, so that texts of unlike length count as they are long."""
    assert data.loss is not None
    total, tokens, examples, lengths = 0.0, 0, 0, set()
    with evaluation(model):
        for batch in track(data.batches, "evaluating"):
            output = model(**{k: v for k, v in batch.items() if k != "labels"})
            n = _predicted(batch)
            total += float(data.loss(output, batch)) * n
            tokens += n
            first = next(iter(batch.values()))
            examples += len(first)
            lengths.add(first.shape[1] if first.dim() > 1 else 1)
    loss = total / tokens
    if not math.isfinite(loss):
        raise SecateurError(f"The loss on {file} is {loss}: the model gives NaN or infinity.")
    spoken = task in ("text-generation", "fill-mask")
    windows = f"windows of {lengths.pop():,} tokens" if len(lengths) == 1 else "texts of unlike length"
    context = "each alone, its first token not predicted" if task == "text-generation" else "each alone"
    protocol = (
        f"{file.name}, {windows}, {context}, natural logarithm, special tokens as the tokenizer adds them."
    )
    return Evaluation(task, loss, math.exp(min(loss, 700)) if spoken else None, tokens, examples, protocol)


def _predicted(batch: dict[str, Any]) -> int:
    labels = batch.get("labels")
    if labels is not None:
        return int((labels != -100).sum())
    ids: torch.Tensor = batch["input_ids"]
    return len(ids) * (ids.shape[1] - 1)
