"""In which order units go: what is compared with what.

A scope gives each step of each ladder a key, which never falls along a ladder. Steps are taken in the order
of their keys, until the budget holds; of equal keys the earlier ladder goes first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur.core.errors import SelectionError
from secateur.selection.constraints import G
from secateur.selection.ladders import Ladder


@runtime_checkable
class Scope(Protocol):
    """Keys of the steps of ladders, one tensor `[steps]` for each."""

    def __call__(self, ladders: Sequence[Ladder[Any]]) -> list[Tensor]: ...


@dataclass(frozen=True)
class Local:
    """The same sparsity in every group, to one step; scores decide which units of a group go.

    Of a group of `n` units `floor(s n + 1/2)` go at sparsity `s`, as everywhere.
    """

    even: ClassVar[bool] = True  # what is left of a budget goes to no group alone

    def __call__(self, ladders: Sequence[Ladder[Any]]) -> list[Tensor]:
        return [(ladder.removed[1:] + ladder.removed[:-1]) / 2 for ladder in ladders]


@dataclass(frozen=True)
class Global:
    """The units of all groups ranked together by score; a step of several units counts with their mean.

    Args:
        per_cost: divide a score by the cost that removing one unit of its group from the dense model saves,
            so that what goes is what matters least for what it costs. Units that save nothing go last.
    """

    per_cost: bool = False

    def __call__(self, ladders: Sequence[Ladder[Any]]) -> list[Tensor]:
        return [self._per_cost(ladder) if self.per_cost else ladder.values for ladder in ladders]

    def _per_cost(self, ladder: Ladder[Any]) -> Tensor:
        if not ladder.steps:
            return ladder.values
        price = ladder.price()
        if price > 0:
            return ladder.values / price
        return torch.where(ladder.values == -torch.inf, -torch.inf, torch.inf)


@dataclass(frozen=True)
class Isomorphic:
    """The same sparsity in every class of like groups; within a class all units are ranked by score.

    Groups are alike by kind and by the sizes around their units: see `signatures`. The groups of a cluster
    are one class with the groups that are like them. The fraction of a class that has gone is counted in
    units, over the groups that can lose some.

    Source: Fang et al. 2024, Isomorphic Pruning for Vision Models. Differs from the paper: likeness is that
    of kinds and shapes, not of computational graphs.
    """

    def __call__(self, ladders: Sequence[Ladder[Any]]) -> list[Tensor]:
        classes: dict[Hashable, list[int]] = {}
        for i, ladder in enumerate(ladders):
            if ladder.alike is None:
                raise SelectionError(
                    "Isomorphic() compares groups that are alike: pass alike=signatures(groups, shapes)."
                )
            classes.setdefault(ladder.alike, []).append(i)
        keys = [torch.empty(0, dtype=torch.float64)] * len(ladders)
        for members in classes.values():
            inside = [ladders[i] for i in members]
            total = sum(int(ladder.counts[0].sum()) for ladder in inside if ladder.steps)
            order = torch.cat([ladder.values for ladder in inside]).argsort(stable=True)
            units = torch.cat([ladder.units for ladder in inside])[order].double()
            share = torch.empty_like(units)
            # In the middle of a step, so that the nearer side of it is taken, as with `Local`.
            share[order] = (units.cumsum(0) - units / 2) / max(1, total)
            for i, part in zip(members, share.split([ladder.steps for ladder in inside]), strict=True):
                keys[i] = part
        return keys


def signatures(groups: Iterable[G], shapes: Mapping[str, Sequence[int]]) -> dict[G, Hashable]:
    """What each group is like: its kind, and for each member the role, dimension and sizes of the others.

    The group's own size does not count, so that wide and narrow groups between the same widths are alike.
    `shapes` are those of the tensors by name. For pruning in steps, take the signatures of the dense model:
    after a step, groups that were alike lie between different widths.
    """
    found: dict[G, Hashable] = {}
    for group in groups:
        places: Counter[Hashable] = Counter()
        for member in group.members:
            shape = tuple(shapes[member.tensor])
            places[member.role, member.dim, shape[: member.dim] + shape[member.dim + 1 :]] += 1
        found[group] = (group.kind, frozenset(places.items()))
    return found
