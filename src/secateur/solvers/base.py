"""What a solver takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from secateur.patterns import Pattern
from secateur.solvers.quadratic import Quadratic


@dataclass(frozen=True, eq=False)
class Solved:
    """One layer, pruned.

    Attributes:
        weight: float32 `[out, in]`, zero where not kept.
        keep: True for the entries that survive.
        notes: what a reader must know, such as a damping that was raised.
    """

    weight: Float[Tensor, "out in"]
    keep: Bool[Tensor, "out in"]
    notes: tuple[str, ...]
    _error: Callable[[], float] = field(repr=False)

    @classmethod
    def of(cls, weight: Tensor, keep: Tensor, dense: Tensor, objective: Quadratic) -> Solved:
        """With the notes of the objective."""
        return cls(weight, keep, tuple(objective.notes), lambda: objective.error(weight, dense))

    @cached_property
    def error(self) -> float:
        """Squared error of the layer's output over its power, on the data of the Gram matrix.

        Computed when asked for: it takes two products of matrices, as much as a sweep.
        """
        return self._error()


@runtime_checkable
class Solver(Protocol):
    """Chooses which weights of one layer go, and what the others become."""

    @property
    def damping(self) -> float:
        """Of the Gram matrix, relative to the mean of its diagonal."""

    def __call__(
        self, weight: Float[Tensor, "out in"], objective: Quadratic, pattern: Pattern, sparsity: float
    ) -> Solved:
        """The pruned layer; the arguments are not changed.

        Raises:
            PatternError: the pattern does not fit the shape, or cannot have the sparsity.
        """
