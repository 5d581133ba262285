"""Which sets of entries may survive. Every pattern keeps an exact count; ties go in storage order.

A pattern sees a layer as its matrix `[out, in]` (see `secateur.core.layout`) and removes whole *units*:
single entries, or blocks. The sparsity asked of a layer is rounded to units once, by
`secateur.core.topk.count`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.errors import PatternError
from secateur.core.topk import count, keep_largest, keep_largest_rows


@runtime_checkable
class Pattern(Protocol):
    """A rule on the entries of one matrix."""

    @property
    def unit(self) -> int:
        """Entries that come or go together."""

    def check(self, shape: torch.Size, run: int, name: str) -> None:
        """Raise `PatternError` unless the pattern fits layer `name`.

        `shape` is `[out, in]`; `run` the inputs that lie side by side (`in` itself but for convolutions).
        """

    def units(self, scores: Float[Tensor, "out in"]) -> Float[Tensor, " units"]:
        """Score of every unit, in storage order: the sum over its entries."""

    def reachable(self, shape: torch.Size, sparsity: float) -> float:
        """The sparsity that `keep` gives when asked for `sparsity`; `PatternError` if it cannot."""

    def keep(self, scores: Float[Tensor, "out in"], sparsity: float) -> Bool[Tensor, "out in"]:
        """Mask of the entries that survive, True means keep."""


@dataclass(frozen=True)
class Unstructured:
    """Any entries of the matrix.

    >>> Unstructured().keep(torch.tensor([[3.0, 1.0], [2.0, 4.0]]), 0.5)
    tensor([[ True, False],
            [False,  True]])
    """

    unit = 1

    def check(self, shape: torch.Size, run: int, name: str) -> None:
        """Every shape fits."""

    def units(self, scores: Float[Tensor, "out in"]) -> Float[Tensor, " units"]:
        return scores.reshape(-1)

    def reachable(self, shape: torch.Size, sparsity: float) -> float:
        return _rounded(shape.numel(), sparsity)

    def keep(self, scores: Float[Tensor, "out in"], sparsity: float) -> Bool[Tensor, "out in"]:
        return keep_largest(scores, count(sparsity, scores.numel()))


@dataclass(frozen=True)
class PerRow:
    """The same number of entries in every row (output): scores are compared within a row only.

    Where the count does not divide evenly, the rows whose next entry scores lowest lose one more, so that
    the layer's total is exact and rows differ by at most one. The comparison group of Wanda (Sun et al.
    2023, section 3).

    >>> PerRow().keep(torch.tensor([[3.0, 1.0], [5.0, 4.0]]), 0.5)
    tensor([[ True, False],
            [ True, False]])
    """

    unit = 1

    def check(self, shape: torch.Size, run: int, name: str) -> None:
        """Every shape fits."""

    def units(self, scores: Float[Tensor, "out in"]) -> Float[Tensor, " units"]:
        return scores.reshape(-1)

    def reachable(self, shape: torch.Size, sparsity: float) -> float:
        return _rounded(shape.numel(), sparsity)

    def keep(self, scores: Float[Tensor, "out in"], sparsity: float) -> Bool[Tensor, "out in"]:
        each, over = divmod(count(sparsity, scores.numel()), max(1, scores.shape[0]))
        keep = keep_largest_rows(scores, each)
        if over:
            following = scores.masked_fill(~keep, torch.inf).amin(dim=1)
            rows = ~keep_largest(following, over)
            keep[rows] = keep_largest_rows(scores[rows], each + 1)
        return keep


@dataclass(frozen=True)
class NM:
    """At most `n` of every `m` entries that lie side by side along the input dimension.

    The sparsity asked must be at least `1 - n/m`, or 0 for a layer left dense; above `1 - n/m` the lowest
    of the survivors go too. In a convolution the groups run along the input channels of one tap.

    >>> NM(2, 4).keep(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), 0.5)
    tensor([[ True, False, False,  True]])
    """

    n: int
    m: int
    unit = 1

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise PatternError(
                f"NM(n, m) keeps n of every m entries with 0 < n < m; got NM({self.n}, {self.m})."
            )

    def check(self, shape: torch.Size, run: int, name: str) -> None:
        if run % self.m:
            raise PatternError(
                f"NM({self.n}, {self.m}) needs an input size that is a multiple of {self.m}, but {name} has "
                f"{run}. Exclude it with where=Where(exclude={name!r})."
            )

    def units(self, scores: Float[Tensor, "out in"]) -> Float[Tensor, " units"]:
        return scores.reshape(-1)

    def reachable(self, shape: torch.Size, sparsity: float) -> float:
        _fit(self, shape, 1, self.m)
        self._forced(shape.numel(), count(sparsity, shape.numel()))
        return _rounded(shape.numel(), sparsity)

    def keep(self, scores: Float[Tensor, "out in"], sparsity: float) -> Bool[Tensor, "out in"]:
        _fit(self, scores.shape, 1, self.m)
        remove = count(sparsity, scores.numel())
        forced = self._forced(scores.numel(), remove)
        least = 0 if remove == 0 else self.m - self.n
        keep = keep_largest_rows(scores.reshape(-1, self.m), least).view(scores.shape)
        if remove > forced:
            keep[keep.clone()] = keep_largest(scores[keep], remove - forced)
        return keep

    def forced(self, entries: int) -> int:
        """Of so many entries, those that the pattern itself removes."""
        return entries // self.m * (self.m - self.n)

    def _forced(self, entries: int, remove: int) -> int:
        """The same; `PatternError` if that is more than asked."""
        forced = self.forced(entries)
        if 0 < remove < forced:
            raise PatternError(
                f"NM({self.n}, {self.m}) removes at least {1 - self.n / self.m:.4g} of a layer, so a "
                f"sparsity of {remove / entries:.4g} cannot be had with it: ask for "
                f"{1 - self.n / self.m:.4g} with allocation=uniform, or for 0 in this layer."
            )
        return forced


@dataclass(frozen=True)
class Block:
    """Whole blocks of `rows` x `columns` entries; a block scores the sum over its entries.

    >>> Block(1, 2).keep(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), 0.5)
    tensor([[False, False,  True,  True]])
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise PatternError(
                f"Block(rows, columns) needs positive sizes; got Block({self.rows}, {self.columns})."
            )

    @property
    def unit(self) -> int:
        return self.rows * self.columns

    def check(self, shape: torch.Size, run: int, name: str) -> None:
        if shape[0] % self.rows or run % self.columns:
            raise PatternError(
                f"Block({self.rows}, {self.columns}) must divide the outputs and inputs of a layer, but "
                f"{name} has {shape[0]} x {run}. Exclude it with where=Where(exclude={name!r})."
            )

    def units(self, scores: Float[Tensor, "out in"]) -> Float[Tensor, " units"]:
        _fit(self, scores.shape, self.rows, self.columns)
        out, width = scores.shape
        tiles = scores.reshape(out // self.rows, self.rows, width // self.columns, self.columns)
        # An entry that is already gone (-inf) must not drag down the living ones of its block.
        gone = tiles.isneginf()
        total = tiles.masked_fill(gone, 0).sum(dim=(1, 3))
        return total.masked_fill(gone.all(dim=3).all(dim=1), -torch.inf).reshape(-1)

    def reachable(self, shape: torch.Size, sparsity: float) -> float:
        _fit(self, shape, self.rows, self.columns)
        return _rounded(shape.numel() // self.unit, sparsity)

    def keep(self, scores: Float[Tensor, "out in"], sparsity: float) -> Bool[Tensor, "out in"]:
        out, width = scores.shape
        units = self.units(scores)
        keep = keep_largest(units, count(sparsity, units.numel()))
        tiles = keep.view(out // self.rows, 1, width // self.columns, 1)
        return tiles.expand(-1, self.rows, -1, self.columns).reshape(out, width)


def on_the_way(pattern: Pattern, last: bool) -> Pattern:
    """The pattern at a step of a schedule: itself at the last, before that what can be had on the way."""
    return Towards(pattern) if isinstance(pattern, NM) and not last else pattern


@dataclass(frozen=True)
class Towards:
    """An N:M pattern on the way: what goes is the lowest of what the pattern would remove."""

    pattern: NM
    unit = 1

    def check(self, shape: torch.Size, run: int, name: str) -> None:
        self.pattern.check(shape, run, name)

    def units(self, scores: Tensor) -> Tensor:
        return self.pattern.units(scores)

    def reachable(self, shape: torch.Size, sparsity: float) -> float:
        try:
            return self.pattern.reachable(shape, sparsity)
        except PatternError:
            return count(sparsity, shape.numel()) / max(1, shape.numel())

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        remove, forced = count(sparsity, scores.numel()), self.pattern.forced(scores.numel())
        if remove >= forced:
            return self.pattern.keep(scores, sparsity)
        stays = self.pattern.keep(scores, forced / scores.numel())
        return keep_largest(scores.masked_fill(stays, torch.inf), remove)


def _fit(pattern: Pattern, shape: torch.Size, rows: int, columns: int) -> None:
    """Refuse a matrix that does not divide into groups, which would otherwise run across rows."""
    if shape[0] % rows or shape[1] % columns:
        raise PatternError(
            f"{pattern} needs a matrix whose sizes are multiples of {rows} and {columns}; got "
            f"{shape[0]} x {shape[1]}."
        )


def _rounded(units: int, sparsity: float) -> float:
    return count(sparsity, units) / units if units else 0.0
