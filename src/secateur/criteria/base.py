"""The contract of a criterion."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from secateur.stats import Stat, Stats


@runtime_checkable
class Criterion(Protocol):
    """Weight and statistics to scores; larger means keep."""

    @property
    def needs(self) -> tuple[Stat, ...]:
        """What must have been measured; () for criteria on weights alone."""

    @property
    def rounds(self) -> int:
        """Times to score and prune on the way to the target, the density falling geometrically."""

    def __call__(self, weight: Float[Tensor, "out in"], stats: Stats) -> Float[Tensor, "out in"]:
        """Scores in float32 or wider, finite, of the weight's shape."""
