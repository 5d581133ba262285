"""`secateur bench`: a pruned model, dense against sparse, on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from secateur import artifacts, runtime
from secateur.artifacts.manifest import SURGERY
from secateur.cli import shared
from secateur.cli.data import read_data
from secateur.core.errors import SecateurError
from secateur.core.files import write_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def bench(
    model_dir: shared.Folder,
    tokens: Annotated[
        str, typer.Option(help="How many tokens come at once; a layer must be faster at each.")
    ] = "1,64",
    memory: Annotated[
        float,
        typer.Option(
            help="Bytes that the layers may take, over the dense ones: buys layouts for many tokens."
        ),
    ] = 1.25,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the stored values: float32, bfloat16 or int8; the model's if not given."),
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Whether layers are timed; else every one with 30 % zeros becomes sparse.")
    ] = True,
    data: shared.DataFile = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt of a language model.")] = 64,
    new: Annotated[int, typer.Option(help="Tokens that it writes after it.")] = 32,
    runs: Annotated[int, typer.Option(help="Prompts, or forward passes.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch and the kernels; torch's if not given.")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Folder for the sparse model, which `secateur.load` opens as it is."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for the result as JSON.")] = None,
) -> None:
    """Make the layers of a pruned model sparse wherever that is faster here, and time both models.

    A language model reads a random prompt and writes tokens after it. Of any other model a forward pass on
    the first examples of --data is timed.
    """
    if dtype is not None and dtype not in DTYPES:
        raise SecateurError(f"--dtype is one of {', '.join(DTYPES)}; got {dtype!r}.")
    counts = _counts(tokens)
    if save is not None:
        shared.check_out(model_dir, save)
    if threads is not None:
        torch.set_num_threads(threads)
    model, task = shared.open_dense(model_dir)
    example: Any = None
    if task != "text-generation":
        if data is None:
            raise SecateurError(f"A model for {task} writes no text: give it examples, --data FILE.")
        batch = read_data(data, model_dir, model, task, 1, 128).batches[0]
        example = {k: v for k, v in batch.items() if k != "labels"}
    stored = DTYPES[dtype] if dtype else None
    fast = runtime.compress(model, tokens=counts, memory=memory, dtype=stored, measure=measure)
    compressed: runtime.CompressReport = fast.compress_report  # type: ignore[assignment]
    shared.say(str(compressed))
    if not compressed.converted:
        shared.say("No layer is faster sparse: what follows times the dense model twice.")
    if example is None:
        found = runtime.bench_text(model, fast, prompt=prompt, new=new, runs=runs)
    else:
        found = runtime.bench(model, fast, example, runs=runs)
    shared.say(str(found))
    if save is not None:
        surgery = model_dir if (model_dir / SURGERY).is_file() else None
        artifacts.save(fast, save, surgery=surgery, source=model_dir)
        size = sum(path.stat().st_size for path in save.glob("*.safetensors"))
        shared.say(f"The sparse model is in {save}: {size / 1e6:.1f} MB of tensors.")
    if out is not None:
        result = {"compressed": compressed.to_dict(), "measured": found.to_dict()}
        write_text(out, json.dumps(result, indent=1) + "\n")


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        counts = ()
    if not counts:
        raise SecateurError(f"--tokens are numbers such as 1,64; got {text!r}.")
    return counts
