"""How far to go along a ranking of steps, with few calls of the cost function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.budget import format_amount
from secateur.core.errors import BudgetError
from secateur.selection.constraints import G
from secateur.selection.ladders import Ladder

NEAR = 0.01  # of the limit: what counts as meeting it
NEAR_MEASURED = 0.05  # the same for costs with noise
MEASUREMENTS = 12  # at most, for costs with noise

Levels = tuple[int, ...]  # of each ladder, 0 is whole


@dataclass
class Tally(Generic[G]):
    """The cost function over levels; counts its calls, and makes none twice."""

    ladders: Sequence[Ladder[G]]
    cost: Callable[[Mapping[G, int]], float]
    known: dict[Levels, float] = field(default_factory=dict)

    def __call__(self, levels: Levels) -> float:
        if levels not in self.known:
            self.known[levels] = float(self.cost(self.kept(levels)))
        return self.known[levels]

    def kept(self, levels: Levels) -> dict[G, int]:
        """Units kept of each group."""
        return {
            group: count
            for ladder, level in zip(self.ladders, levels, strict=True)
            for group, count in zip(ladder.groups, ladder.counts[level].tolist(), strict=True)
        }


@dataclass(frozen=True)
class Found:
    """Levels that meet a limit, their cost, and the cost of the last step that no longer fitted (0: none)."""

    levels: Levels
    cost: float
    step: float


@dataclass(frozen=True)
class _Walk:
    """A ranking of steps, of which some ladders take no part: these stay at their level."""

    order: Int[Tensor, " steps"]  # ladder of each step
    held: Mapping[int, int]
    ladders: int

    def at(self, n: int) -> Levels:
        """Levels after the first `n` steps."""
        levels = torch.bincount(self.order[:n], minlength=self.ladders).tolist()
        for ladder, level in self.held.items():
            levels[ladder] = level
        return tuple(levels)

    def hold(self, ladder: int, n: int) -> tuple[_Walk, int]:
        """Hold a ladder at its level after `n` steps; returns how many of them are left."""
        others = self.order != ladder
        left = int(others[:n].count_nonzero())
        return _Walk(self.order[others], {**self.held, ladder: n - left}, self.ladders), left


def fit(
    tally: Tally[Any], order: Int[Tensor, " steps"], limit: float, unit: str, even: bool = False
) -> Found:
    """The fewest steps after which the cost is within `limit`, then what still fits is put back.

    1. Bisection over the number of steps taken.
    2. While more than 1 % of the limit is unused: the ladder whose step is too large to be put back is held,
       and the steps of the others are put back from the last, until the next does not fit. Not if the shares
       are to stay `even`: then the unused part may be as large as that step.
    3. Then each of the other ladders is put back by one step, the best first, if that fits.

    The cost is asked for O(log steps) times for 1., and about once or twice for each ladder for 2. and 3.

    Raises `BudgetError` if the cost is above the limit after all steps.
    """
    walk = _Walk(order, {}, len(tally.ladders))
    everything = _check_ends(tally, walk, limit, unit)
    if everything is not None:
        return everything
    n = _bisect(lambda k: tally(walk.at(k)) <= limit, 0, len(order))
    step = 0.0
    while n > 0:
        step = tally(walk.at(n - 1)) - tally(walk.at(n))
        walk, n = walk.hold(int(walk.order[n - 1]), n)
        if even or limit - tally(walk.at(n)) <= NEAR * limit:
            break
        n = _put_back(lambda k, walk=walk: tally(walk.at(k)) <= limit, n)  # type: ignore[misc]
    levels = _put_back_one_each(tally, walk, n, limit)
    return Found(levels, tally(levels), step)


def fit_measured(tally: Tally[Any], order: Int[Tensor, " steps"], limit: float, unit: str) -> Found:
    """Bisection with at most 12 calls, for a cost that is measured; ends within 5 % below the limit.

    Only whole candidates are compared with the limit, never two of them with each other. If none lies within
    5 %, the largest share that was found to fit is taken: a finer one was not told apart. As measurements
    have noise, another one of the same candidate may exceed the limit by that much.

    Raises `BudgetError` if the cost is above the limit after all steps.
    """
    walk = _Walk(order, {}, len(tally.ladders))
    everything = _check_ends(tally, walk, limit, unit)
    if everything is not None:
        return everything
    low, high = 0, len(order)
    while high - low > 1 and len(tally.known) < MEASUREMENTS:
        if tally(walk.at(high)) >= (1 - NEAR_MEASURED) * limit:
            break
        middle = (low + high) // 2
        low, high = (low, middle) if tally(walk.at(middle)) <= limit else (middle, high)
    levels = walk.at(high)
    return Found(levels, tally(levels), max(0.0, tally(walk.at(low)) - tally(levels)))


def _check_ends(tally: Tally[Any], walk: _Walk, limit: float, unit: str) -> Found | None:
    """What is found if nothing need go; None if the limit lies between nothing and everything."""
    whole = walk.at(0)
    if tally(whole) <= limit:
        return Found(whole, tally(whole), 0.0)
    least = tally(walk.at(len(walk.order)))
    if least > limit:
        raise BudgetError(
            f"At most {_with(unit, limit)} cannot be reached: with every group at its smallest the model "
            f"still has {_with(unit, least)}. Ask for no less than that, loosen the groups' constraints, or "
            f"let more groups be pruned."
        )
    return None


def _bisect(fits: Callable[[int], bool], low: int, high: int) -> int:
    """A number that fits whose predecessor does not, if `low` does not fit and `high` does."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _put_back(fits: Callable[[int], bool], n: int) -> int:
    """The same, searched for downwards from `n`, which fits, in growing strides; 0 if that fits."""
    stride = 1
    while n > 0:
        lower = max(0, n - stride)
        if not fits(lower):
            return _bisect(fits, lower, n)
        n, stride = lower, 2 * stride
    return 0


def _with(unit: str, amount: float) -> str:
    return f"{format_amount(amount)} {unit}".rstrip()


def _put_back_one_each(tally: Tally[Any], walk: _Walk, n: int, limit: float) -> Levels:
    """Levels after `n` steps with one step of each ladder put back if that fits, the last to go first."""
    levels = walk.at(n)
    last = dict.fromkeys(reversed(walk.order[:n].tolist()))
    for ladder in last:
        tried = (*levels[:ladder], levels[ladder] - 1, *levels[ladder + 1 :])
        if tally(tried) <= limit:
            levels = tried
    return levels
