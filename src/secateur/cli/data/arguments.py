"""A safetensors file of the model's own arguments, and tokens that a model knows."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.artifacts.tensors import first_line
from secateur.cli.data.batches import Data, labelled
from secateur.cli.data.windows import Cut
from secateur.core.errors import SecateurError
from secateur.core.modes import evaluation


def read_arguments(file: Path, model: nn.Module, cut: Cut, source: str) -> Data:
    """Tensors of keyword arguments, examples along dimension 0, tried on the model."""
    if cut.pack:
        raise SecateurError(f"{file} holds tensors, not texts that could be joined: no --pack.")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise SecateurError(f"{file} is not a readable safetensors file: {error}.") from None
    sizes = {t.shape[0] if t.dim() else 0 for t in tensors.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise SecateurError(
            f"The tensors of {file} must share their first dimension, the examples; got {sorted(sizes)}."
        )
    size = sizes.pop()
    taken = torch.tensor(list(cut.order(size))[: cut.samples])
    batches = [{k: t[part] for k, t in tensors.items()} for part in taken.split(8)]
    _check_names(file, model, list(tensors))
    ids = tensors.get("input_ids")
    if ids is not None and not ids.is_floating_point():
        check_tokens(str(file), [int(ids.min()), int(ids.max())], model)
    _try(file, model, {k: t[:1] for k, t in tensors.items()})
    loss = labelled if "labels" in tensors else None
    return Data(batches, loss, cut.fewer(str(file), len(taken)), source)


def vocabulary(model: nn.Module) -> int | None:
    """How many tokens the model knows; None where it does not look tokens up in a table."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def check_tokens(name: str, ids: Sequence[int], model: nn.Module) -> None:
    """Refuse tokens that the model does not know, which would be read from beyond its table."""
    size = vocabulary(model)
    if size is None or not ids:
        return
    for token in (min(ids), max(ids)):
        if not 0 <= token < size:
            raise SecateurError(f"{name} has the token {token}, but the model knows {size}.")


def _check_names(file: Path, model: nn.Module, names: list[str]) -> None:
    taken = [
        p.name for p in signature(model.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if taken and (odd := [name for name in names if name not in taken]):
        raise SecateurError(
            f"The model does not take the tensors {', '.join(odd)} of {file}: it takes {', '.join(taken)}."
        )


def _try(file: Path, model: nn.Module, first: dict[str, Tensor]) -> None:
    """Run the model on one example, so that what it cannot take is said before anything is changed."""
    if any(p.is_meta for p in model.parameters()):
        return  # its weights are not there yet
    try:
        with evaluation(model), torch.no_grad():
            model(**first)
    except Exception as error:  # a forward pass can fail in as many ways as there are models
        raise SecateurError(
            f"The tensors of {file} must be the arguments of the model, by name; it fails with: "
            f"{first_line(error)}"
        ) from None
