"""Sparsities that a layer can have while the total stays what was asked, to the unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from secateur.allocation import Layer, uniform
from secateur.core.errors import PatternError, SecateurError
from secateur.core.topk import count
from secateur.patterns import NM, Pattern


@dataclass(frozen=True)
class Grid:
    r"""Level $k$ of layer $i$ removes `base[i] + k * step[i]` units; level 0 everywhere is `uniform`.

    Steps are one number of units times powers of two, whatever the layers' sizes, so that levels with
    $\sum_i k_i\,\mathrm{step}_i = 0$ meet the total exactly, and what one layer gives another can take.

    Attributes:
        names: of the layers.
        units: that the pattern can remove from each.
        base: units removed at level 0.
        step: units from one level to the next.
        low: lowest level of each layer, at most 0.
        high: highest level, at least 0.
    """

    names: tuple[str, ...]
    units: tuple[int, ...]
    base: tuple[int, ...]
    step: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]

    def removed(self, i: int, level: int) -> int:
        """Units that go from layer `i`."""
        return self.base[i] + level * self.step[i]

    def share(self, i: int, level: int) -> float:
        """Sparsity of layer `i`."""
        return self.removed(i, level) / max(1, self.units[i])

    def levels(self, i: int) -> range:
        """All levels of layer `i`."""
        return range(self.low[i], self.high[i] + 1)

    def shares(self, levels: Sequence[int]) -> dict[str, float]:
        """Sparsities by name."""
        return {name: self.share(i, levels[i]) for i, name in enumerate(self.names)}

    def holds(self, levels: Sequence[int]) -> bool:
        """Whether there are such levels, and their total is the one asked."""
        each = len(levels) == len(self.names) and all(k in self.levels(i) for i, k in enumerate(levels))
        return each and sum(k * s for k, s in zip(levels, self.step, strict=True)) == 0


def check_pattern(pattern: Pattern) -> None:
    """Raise `PatternError` for a pattern that leaves a layer no choice."""
    if isinstance(pattern, NM):
        raise PatternError(
            f"{pattern} has one sparsity in every layer, {1 - pattern.n / pattern.m:.4g}, so there is "
            "nothing to distribute: use allocation=uniform, or another pattern."
        )


def grid_of(layers: Sequence[Layer], sparsity: float, step: float, reach: float) -> Grid:
    """Levels about `step` apart, from `sparsity - reach` to `sparsity + reach`.

    The step of a layer is within a factor of the square root of two of `step`, and at least one unit.

    Raises `SecateurError` for a step or reach outside (0, 1].
    """
    if not (0 < step <= 1 and 0 < reach <= 1):
        raise SecateurError(f"step and reach are sparsities above 0; got step={step}, reach={reach}.")
    units = [layer.units for layer in layers]
    shares = uniform(layers, sparsity)
    base = [count(shares[layer.name], n) for layer, n in zip(layers, units, strict=True)]
    finest = max(1, round(step * min(n for n in units if n)) if any(units) else 1)
    steps = [finest * 2 ** max(0, round(math.log2(max(1.0, step * n / finest)))) for n in units]
    within = 1e-9  # a reach of five steps holds five steps
    low, high = [], []
    for n, b, s in zip(units, base, steps, strict=True):
        low.append(-min(b // s, math.floor(reach * n / s + within)))
        high.append(min((n - b) // s, math.floor(reach * n / s + within)))
    names = tuple(layer.name for layer in layers)
    return Grid(names, tuple(units), tuple(base), tuple(steps), tuple(low), tuple(high))
