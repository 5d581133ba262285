"""Modules that the trace never met, such as an expert to which no token was sent."""

from __future__ import annotations

from torch import nn

from secateur.graph import axes
from secateur.graph.axes import Axis, Dim
from secateur.graph.types import Stored, Types, Use, blame


def type_by_siblings(model: nn.Module, types: Types) -> tuple[str, ...]:
    """Type unmet modules like a met one of the same class and shapes; the names of those that were.

    Axes that only the sibling has are renewed, axes that it shares with the rest are shared too. Without
    this, cutting a shared axis would leave the unmet module behind, and wrong.
    """
    if all(id(s.tensor) in types.used for s in types.stored.values() if s.is_parameter):
        return ()
    modules = dict(model.named_modules())
    stored = {name: _stored(module, types) for name, module in modules.items()}
    unmet = {name for name, found in stored.items() if found and not any(_used(s, types) for s in found)}
    holders = _holders(types) if unmet else {}
    done = []
    for name in sorted(unmet):
        if name.rpartition(".")[0] in unmet and "." in name:
            continue  # its parent is copied as a whole
        sibling = _sibling(name, modules, stored, unmet, types)
        if sibling is not None:
            _copy(name, stored[name], stored[sibling], types, holders)
            done.append(name)
    return tuple(done)


def _stored(module: nn.Module, types: Types) -> list[Stored]:
    tensors = (*module.parameters(), *module.buffers())
    return [types.stored[id(t)] for t in tensors if id(t) in types.stored]


def _used(stored: Stored, types: Types) -> bool:
    return id(stored.tensor) in types.used


def _sibling(
    name: str,
    modules: dict[str, nn.Module],
    stored: dict[str, list[Stored]],
    unmet: set[str],
    types: Types,
) -> str | None:
    shapes = [s.tensor.shape for s in stored[name]]
    alike = [
        other
        for other, module in modules.items()
        if other not in unmet
        and type(module) is type(modules[name])
        and stored[other]
        and all(_used(s, types) for s in stored[other] if s.is_parameter)
        and [s.tensor.shape for s in stored[other]] == shapes
    ]
    return max(alike, key=lambda other: _common(other, name), default=None)


def _common(a: str, b: str) -> int:
    """How many parts of two names agree from the front."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(a.count("."), b.count(".")) + 1)


def _holders(types: Types) -> dict[Axis, set[int]]:
    """The stored tensors that each leaf occurs in."""
    found: dict[Axis, set[int]] = {}
    for key, stored in types.stored.items():
        for dim in stored.type.dims:
            for leaf in axes.leaves(dim):
                found.setdefault(leaf, set()).add(key)
    return found


def _copy(
    name: str, new: list[Stored], old: list[Stored], types: Types, holders: dict[Axis, set[int]]
) -> None:
    inside = {id(s.tensor) for s in old}
    renewed: dict[Axis, Axis] = {}

    def copied(dim: Dim) -> Dim:
        out = []
        for axis in axes.atoms(dim):
            if axis.terms is not None:
                whole = Axis(axis.size)
                whole.terms = tuple(copied(term) for term in axes.terms_of(axis))
                out.append(whole)
            elif holders[axis] <= inside:
                out.append(renewed.setdefault(axis, Axis(axis.size, axis.frozen)))
            else:
                out.append(axis)
        return tuple(out)

    roots = {}
    for mine, theirs in zip(new, old, strict=True):
        for dim, other in zip(mine.type.dims, theirs.type.dims, strict=True):
            axes.unify(dim, copied(other), blame)
        types.used.add(id(mine.tensor))
        roots[theirs.name] = mine.name
    for use in list(types.uses):
        if use.root in roots:
            types.uses.append(Use(copied_use(use.dim, renewed), use.role, roots[use.root]))


def copied_use(dim: Dim, renewed: dict[Axis, Axis]) -> Dim:
    """A dimension with renewed leaves in place of the old; sums are flattened to the leaves they hold."""
    return tuple(renewed.get(leaf, leaf) for leaf in axes.leaves(dim))
