"""Which units of each group to keep, so that a cost stays within its limit."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic

import torch
from torch import Tensor

from secateur.core.errors import SelectionError
from secateur.core.topk import keep_largest
from secateur.selection.constraints import Constraint, G
from secateur.selection.ladders import build
from secateur.selection.scopes import Scope
from secateur.selection.search import Tally, fit, fit_measured


@dataclass(frozen=True, eq=False)
class Choice(Generic[G]):
    """What to keep.

    Attributes:
        kept: for every group the indices of the units that stay, rising, int64.
        cost: of what is kept, as the cost function says; at most `limit`.
        limit: what was asked.
        step: cost of a step that no longer fitted, 0 if the budget had nothing to remove. For a cost that is
            not measured, `limit - cost` is at most 1 % of the limit or this step, whichever is larger.
        notes: groups on which the budget had no say, and why.
    """

    kept: dict[G, Tensor]
    cost: float
    limit: float
    step: float
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[G, int]:
        """Units kept of each group."""
        return {group: index.numel() for group, index in self.kept.items()}


def choose(
    scores: Mapping[G, Tensor],
    cost: Callable[[Mapping[G, int]], float],
    limit: float,
    scope: Scope,
    *,
    clusters: Iterable[Sequence[G]] = (),
    constraints: Mapping[G, Constraint] | None = None,
    alike: Mapping[G, Hashable] | None = None,
    price: Callable[[Mapping[G, int]], float] | None = None,
    measured: bool = False,
    unit: str = "",
) -> Choice[G]:
    """Choose the units to keep so that `cost` is within `limit`, as close to it as the steps allow.

    A group loses the units with the lowest scores, of equal ones the first; `-inf` goes first. It never loses
    all its units. The steps in which a group shrinks are single units, or what `multiple_of` or its cluster
    ask for.

    Args:
        scores: a tensor `[size]` for each group; larger is kept. The order of the groups decides between
            equals: the earlier one loses first.
        cost: cost of the model for the numbers of units kept, which all groups of `scores` are given; it does
            not grow when something goes.
        limit: what `cost` may be.
        scope: `Local()`, `Global()` or `Isomorphic()`.
        clusters: groups that must keep the same share of their units, so that one number in the model's code
            fits all. If their sizes differ, only shares that are whole numbers of units everywhere are used.
            Clusters with a group in common are one.
        constraints: by group; a group that is not in it has none. A constraint on a group binds its cluster.
        alike: which groups are alike, for `Isomorphic()`: see `signatures`.
        price: the cost by which `Global(per_cost=True)` divides; `cost` if None.
        measured: whether `cost` has noise, as seconds have: it is called 12 times at most and met within 5 %.
        unit: of the cost, for messages.

    Raises:
        BudgetError: the limit cannot be reached; the message has the smallest cost that can.
        SelectionError: scores do not fit their groups, only a part of a cluster has scores, there are no
            scores, or what the scope needs is missing.
        NonFiniteError: a score is NaN.
    """
    if not scores:
        raise SelectionError("There is no group to prune.")
    if measured and price is None and getattr(scope, "per_cost", False):
        raise SelectionError(f"{scope} would have to measure each group: pass price=, such as the MACs.")
    ladders = build(scores, clusters, constraints or {}, alike, price or cost)
    tally = Tally(ladders, cost)
    keys = torch.cat(scope(ladders))
    of_step = torch.repeat_interleave(torch.tensor([ladder.steps for ladder in ladders]))
    search = fit_measured if measured else partial(fit, even=getattr(scope, "even", False))
    found = search(tally, of_step[keys.argsort(stable=True)], limit, unit)
    kept = tally.kept(found.levels)
    return Choice(
        {group: _largest(scores[group], kept[group]) for group in scores},
        found.cost,
        limit,
        found.step,
        tuple(ladder.note for ladder in ladders if ladder.note),
    )


def _largest(scores: Tensor, n: int) -> Tensor:
    """Indices of the `n` largest scores, rising; the first of equal ones are left out first."""
    keep = keep_largest(scores.detach().to("cpu", torch.float64), scores.numel() - n)
    return keep.nonzero().view(-1)
