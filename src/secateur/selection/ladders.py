"""The steps in which groups shrink: one ladder for each set of groups that keep the same share."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.core.errors import BudgetError, SelectionError
from secateur.core.topk import refuse_nan
from secateur.selection.constraints import Constraint, G, GroupLike


@dataclass(frozen=True, eq=False)
class Ladder(Generic[G]):
    """Groups that keep the same share of their units, and the counts that they may keep.

    Attributes:
        groups: one, or those of a cluster.
        counts: units kept of each group at each level, falling from level to level. Step `i` goes from level
            `i` to level `i + 1`.
        values: mean score of the units that each step removes, never falling.
        price: cost that the first step from the dense model saves, for each unit; computed when asked for.
        alike: what the groups are like; ladders with equal ones may be compared.
        note: why the ladder has no steps, if it has none.
    """

    groups: tuple[G, ...]
    counts: Int[Tensor, "levels groups"]
    values: Float[Tensor, " steps"]
    price: Callable[[], float]
    alike: Hashable
    note: str | None = None

    @property
    def steps(self) -> int:
        """How many steps the ladder has."""
        return self.counts.shape[0] - 1

    @property
    def units(self) -> Int[Tensor, " steps"]:
        """Units that each step removes, over all groups."""
        return -self.counts.sum(1).diff()

    @property
    def removed(self) -> Float[Tensor, " levels"]:
        """Sparsity of the groups at each level."""
        return 1 - self.counts[:, 0].double() / self.groups[0].size


def build(
    scores: Mapping[G, Tensor],
    clusters: Iterable[Sequence[G]],
    constraints: Mapping[G, Constraint],
    alike: Mapping[G, Hashable] | None,
    cost: Callable[[Mapping[G, int]], float],
) -> list[Ladder[G]]:
    """The ladders of all groups, in the order of the groups; `cost` is that of their prices.

    Raises `SelectionError` if a cluster holds a group without scores or scores do not fit their group,
    `NonFiniteError` on NaN, and `BudgetError` if groups of a cluster have unlike fixed sparsities.
    """
    for group, score in scores.items():
        if alike is not None and group not in alike:
            raise SelectionError(f"alike= does not say what {group.name} is like.")
        if score.shape != (group.size,):
            raise SelectionError(
                f"{group.name} has {group.size} units, but scores of shape {tuple(score.shape)}."
            )
        refuse_nan(score, f"The score of {group.name}")
    dense = {group: group.size for group in scores}
    whole = cache(lambda: float(cost(dense)))

    def price(groups: tuple[G, ...], counts: Tensor) -> float:
        kept = dict(zip(groups, counts[1].tolist(), strict=True))
        return (whole() - float(cost({**dense, **kept}))) / int((counts[0] - counts[1]).sum())

    return [_ladder(groups, scores, constraints, alike, price) for groups in _joined(scores, clusters)]


def _joined(scores: Mapping[G, Tensor], clusters: Iterable[Sequence[G]]) -> list[tuple[G, ...]]:
    """Sets of groups that keep the same share; clusters that have a group in common are one."""
    together: dict[G, list[G]] = {group: [group] for group in scores}
    for cluster in clusters:
        missing = [group for group in cluster if group not in scores]
        if len(missing) == len(cluster):
            continue
        if missing:
            held = next(group for group in cluster if group in scores)
            raise SelectionError(
                f"{held.name} and {missing[0].name} must keep the same share, as one number in the model "
                f"sets both, but only the first has scores. Prune both or neither."
            )
        for group in cluster[1:]:
            one, other = together[cluster[0]], together[group]
            if one is not other:
                one.extend(other)
                together.update(dict.fromkeys(other, one))
    place = {group: i for i, group in enumerate(scores)}
    joined = {id(groups): tuple(sorted(groups, key=place.__getitem__)) for groups in together.values()}
    return list(joined.values())


def _ladder(
    groups: tuple[G, ...],
    scores: Mapping[G, Tensor],
    constraints: Mapping[G, Constraint],
    alike: Mapping[G, Hashable] | None,
    price: Callable[[tuple[G, ...], Tensor], float],
) -> Ladder[G]:
    counts, note = _levels(groups, [constraints.get(group, Constraint()) for group in groups])
    return Ladder(
        groups,
        counts,
        _values([scores[group] for group in groups], counts),
        lambda: price(groups, counts),
        None if alike is None else frozenset(map(alike.__getitem__, groups)),
        note,
    )


def _levels(
    groups: Sequence[GroupLike], given: Sequence[Constraint]
) -> tuple[Int[Tensor, "levels groups"], str | None]:
    """Counts that may be kept, the most first; equal shares are whole numbers for every group."""
    sizes = torch.tensor([group.size for group in groups])
    parts = math.gcd(*sizes.tolist())
    share = torch.arange(parts, 0, -1)
    counts = share[:, None] * (sizes // parts)
    multiple = torch.tensor([c.multiple_of for c in given])
    least = torch.tensor([c.least(group.size) for c, group in zip(given, groups, strict=True)])
    fits = (counts % multiple == 0) & (counts >= least)
    fits[0] = True  # whole, whatever the constraints
    allowed = fits.all(1)
    share, counts = share[allowed], counts[allowed]
    name = groups[0].name if len(groups) == 1 else f"{groups[0].name} and {len(groups) - 1} more"
    fixed = {c.sparsity for c in given if c.sparsity is not None}
    if len(fixed) > 1:
        raise BudgetError(
            f"{name} must keep the same share, but the fixed sparsities {sorted(fixed)} are given. Give one."
        )
    if fixed:
        (sparsity,) = fixed
        off = (share.double() - (1 - sparsity) * parts).abs()
        nearest = off <= off.min() + 1e-9
        at = int(nearest.nonzero()[-1])  # of two the smaller count, as `count` rounds
        got = 1 - share[at].item() / parts
        if abs(got - sparsity) < 1e-9:
            return counts[at : at + 1], None
        near = f"the allowed value nearest to {sparsity:g}"
        return counts[at : at + 1], f"{name}: sparsity fixed at {got:.4g}, {near}."
    if len(counts) == 1:
        return counts, f"{name}: kept whole, as no smaller count meets its constraints."
    return counts, None


def _values(scores: Sequence[Tensor], counts: Int[Tensor, "levels groups"]) -> Float[Tensor, " steps"]:
    """Mean score of the units that each step removes, the lowest of each group first."""
    steps = counts.shape[0] - 1
    total = torch.zeros(steps, dtype=torch.float64)
    for i, score in enumerate(scores):
        ranked = score.detach().to("cpu", torch.float64).sort(stable=True).values
        gone = score.numel() - counts[:, i]
        step_of_rank = torch.repeat_interleave(torch.arange(steps), gone.diff())
        total.index_add_(0, step_of_rank, ranked[int(gone[0]) : int(gone[-1])])
    mean = total / -counts.sum(1).diff()
    # Infinities of both signs in one step: a unit that must stay outweighs one that must go. The running
    # maximum only mends rounding, as ranked scores never fall.
    return mean.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).cummax(0).values
