"""Groups: axes that may be cut, with every place where they live."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.graph import axes
from secateur.graph.axes import Axis, Dim
from secateur.graph.kinds import INTERIOR, kind_of, roles_beside
from secateur.graph.types import Axisfacts, Stored, Types, facts


@dataclass(frozen=True)
class Member:
    """One dimension of one stored tensor in which a group lives.

    Attributes:
        tensor: name of the parameter or buffer, the first if it has several.
        dim: its dimension.
        role: "out" if the tensor produces the axis (rows of a linear layer), "in" if it consumes it
            (columns), "along" for what only follows: biases, norms, buffers.
    """

    tensor: str
    dim: int
    role: str


@dataclass
class Home:
    """The graph that groups belong to."""

    graph: Any = None


@dataclass(frozen=True, eq=False)
class Group:
    """An axis that is cut in step everywhere.

    Attributes:
        name: kind and first member.
        kind: found from structure: "width", "neurons", "filters", "heads", "kv_groups", "queries" (query
            heads of one key-value group), "head_dim", "experts", "groups" (of a convolution), "repeats".
        size: positions along the axis.
        members: where it lives.
        inexact: why removing a position is not the same as zeroing its weights; empty if it is.
        frozen: why it cannot be cut, None if it can.
        axis: in the algebra.
        home: the graph.
        step: counts that can be removed are multiples of this.
        least: fewest units that the code can follow.
    """

    name: str
    kind: str
    size: int
    members: tuple[Member, ...]
    inexact: tuple[str, ...]
    frozen: str | None
    axis: Axis = field(repr=False)
    home: Home = field(repr=False)
    step: int = 1
    least: int = 1

    @property
    def exact(self) -> bool:
        """Whether removing positions equals zeroing their weights."""
        return not self.inexact

    @property
    def interior(self) -> bool:
        """Whether the group lies inside one block, as opposed to the width that runs through the model."""
        return self.kind in INTERIOR

    def __str__(self) -> str:
        return f"{self.name} ({self.size})"


def find_groups(types: Types, exempt: Container[str]) -> list[Group]:
    """A group for every leaf that a parameter holds, frozen ones too."""
    known = facts(types, exempt)
    where: dict[Axis, list[tuple[Stored, int]]] = defaultdict(list)
    for stored in types.stored.values():
        for i, dim in enumerate(stored.type.dims):
            for leaf in axes.leaves(dim):
                where[leaf].append((stored, i))
    names: dict[str, int] = defaultdict(int)
    roles_of = _member_roles(types)
    home = Home()
    groups = []
    for leaf, places in where.items():
        if leaf.size < 2 or not any(stored.is_parameter for stored, _ in places):
            continue
        members = tuple(
            Member(stored.name, i, roles_of.get((stored.name, leaf, i), "along"))
            for stored, i in places
            if stored.name
        )
        kind = _kind(leaf, places, known)
        first = next((m for m in members if m.role == "out"), members[0])
        name = f"{kind} of {first.tensor}" + (f"[{first.dim}]" if first.dim else "")
        names[name] += 1
        if names[name] > 1:
            name = f"{name} #{names[name]}"
        groups.append(
            Group(name, kind, leaf.size, members, tuple(known.inexact[leaf]), leaf.frozen, leaf, home)
        )
    return groups


def _member_roles(types: Types) -> dict[tuple[str, Axis, int], str]:
    """Whether a parameter produces or consumes an axis along one of its dimensions."""
    by_name = {stored.name: stored for stored in types.stored.values() if stored.name}
    found: dict[tuple[str, Axis, int], str] = {}
    for use in types.uses:
        if use.role not in ("out", "in") or use.root not in by_name:
            continue
        dims = by_name[use.root].type.dims
        at = _which(use.dim, dims)
        for leaf in axes.leaves(use.dim):
            for i in at if at else range(len(dims)):
                if leaf in axes.leaves(dims[i]):
                    found.setdefault((use.root, leaf, i), use.role)
    return found


def _which(dim: Dim, dims: list[Dim]) -> list[int]:
    """The dimensions that are this very one, not another that is indexed alike."""
    return [i for i, d in enumerate(dims) if d is dim]


def _kind(leaf: Axis, places: list[tuple[Stored, int]], known: Axisfacts) -> str:
    beside: dict[Axis, None] = {}
    convolutional = False
    for stored, i in places:
        beside |= axes.leaves(stored.type.dims[i])
        convolutional |= stored.tensor.dim() >= 3 and "conv" in known.roles[leaf]
    return kind_of(known.roles[leaf], roles_beside(leaf, beside, known.roles), convolutional)


def labels(axis: Axis, dim: Dim) -> Tensor:
    """For each position of `dim` the position of `axis` that it belongs to, -1 for none. Int64."""
    out = torch.full((1,), -1, dtype=torch.int64)
    for atom in axes.atoms(dim):
        own = _atom_labels(axis, atom)
        out = torch.where(own[None] >= 0, own[None], out[:, None]).reshape(-1)
    return out


def _atom_labels(axis: Axis, atom: Axis) -> Tensor:
    if atom is axis:
        return torch.arange(atom.size)
    if atom.terms is None:
        return torch.full((atom.size,), -1, dtype=torch.int64)
    return torch.cat([labels(axis, term) for term in axes.terms_of(atom)])


def occurs_twice(dim: Dim) -> list[Axis]:
    """Leaves that stand more than once in one product, so that a position belongs to two of theirs."""
    seen: set[Axis] = set()
    twice: list[Axis] = []
    for atom in axes.atoms(dim):
        inside = set(axes.leaves((atom,)))
        twice += [leaf for leaf in inside if leaf in seen]
        seen |= inside
        if atom.terms is not None:
            for term in axes.terms_of(atom):
                twice += occurs_twice(term)
    return twice
