"""Evolution of levels: offspring by switches that keep the total, sieved on more and more data.

Reference: Sieberling et al. 2024, EvoPress, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from secateur.core.errors import SecateurError
from secateur.levels.grid import Grid

Levels = tuple[int, ...]
Fitness = Callable[[Levels, Sequence[int]], float]
"""Of levels on some batches, by number; less is better."""

_ATTEMPTS = 100  # to find a switch that stays in reach


@dataclass(frozen=True)
class Evolution:
    """How offspring are made and chosen from.

    Attributes:
        offspring: of one parent in each generation.
        survivors: of each stage but the last, which one survives.
        shares: of the batches that each stage measures on; the last measures on all.
        switches: at most, that make one of the offspring.
        seed: of all that is drawn.
    """

    offspring: int = 32
    survivors: tuple[int, ...] = (8, 2)
    shares: tuple[float, ...] = (1 / 16, 1 / 4)
    switches: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.offspring < 1 or self.switches < 1 or len(self.survivors) != len(self.shares):
            raise SecateurError(
                f"{self}: offspring and switches are at least 1, and each stage has survivors and a share."
            )
        if not all(n >= 1 for n in self.survivors) or not all(0 < s <= 1 for s in self.shares):
            raise SecateurError(f"{self}: survivors are at least 1, shares of the batches above 0, up to 1.")


def generation(
    how: Evolution, grid: Grid, parent: Levels, distance: float, number: int, batches: int, fitness: Fitness
) -> tuple[Levels, float]:
    """The best of a parent and its offspring, on all batches.

    Args:
        how: they are made.
        grid: of levels.
        parent: whose total is kept.
        distance: of the parent on all batches.
        number: of the generation, which with the seed decides all that is drawn.
        batches: how many there are.
        fitness: called with levels and numbers of batches.
    """
    generator = torch.Generator().manual_seed(how.seed * 1_000_003 + number)
    pool = list(offspring(how, grid, parent, generator))
    order = torch.randperm(batches, generator=generator).tolist()
    for survivors, share in zip(how.survivors, how.shares, strict=True):
        if len(pool) > survivors:
            some = sorted(order[: math.ceil(share * batches)])
            pool = sorted(pool, key=lambda levels, some=some: fitness(levels, some))[:survivors]  # type: ignore[misc]
    best = (parent, distance)
    for levels in pool:
        far = fitness(levels, range(batches))
        if far < best[1]:
            best = (levels, far)
    return best


def offspring(how: Evolution, grid: Grid, parent: Levels, generator: torch.Generator) -> dict[Levels, None]:
    """Levels a few switches from the parent's, each once, in the order drawn; fewer if there are no more."""
    found: dict[Levels, None] = {}
    for _ in range(4 * how.offspring):
        if len(found) == how.offspring:
            break
        child = parent
        for _ in range(min(_draw(how.switches, generator), _draw(how.switches, generator)) + 1):
            child = switched(grid, child, generator)
        if child != parent:
            found.setdefault(child)
    return found


def switched(grid: Grid, levels: Levels, generator: torch.Generator) -> Levels:
    """With one layer some levels up and another some down, by as many units; the same if none is in reach.

    The number of units is the longer step of the two layers.
    """
    for _ in range(_ATTEMPTS if len(levels) > 1 else 0):
        up, down = torch.randperm(len(levels), generator=generator)[:2].tolist()
        units = max(grid.step[up], grid.step[down])
        raised, lowered = levels[up] + units // grid.step[up], levels[down] - units // grid.step[down]
        if raised <= grid.high[up] and lowered >= grid.low[down]:
            changed = list(levels)
            changed[up], changed[down] = raised, lowered
            return tuple(changed)
    return levels


def _draw(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (1,), generator=generator))
