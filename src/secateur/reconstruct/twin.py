"""The masked twin: a copy of a model whose removed slices are zero, so that shapes stay as they were."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from secateur.core.errors import MaskError, SelectionError
from secateur.core.names import unwrap

Slices = Mapping[tuple[str, int], Tensor]
"""`(name of a parameter or buffer, dimension)` -> what of that dimension stays, boolean."""


def masked_twin(model: nn.Module, slices: Slices) -> nn.Module:
    """A deep copy of `model` with every slice that does not stay set to zero.

    Raises `SelectionError` for a name that the model does not have, `MaskError` for a mask that does not fit.
    """
    check_slices(model, slices)
    twin = copy.deepcopy(unwrap(model))
    zero_slices_(twin, slices)
    return twin


def check_slices(model: nn.Module, slices: Slices) -> None:
    """Raise unless every slice names a dimension of the model, with a mask of its size."""
    tensors = _tensors(unwrap(model))
    for (name, dim), keep in slices.items():
        if name not in tensors:
            raise SelectionError(
                f"There is no parameter or buffer {name} in the model, whose slices were to go."
            )
        shape = tuple(tensors[name].shape)
        fits = -len(shape) <= dim < len(shape) and tuple(keep.shape) == (shape[dim],)
        if keep.dtype != torch.bool or not fits:
            raise MaskError(
                f"Dimension {dim} of {name}, of shape {shape}, needs a boolean mask with one entry for each "
                f"index; got {keep.dtype} of shape {tuple(keep.shape)}."
            )


@torch.no_grad()
def zero_slices_(model: nn.Module, slices: Slices, only: Iterable[str] | None = None) -> None:
    """Set the slices that do not stay to zero, of all tensors or of those named; integer buffers are left."""
    tensors = _tensors(model)
    names = None if only is None else set(only)
    for (name, dim), keep in slices.items():
        tensor = tensors[name]
        if (names is None or name in names) and (tensor.is_floating_point() or tensor.is_complex()):
            tensor.index_fill_(dim, (~keep).nonzero().flatten().to(tensor.device), 0)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
