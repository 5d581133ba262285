"""What is left of each stored tensor, as data: an expression over kept positions for every dimension cut.

A surgery on disk is this and nothing else, so that it can be done again on a freshly built model without a
trace, and without running anything that a file says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import ArtifactError
from secateur.graph import axes
from secateur.graph.axes import Axis, Dim

Node = int | str | tuple[Any, ...]
"""A size that stays, the name of a cut axis, or ("*", nodes...) or ("+", nodes...)."""


@dataclass(frozen=True)
class CutAxis:
    """One axis: which of its positions are kept."""

    label: str
    kind: str
    size: int
    kept: tuple[int, ...]

    def mask(self) -> Tensor:
        """Bool `[size]`."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[list(self.kept)] = True
        return mask


@dataclass(frozen=True)
class Attribute:
    """A number that an object keeps: a module, or a configuration reached through one."""

    module: str
    steps: tuple[str | tuple[str, str], ...]
    name: str
    index: int | None
    old: int | float
    new: int | float

    def __str__(self) -> str:
        steps = [s if isinstance(s, str) else f"{s[0]}[{s[1]}]" for s in self.steps]
        entry = "" if self.index is None else f"[{self.index}]"
        return ".".join(filter(None, (self.module, *steps, self.name))) + entry


@dataclass(frozen=True)
class Cuts:
    """A surgery as plain data.

    Attributes:
        axes: kept positions, by a short name.
        tensors: shape before, and a node for each dimension, by the name of the parameter or buffer.
        attributes: numbers that change with it.
        scales: factors by which what is left of a tensor is multiplied, `(w + offset) * factor - offset`.
        swaps: modules whose class is exchanged for one that reads sizes from its weights.
        edits: calls in source code, each as plain data.
        kept_scales: scales of attention that modules keep as they were trained, by module and attribute.
        expressed: whether the model's own configuration, as the attributes set it, describes what is left.
    """

    axes: Mapping[str, CutAxis]
    tensors: Mapping[str, tuple[tuple[int, ...], tuple[Node, ...]]]
    attributes: tuple[Attribute, ...] = ()
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    swaps: tuple[str, ...] = ()
    edits: tuple[Mapping[str, Any], ...] = ()
    expressed: bool = False
    kept_scales: tuple[tuple[str, str, float], ...] = ()

    def mask(self, tensor: str, dim: int) -> Tensor:
        """Which indices of a dimension are kept. Bool `[size]`."""
        shape, nodes = self.tensors[tensor]
        mask = self._mask(nodes[dim])
        if mask.shape[0] != shape[dim]:
            raise ArtifactError(
                f"The cut of {tensor}, dimension {dim}, is for {mask.shape[0]} not {shape[dim]} positions."
            )
        return mask

    def _mask(self, node: Node) -> Tensor:
        if isinstance(node, int):
            return torch.ones(node, dtype=torch.bool)
        if isinstance(node, str):
            return self.axes[node].mask()
        parts = [self._mask(part) for part in node[1:]]
        if node[0] == "+":
            return torch.cat(parts)
        mask = parts[0]
        for part in parts[1:]:
            mask = (mask[:, None] & part[None]).reshape(-1)
        return mask

    def index(self, tensor: str, dim: int) -> Tensor | None:
        """Kept indices of a dimension, None if that is all. Int64 `[kept]`."""
        _, nodes = self.tensors[tensor]
        if isinstance(nodes[dim], int):
            return None
        return self.mask(tensor, dim).nonzero().flatten()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "axes": {
                name: {"label": a.label, "kind": a.kind, "size": a.size, "kept": _ranges(a.kept)}
                for name, a in self.axes.items()
            },
            "tensors": {
                n: {"shape": list(s), "dims": [_listed(d) for d in dims]}
                for n, (s, dims) in self.tensors.items()
            },
            "attributes": [
                {
                    "module": a.module,
                    "steps": [list(s) if isinstance(s, tuple) else s for s in a.steps],
                    "name": a.name,
                    "index": a.index,
                    "old": a.old,
                    "new": a.new,
                }
                for a in self.attributes
            ],
            "scales": {n: list(s) for n, s in self.scales.items()},
            "swaps": list(self.swaps),
            "edits": [dict(e) for e in self.edits],
            "expressed": self.expressed,
            "kept_scales": [list(s) for s in self.kept_scales],
        }

    @classmethod
    def from_dict(cls, data: Any) -> Cuts:
        """Inverse of `to_dict`; `ArtifactError` for anything that it could not have written."""
        try:
            return _read(data)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(
                f"The surgery is damaged or not Secateur's: {type(error).__name__} {error}."
            ) from None


