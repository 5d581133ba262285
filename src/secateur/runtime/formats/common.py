"""What all formats share."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.errors import ArtifactError, NonFiniteError, SecateurError

TAIL = 64  # readable entries after the last value: a kernel loads whole vectors
LARGEST = 2**31  # rows or columns
MOST_COLUMNS = 2**16  # that an index of 16 bits can tell apart


@runtime_checkable
class Packed(Protocol):
    """A weight [N, K] in one of the formats. Its buffers are plain tensors, which move, copy and save."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs)."""

    @property
    def values(self) -> Tensor:
        """The stored entries, and `TAIL` more."""

    def buffers(self) -> dict[str, Tensor]:
        """All buffers by name."""

    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "N K"]:
        """The dense matrix."""

    def check(self, name: str = "the weight") -> None:
        """Raise `ArtifactError` unless a kernel can read the buffers safely."""


def kept(packed: Packed) -> int:
    """Entries that are stored."""
    return packed.values.numel() - TAIL


def nbytes(packed: Packed) -> int:
    """Bytes of all buffers."""
    return sum(b.numel() * b.element_size() for b in packed.buffers().values())


def prepared(
    weight: Tensor, keep: Tensor | None, dtype: torch.dtype | None, known: tuple[torch.dtype, ...]
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Weight and mask on the CPU, and the type of the values; raises for what cannot be packed."""
    dtype = dtype or (weight.dtype if weight.dtype in known else torch.float32)
    if dtype not in known:
        names = ", ".join(str(d).removeprefix("torch.") for d in known)
        raise SecateurError(f"Values are stored as {names}; got dtype={dtype}.")
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise SecateurError(
            f"A weight is a matrix of floating-point numbers; got {weight.dtype} {tuple(weight.shape)}."
        )
    if keep is not None and keep.shape != weight.shape:
        raise SecateurError(f"keep=... has shape {tuple(keep.shape)}, the weight {tuple(weight.shape)}.")
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError("The weight has NaN or infinite entries.")
    weight = weight.detach().cpu()
    return weight, weight != 0 if keep is None else keep.cpu(), dtype


def check_buffer(name: str, what: str, buffer: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise `ArtifactError` unless a buffer has this type and shape and lies in one piece."""
    if buffer.dtype != dtype or tuple(buffer.shape) != shape or not buffer.is_contiguous():
        raise unsound(
            name, f"its {what} are {buffer.dtype} {tuple(buffer.shape)}, which should be {dtype} {shape}"
        )


def check_shape(name: str, shape: tuple[int, int], values: Tensor) -> None:
    """Raise `ArtifactError` for a shape that is none, or values that are not a row of numbers."""
    if not all(isinstance(n, int) and 0 < n < LARGEST for n in shape):
        raise unsound(name, f"its shape is {shape}")
    if values.dim() != 1 or values.numel() < TAIL or not values.is_contiguous():
        raise unsound(name, f"its values have shape {tuple(values.shape)}")


def indices_of(columns: Tensor, count: int) -> Tensor:
    """Columns of `count` as int16, the bits of unsigned numbers, which torch cannot pickle.

    Raises `SecateurError` for too many.
    """
    if count > MOST_COLUMNS:
        raise SecateurError(f"Indices count up to {MOST_COLUMNS} columns; the weight has {count}.")
    return columns.to(torch.int16)  # the low 16 bits


def columns_of(indices: Tensor) -> Tensor:
    """The columns that `indices_of` wrote."""
    return indices.to(torch.int64) & (MOST_COLUMNS - 1)


def check_indices(name: str, indices: Tensor, starts: Tensor, columns: int) -> None:
    """Raise `ArtifactError` unless int16 columns rise within each row, are inside, and are as many as said.

    Row n has those from starts[n] on.
    """
    kept = indices.numel()
    if int(starts[0]) != 0 or int(starts[-1]) != kept or bool((starts.diff() < 0).any()):
        raise unsound(name, "its offsets do not rise from 0 to the number of values")
    column = columns_of(indices)
    if kept and int(column.max()) >= columns:
        raise unsound(name, f"it has a column {int(column.max())} of {columns}")
    rises = column.diff() > 0
    rises[starts[1:-1][(starts[1:-1] > 0) & (starts[1:-1] < kept)] - 1] = True
    if not bool(rises.all()):
        raise unsound(name, "its columns do not rise within a row")


def unsound(name: str, why: str) -> ArtifactError:
    """The error for buffers that must not be read."""
    return ArtifactError(f"{name} is damaged: {why}.")
