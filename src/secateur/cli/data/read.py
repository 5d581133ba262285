"""`read_data`: from what the user named to batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.artifacts.tensors import first_line
from secateur.cli.data.arguments import check_tokens, read_arguments
from secateur.cli.data.batches import Data, labelled, masked, next_token, of_tokens, stacked
from secateur.cli.data.own_text import SELF, own_text
from secateur.cli.data.rows import Row, Rows, read_rows
from secateur.cli.data.table import is_table, read_table
from secateur.cli.data.windows import Cut, windows
from secateur.core.errors import SecateurError


def read_data(
    file: Path,
    folder: Path,
    model: nn.Module,
    task: str,
    samples: int | None,
    length: int,
    seed: int | None = None,
    pack: bool = False,
) -> Data:
    """Read `file` for `model`, whose tokenizer lies in `folder`.

    `.txt`: one text; `.json`: a list of texts or of lists of token ids; `.jsonl`: objects with "text" or
    "input_ids" and, for classification, "label"; `.parquet`, `.csv`, `.arrow` and folders that `datasets`
    wrote: a column of one of both, `FILE:COLUMN`; `.safetensors`: the model's keyword arguments, tensors with
    examples along dimension 0; `self`: what the model itself writes.

    One text is cut into windows of `length` tokens, of several texts each gives one; `samples` is how many
    at most, None for all. `seed` and `pack` are those of `Cut`; with a seed, the examples of a `.safetensors`
    file are drawn, and what the model writes depends on it.
    """
    if (samples is not None and samples < 1) or length < 2:
        raise SecateurError(f"--samples is at least 1 and --length at least 2; got {samples} and {length}.")
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None) or length
    cut = Cut(samples, min(length, limit), seed, pack)
    if file == SELF:
        return own_text(model, task, cut)
    path, column = _found(file)
    source = f"{path.resolve()}:{column}" if column else str(path.resolve())
    if path.suffix == ".safetensors":
        return read_arguments(path, model, cut, source)
    rows = read_table(path, column) if is_table(path) else read_rows(path)
    return _batched(rows, folder, model, task, cut, source)


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; code of its own is refused."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SecateurError(
            f"{folder} holds no tokenizer that can be read ({first_line(error).rstrip('.')})."
        ) from None


def _found(file: Path) -> tuple[Path, str | None]:
    """The file, and the column after a colon."""
    if file.exists():
        path, column = file, None
    else:
        name, _, column = str(file).rpartition(":")
        path = Path(name)
        if not (name and column and path.exists()):
            raise SecateurError(f"There is no data file {file}.")
    if column is not None and not is_table(path):
        raise SecateurError(f"{path} has no columns: give it without :{column}.")
    return path, column


def _batched(rows: Rows, folder: Path, model: nn.Module, task: str, cut: Cut, source: str) -> Data:
    tokenizer = cache(lambda: open_tokenizer(folder))  # token ids do without
    if rows.labels is not None and task == "text-classification":
        return _classification(rows, tokenizer, model, cut, source)

    def encode(row: Row, most: int | None) -> list[int]:
        if isinstance(row, list):
            return row[:most]
        if row is None or not row.strip():
            return []
        settings = {"truncation": True, "max_length": most} if most else {"verbose": False}
        ids: list[int] = tokenizer()(row, **settings)["input_ids"]
        return ids

    end = _end_of_text(tokenizer(), folder) if cut.pack and len(rows.items) > 1 else None
    found, notes = windows(rows, encode, cut, end)
    for window in found:
        check_tokens(rows.name, window, model)
    # One example a batch where lengths differ: padding would count as data.
    batches = stacked([of_tokens(torch.tensor([window])) for window in found])
    if task == "fill-mask":
        return Data([masked(b, tokenizer()) for b in batches], labelled, notes, source)
    return Data(batches, next_token if task == "text-generation" else None, notes, source)


def _end_of_text(tokenizer: Any, folder: Path) -> int:
    if tokenizer.eos_token_id is None:
        raise SecateurError(
            f"The tokenizer of {folder} has no end-of-text token to join texts with: no --pack."
        )
    end: int = tokenizer.eos_token_id
    return end


def _classification(
    rows: Rows, tokenizer: Callable[[], Any], model: nn.Module, cut: Cut, source: str
) -> Data:
    """The beginning of each text, which its label is for."""
    assert rows.labels is not None
    if cut.pack:
        raise SecateurError(f"The texts of {rows.name} have labels and cannot be joined: no --pack.")
    batches: list[dict[str, Tensor]] = []
    for i in cut.order(len(rows.items)):
        if len(batches) == cut.samples:
            break
        row = rows.items[i]
        if not row or (isinstance(row, str) and not row.strip()):
            continue
        if isinstance(row, str):
            inputs = tokenizer()(row, truncation=True, max_length=cut.length, return_tensors="pt")
        else:
            check_tokens(rows.name, row, model)
            inputs = of_tokens(torch.tensor([row[: cut.length]]))
        batches.append({**inputs, "labels": torch.tensor([rows.labels[i]])})
    return Data(batches, labelled, cut.fewer(rows.name, len(batches)), source)
