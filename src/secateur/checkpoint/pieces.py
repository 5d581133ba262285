"""Where a parameter lies in the files: in one tensor, or cut into several, as experts often are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.artifacts.shards import Shards
from secateur.core.errors import ArtifactError


@dataclass(frozen=True)
class Pieces:
    """A parameter, and the tensors that hold it.

    Attributes:
        shape: of the parameter.
        places: for each tensor, the part of the parameter that it holds.
    """

    shape: tuple[int, ...]
    places: Mapping[str, tuple[slice, ...]]

    @classmethod
    def whole(cls, key: str, shape: tuple[int, ...]) -> Pieces:
        """All in one tensor."""
        return cls(shape, {key: ()})

    @property
    def first(self) -> str:
        """One of the tensors, whose type is that of all."""
        return next(iter(self.places))

    def read(self, shards: Shards) -> Tensor:
        """The parameter, in memory of its own."""
        if self._is_whole:
            return shards.read(self.first)
        value = torch.empty(self.shape, dtype=shards.entry(self.first).dtype)
        for key, place in self.places.items():
            part = value[place]
            part.copy_(shards.read(key).view(part.shape))
        return value

    def write(self, shards: Shards, value: Tensor) -> None:
        """Overwrite all that hold it; `flush` is the caller's."""
        for key, place in self.places.items():
            entry = shards.entry(key)
            shards.write(key, value[place].reshape(entry.shape).to(entry.dtype))

    @property
    def _is_whole(self) -> bool:
        return self.places == {self.first: ()}


def put_together(
    converter: Any, found: Mapping[str, Sequence[str]], shape: tuple[int, ...], shards: Shards
) -> Pieces | None:
    """The pieces of a parameter that transformers stacks and concatenates, as it would; None for all else.

    Args:
        converter: a `WeightConverter` of transformers.
        found: the tensors that match each of its source patterns.
        shape: of the parameter.
        shards: of the tensors.

    Raises `ArtifactError` where they do not fill the parameter.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    operations = list(converter.operations)
    stacked = bool(operations) and isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
    operations = operations[stacked:]
    joined = operations[0].dim if operations and isinstance(operations[0], Concatenate) else None
    if len(operations) > (joined is not None) or not (stacked or joined is not None):
        return None
    patterns = [p for p in converter.source_patterns if p in found]
    if len(patterns) > 1 and joined is None:
        return None
    places: dict[str, tuple[slice, ...]] = {}
    at = 0
    for pattern in patterns:
        keys = sorted(found[pattern], key=_natural)
        size = list(shards.entry(keys[0]).shape)
        size = [len(keys), *size] if stacked else size
        whole = [slice(0, n) for n in size]
        if joined is not None:
            whole[joined] = slice(at, at + size[joined])
            at += size[joined]
        for i, key in enumerate(keys):
            places[key] = (slice(i, i + 1), *whole[1:]) if stacked else tuple(whole)
    pieces = Pieces(shape, places)
    _refuse_misfit(pieces, shards)
    return pieces


def _refuse_misfit(pieces: Pieces, shards: Shards) -> None:
    """Raise `ArtifactError` unless the tensors fit into their places and fill the parameter, in one type."""
    total = 0
    for key, place in pieces.places.items():
        entry = shards.entry(key)
        room = tuple(range(n)[s] for n, s in zip(pieces.shape, place, strict=False))
        size = math.prod(len(r) for r in room)
        total += size
        fits = len(place) == len(pieces.shape) and size == math.prod(entry.shape)
        if not fits or entry.dtype != shards.entry(pieces.first).dtype:
            raise ArtifactError(
                f"{key}, {entry.dtype} {entry.shape}, does not fit into a parameter of {pieces.shape} "
                f"together with {pieces.first}: copy or download all files again."
            )
    if total != math.prod(pieces.shape):
        raise ArtifactError(
            f"{pieces.first} and {len(pieces.places) - 1} more tensors hold {total:,} of the "
            f"{math.prod(pieces.shape):,} entries of a parameter: copy or download all files again."
        )


def _natural(key: str) -> list[tuple[int, str]]:
    """Expert 10 after expert 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]
