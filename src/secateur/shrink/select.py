"""Which groups are cut, and which group of the dense model one is after several steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import SelectionError
from secateur.core.names import matches
from secateur.graph import Graph, Group
from secateur.selection import Constraint, constraints, signatures
from secateur.surgery import Plan

Origins = Mapping[Group, Group]
"""Group of a graph -> group of the dense model's that it is."""


def select_groups(graph: Graph, kinds: Collection[str] | None, exclude: tuple[str, ...] = ()) -> list[Group]:
    """Groups of these kinds whose clusters are complete; `SelectionError` if there is none.

    A group that one number in the code ties to a group that stays whole stays whole too.
    """
    chosen = [g for g in graph.groups() if kinds is None or g.kind in kinds]
    names = {g: [g.name, *(m.tensor for m in g.members)] for g in chosen}
    for glob in exclude:
        if not any(matches(n, glob) for g in chosen for n in names[g]):
            raise SelectionError(f"exclude={glob!r} matches no group and none of their tensors.")
    left = [g for g in chosen if not any(matches(n, glob) for n in names[g] for glob in exclude)]
    complete = _with_whole_clusters(left, graph.clusters())
    if not complete:
        raise SelectionError(_nothing_to_cut(graph, kinds, chosen, left))
    return complete


def _with_whole_clusters(groups: Iterable[Group], clusters: Iterable[Sequence[Group]]) -> list[Group]:
    left = list(groups)
    while True:
        have = set(left)
        broken = {g for c in clusters if not have.issuperset(c) for g in c}
        if not broken & have:
            return left
        left = [g for g in left if g not in broken]


def _nothing_to_cut(
    graph: Graph, kinds: Collection[str] | None, chosen: Sequence[Group], left: Sequence[Group]
) -> str:
    if left:
        return (
            f"{left[0]} and groups that stay whole are sized by one number in the code, so that neither "
            "can be cut: name all their kinds, see Graph.clusters()."
        )
    if chosen:
        return f"exclude leaves nothing of the {len(chosen)} groups to cut."
    found = sorted({g.kind for g in graph.groups()})
    why = "; ".join(f.reason for f in graph.frozen()[:2])
    return (
        f"No group of the kinds {', '.join(kinds) if kinds else 'any'} can be cut; the model has "
        f"{', '.join(found) or 'none'}." + (f" Frozen: {why}." if why else " It has no parameters to cut.")
    )


@dataclass(frozen=True)
class Wanted:
    """What was asked of the dense model's groups, which holds in every step.

    Names and kinds are those of the dense model: a step may leave one key-value group, and its queries are
    plain heads from then on.

    Attributes:
        constraints: of the groups that may be cut.
        alike: what each of them is like; later it lies between other widths.
    """

    constraints: Mapping[Group, Constraint]
    alike: Mapping[Group, Any]

    @classmethod
    def of(
        cls, graph: Graph, kinds: Collection[str] | None, exclude: tuple[str, ...], given: Mapping[str, Any]
    ) -> Wanted:
        """Resolve kinds and globs on the dense model."""
        groups = select_groups(graph, kinds, exclude)
        shapes = {s.name: tuple(s.tensor.shape) for s in graph.types.stored.values()}
        return cls(constraints(groups, **given), signatures(groups, shapes))

    def groups(self, graph: Graph, origins: Origins) -> list[Group]:
        """Groups of a step that may be cut."""
        known = (g for g in graph.groups() if origins.get(g) in self.constraints)
        return _with_whole_clusters(known, graph.clusters())

    def constraint(self, group: Group, dense: Group) -> Constraint:
        """What was asked, counted from the dense group, and what the model's code can follow."""
        c = self.constraints[dense]
        if group.size < dense.size:
            c = c.later(dense.size, group.size)
        if group.step > 1:
            c = replace(c, multiple_of=math.lcm(c.multiple_of, group.step))
        return replace(c, minimum=max(c.minimum, group.least)) if group.least > 1 else c


def follow(origins: Origins, plan: Plan, new: Graph) -> dict[Group, Group]:
    """The origins of the groups of the model that was cut: of those whose units lie in the same places.

    A group of which one unit is left has no dimension any more, and is none.
    """
    at: dict[tuple[str, int], list[Group]] = {}
    for g in new.all_groups:
        for m in g.members:
            at.setdefault((m.tensor, m.dim), []).append(g)
    found = {}
    for g, dense in origins.items():
        for m in g.members:
            wanted = _labels_left(plan, g, m.tensor, m.dim)
            same = (h for h in at.get((m.tensor, m.dim), ()) if h not in found)
            match = next((h for h in same if torch.equal(new.labels(h, m.tensor, m.dim), wanted)), None)
            if match is not None:
                found[match] = dense
                break
    return found


def _labels_left(plan: Plan, group: Group, tensor: str, dim: int) -> Tensor:
    """For each index that a dimension keeps, which of the units that are left it belongs to, or -1."""
    kept = plan.surgery.get(group, tuple(range(group.size)))
    renamed = torch.full((group.size + 1,), -1)  # the last entry is for -1
    renamed[list(kept)] = torch.arange(len(kept))
    return renamed[plan.surgery.graph.labels(group, tensor, dim)[plan.keep(tensor, dim)]]