def node_of(dim: Dim, names: Mapping[Axis, str]) -> Node:
    """The node of a dimension whose cut axes have names."""
    parts: list[Node] = []
    for atom in axes.atoms(dim):
        if atom in names:
            parts.append(names[atom])
        elif atom.terms is None:
            parts.append(atom.size)
        else:
            terms = [node_of(term, names) for term in axes.terms_of(atom)]
            plain = all(isinstance(t, int) for t in terms)
            parts.append(atom.size if plain else ("+", *terms))
    if all(isinstance(p, int) for p in parts):
        return axes.extent(dim)
    return parts[0] if len(parts) == 1 else ("*", *parts)


def _ranges(kept: tuple[int, ...]) -> list[list[int]]:
    """Sorted positions as half-open ranges."""
    out: list[list[int]] = []
    for i in kept:
        if out and out[-1][1] == i:
            out[-1][1] = i + 1
        else:
            out.append([i, i + 1])
    return out


def _listed(node: Node) -> Any:
    return [_listed(p) for p in node] if isinstance(node, tuple) else node


def _read(data: Any) -> Cuts:
    cut_axes = {}
    for name, a in data["axes"].items():
        size = _natural(a["size"])
        ends = [(_natural(low), min(_natural(high), size + 1)) for low, high in a["kept"]]
        kept = tuple(i for low, high in ends for i in range(low, high))
        if not kept or list(kept) != sorted(set(kept)) or kept[-1] >= size:
            raise ArtifactError(
                f"The kept positions of {a['label']} are not sorted, or outside 0 to {size - 1}."
            )
        cut_axes[str(name)] = CutAxis(str(a["label"]), str(a["kind"]), size, kept)
    tensors = {
        str(n): (tuple(_natural(k) for k in t["shape"]), tuple(_node(d, cut_axes) for d in t["dims"]))
        for n, t in data["tensors"].items()
    }
    for name, (shape, nodes) in tensors.items():
        if tuple(_extent(node, cut_axes) for node in nodes) != shape:
            raise ArtifactError(
                f"The dimensions of {name} in the surgery do not have its shape {list(shape)}."
            )
    attributes = tuple(
        Attribute(
            str(a["module"]),
            tuple(_step(s) for s in a["steps"]),
            _identifier(a["name"]),
            None if a["index"] is None else _natural(a["index"]),
            _number(a["old"]),
            _number(a["new"]),
        )
        for a in data["attributes"]
    )
    scales = {str(n): (_number(f), _number(o)) for n, (f, o) in data["scales"].items()}
    swaps, edits = tuple(map(str, data["swaps"])), tuple(data["edits"])
    kept_scales = tuple((str(m), _kept_in(a), _number(s)) for m, a, s in data["kept_scales"])
    return Cuts(cut_axes, tensors, attributes, scales, swaps, edits, data["expressed"] is True, kept_scales)


def _natural(n: Any) -> int:
    if type(n) is not int or not 0 <= n < 2**40:
        raise ArtifactError(f"The surgery holds {n!r} where a size belongs.")
    return n


def _number(n: Any) -> Any:
    if type(n) not in (int, float):
        raise ArtifactError(f"The surgery holds {n!r} where a number belongs.")
    return n


def _identifier(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("__"):
        raise ArtifactError(f"The surgery names {name!r}, which is no plain attribute.")
    return name


def _kept_in(name: Any) -> str:
    if not _identifier(name).startswith("_secateur_scale_"):
        raise ArtifactError(f"The surgery keeps a scale as {name!r}, which is no name for one.")
    return str(name)


def _step(step: Any) -> str | tuple[str, str]:
    if isinstance(step, list):
        attribute, key = step
        return _identifier(attribute), str(key)
    return _identifier(step)


def _extent(node: Node, known: Mapping[str, CutAxis]) -> int:
    if isinstance(node, int):
        return node
    if isinstance(node, str):
        return known[node].size
    extents = [_extent(part, known) for part in node[1:]]
    return sum(extents) if node[0] == "+" else math.prod(extents)


def _node(node: Any, known: Mapping[str, CutAxis]) -> Node:
    if isinstance(node, str):
        if node not in known:
            raise ArtifactError(f"The surgery names an axis {node!r} that it does not hold.")
        return node
    if isinstance(node, list) and len(node) > 1 and node[0] in ("*", "+"):
        return (node[0], *(_node(part, known) for part in node[1:]))
    return _natural(node)
