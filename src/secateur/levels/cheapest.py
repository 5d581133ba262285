"""The levels of least cost among those that meet the total: a knapsack, solved exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.levels.grid import Grid


@dataclass(frozen=True)
class _Sums:
    """Least cost by sum of steps, beginning at `low`, in multiples of `step`."""

    low: int
    step: int
    cost: NDArray[np.float64]

    def coarser(self, step: int) -> _Sums:
        """Those that layers with longer steps can still make up for."""
        ratio = step // self.step
        low = -(-self.low // ratio)
        return _Sums(low, step, self.cost[low * ratio - self.low :: ratio])

    def plus(self, costs: NDArray[np.float64], low: int) -> tuple[_Sums, NDArray[np.int64]]:
        """With one more layer, and which of its levels each sum has."""
        n = len(self.cost) + len(costs) - 1
        cost, chosen = np.full(n, np.inf), np.zeros(n, dtype=np.int64)
        for k, more in enumerate(costs):
            part = slice(k, k + len(self.cost))
            better = self.cost + more < cost[part]
            cost[part] = np.where(better, self.cost + more, cost[part])
            chosen[part] = np.where(better, k, chosen[part])
        return _Sums(self.low + low, self.step, cost), chosen


def cheapest(grid: Grid, costs: Sequence[Sequence[float]]) -> tuple[int, ...]:
    r"""Levels $k$ that minimise $\sum_i c_i(k_i)$ with $\sum_i k_i\,\mathrm{step}_i = 0$.

    Layers are taken in the order of their steps. A sum that no longer step can make up for is forgotten when
    the steps get longer, so that there are never more sums than levels of all layers together. Costs need not
    be convex.

    Args:
        grid: of the layers.
        costs: of each layer, for `grid.levels(i)`.
    """
    order = sorted(range(len(grid.names)), key=lambda i: grid.step[i])
    sums = _Sums(0, grid.step[order[0]], np.zeros(1))
    found: list[tuple[int, _Sums, NDArray[np.int64]]] = []
    for i in order:
        if grid.step[i] > sums.step:
            sums = sums.coarser(grid.step[i])
        sums, chosen = sums.plus(np.asarray(costs[i], dtype=np.float64), grid.low[i])
        found.append((i, sums, chosen))
    levels = [0] * len(order)
    total = 0  # in units
    for i, sums, chosen in reversed(found):
        levels[i] = grid.low[i] + int(chosen[total // sums.step - sums.low])
        total -= levels[i] * sums.step
    return tuple(levels)
