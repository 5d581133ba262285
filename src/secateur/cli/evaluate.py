"""`secateur eval`: the loss of a model on a text, the perplexity of a language model, and tasks."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from secateur.artifacts import load_hf
from secateur.cli import shared
from secateur.cli.data import SELF, Data, read_data
from secateur.cli.tasks import find_tasks, run_tasks, score_table
from secateur.core.errors import SecateurError
from secateur.core.files import write_text
from secateur.core.modes import evaluation
from secateur.progress import track


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
        notes: where the data was less than asked for.
    """

    task: str
    loss: float
    perplexity: float | None
    tokens: int
    examples: int
    protocol: str
    notes: tuple[str, ...] = ()


def evaluate(
    model_dir: shared.Folder,
    data: Annotated[Path | None, typer.Option(help=f"Data to measure the loss on: {shared.FORMATS}.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, separated by commas, such as arc_easy,piqa.")
    ] = None,
    task_dir: Annotated[
        Path | None, typer.Option(help="Folder of YAML files that --tasks are taken from instead.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Examples of each task, from the beginning; all if not given.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Windows or texts, from the beginning; all if not given.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window; of a longer text the beginning.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="File for the same JSON.")] = None,
) -> None:
    """Measure the loss of a model, pruned or not; for a language model the perplexity, and tasks of lm-eval.

    A .txt file is one text, tokenised as a whole and cut into windows of --length tokens that do not overlap;
    each window stands alone, and its first token is not predicted. What does not fill a window is left out.
    """
    names = _task_names(tasks, task_dir, limit)
    if data is None and not names:
        raise SecateurError("Say what to measure: --data FILE, --tasks NAMES, or both.")
    if data == SELF:
        raise SecateurError("What a model writes itself is no test of it: give --data a file.")
    suite = find_tasks(names, task_dir) if names else None
    model, task = load_hf(model_dir)
    loss = _loss(model, task, model_dir, data, samples, length) if data is not None else None
    scores = run_tasks(suite, model, task, model_dir, limit) if suite is not None else None
    found = (asdict(loss) if loss else {}) | ({"tasks": asdict(scores)} if scores else {})
    text = json.dumps(found, indent=1)
    if out is not None:
        write_text(out, text + "\n")
    if as_json:
        print(text)
        return
    if loss is not None:
        _say(loss)
    if scores is not None:
        shared.console.print(score_table(scores))
        shared.say(
            f"By {scores.harness}{'' if limit is None else f', the first {limit:,} examples of each task'}."
        )


def _task_names(tasks: str | None, task_dir: Path | None, limit: int | None) -> tuple[str, ...]:
    if tasks is None:
        for option, value in (("--task-dir", task_dir), ("--limit", limit)):
            if value is not None:
                raise SecateurError(f"{option} is for tasks: say which, --tasks NAMES.")
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise SecateurError(f"--tasks is a list of names such as arc_easy,piqa; got {tasks!r}.")
    return names


def _loss(
    model: nn.Module, task: str, folder: Path, file: Path, samples: int | None, length: int
) -> Evaluation:
    read = read_data(file, folder, model, task, samples, length)
    if read.loss is None:
        raise SecateurError(f"A model for {task} has no loss to measure on {file}.")
    return _measured(model, task, read, file)


def _say(found: Evaluation) -> None:
    if found.perplexity is not None:
        shared.say(f"perplexity {found.perplexity:.4f}")
    shared.say(f"loss       {found.loss:.6f}")
    shared.say(f"{found.tokens:,} tokens predicted in {found.examples:,} examples: {found.protocol}")
    for note in found.notes:
        shared.say(note)


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
    perplexity = math.exp(min(loss, 700)) if spoken else None
    return Evaluation(task, loss, perplexity, tokens, examples, protocol, data.notes)


def _predicted(batch: dict[str, Any]) -> int:
    labels = batch.get("labels")
    if labels is not None:
        return int((labels != -100).sum())
    ids: torch.Tensor = batch["input_ids"]
    return len(ids) * (ids.shape[1] - 1)
