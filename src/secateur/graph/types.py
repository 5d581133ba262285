"""The types of tensors during a trace, and the facts that rules state about axes.

Besides its dimensions a type says at which removed positions a tensor is *not* zero once the removed slices
of all parameters are zero (`live`): only then does removing equal zeroing, and zeroing is what the dense
model can be compared with.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import jaxtyping
import torch
from torch import Tensor

from secateur.callsites import Edit
from secateur.graph import axes
from secateur.graph.axes import Axis, Dim

_NAME = "_secateur_type"
_OURS = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_CHECKS = (str(Path(jaxtyping.__file__).parent), "<@beartype")
_HIDDEN = (_OURS, _TORCH, *_CHECKS, "<frozen", "<string>")
NONE: frozenset[Axis] = frozenset()


@dataclass(frozen=True)
class Columns:
    """The rows of an index table, as `nonzero` returns it: column `i` indexes `dims[i]`."""

    dims: tuple[Dim, ...]


Value = Dim | Columns


@dataclass(slots=True)
class Type:
    """What is known of one tensor.

    Attributes:
        dims: one for each dimension.
        live: axes at whose removed positions the tensor may not be zero.
        value: what the integers in the tensor index, if that is known.
        root: name of the parameter that the tensor is a view of.
    """

    dims: list[Dim]
    live: frozenset[Axis] = NONE
    value: Value | None = None
    root: str | None = None


@dataclass(frozen=True)
class Place:
    """A line of the user's code, and the call in it."""

    file: str
    line: int
    code: CodeType | None = field(default=None, compare=False, repr=False)
    instruction: int = field(default=-1, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{'/'.join(Path(self.file).parts[-2:])}:{self.line}"


def place() -> Place:
    """Where the code outside torch and this package stands that made the present call."""
    found = calling()
    if found is None:
        return Place("torch", sys._getframe(1).f_lineno)
    return Place(found.f_code.co_filename, found.f_lineno, found.f_code, found.f_lasti)


def calling() -> FrameType | None:
    """The innermost frame outside torch and this package."""
    found: FrameType | None = sys._getframe(1)
    while found is not None:
        name = found.f_code.co_filename
        if not name.startswith(_HIDDEN) and "contextlib" not in name:
            return found
        found = found.f_back
    return None


def called_from_outside() -> bool:
    """Whether the caller of the function that asks is neither torch nor this package."""

    def unchecked(frame: FrameType) -> FrameType:
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_CHECKS):
            frame = frame.f_back  # what checks annotations stands between
        return frame

    asking = unchecked(sys._getframe(1))
    caller = unchecked(asking.f_back) if asking.f_back is not None else asking
    return not caller.f_code.co_filename.startswith(_HIDDEN)


def blame(what: str) -> str:
    """A reason with its place."""
    return f"{what} at {place()}"


@dataclass
class Stored:
    """A parameter or buffer of the model."""

    name: str
    tensor: Tensor
    type: Type
    is_parameter: bool


@dataclass(frozen=True)
class Use:
    """A fact about a dimension: the part it plays, and the parameter that plays it."""

    dim: Dim
    role: str
    root: str | None


@dataclass(frozen=True)
class Inexact:
    """A place where removing positions of `dim` is not zeroing them, where all `factors` are live."""

    dim: Dim
    factors: tuple[frozenset[Axis], ...]
    why: str
    module: str
    live: frozenset[Axis] = NONE  # of what is normalised: a norm can make good only what is zero there


@dataclass(frozen=True)
class DefaultScale:
    """A call of attention that takes its scale from the size of `dim`, and could take it from its module.

    Attributes:
        scale: before anything is cut.
        edit: what the source would need for it.
    """

    dim: Dim
    module: str
    scale: float
    edit: Edit


@dataclass
class Types:
    """Types of all tensors of one trace, and what was noted on the way."""

    stored: dict[int, Stored] = field(default_factory=dict)  # by id of the tensor
    used: set[int] = field(default_factory=set)
    uses: list[Use] = field(default_factory=list)
    inexact: list[Inexact] = field(default_factory=list)
    aligned: list[tuple[Dim, int, str]] = field(default_factory=list)  # a size stays a multiple, and why
    products: list[tuple[Dim, ...]] = field(default_factory=list)  # multiply-accumulates, one product each
    operators: Counter[str] = field(default_factory=Counter)
    unknown: dict[str, str] = field(default_factory=dict)  # operator -> reason
    marking: bool = False  # inside `one_hot`, which is typed as a whole
    selecting: Value | None = None  # what a tensor used as a single index counts
    untouched: set[str] = field(default_factory=set)  # parameters that a masked twin leaves as they are
    modules: list[str] = field(default_factory=list)  # names of the modules that are running
    names: dict[int, str] = field(default_factory=dict)  # of all modules, by id
    scales: list[DefaultScale] = field(default_factory=list)  # that a module can keep as they were trained
    anonymous: list[Tensor] = field(default_factory=list)

    def of(self, tensor: Tensor) -> Type:
        """The type of a tensor; one that appears from nowhere is frozen."""
        found: Type | None = getattr(tensor, _NAME, None)
        if found is not None:
            return found
        stored = self.stored.get(id(tensor))
        if stored is not None:
            self.used.add(id(tensor))
            return stored.type
        reason = blame("a tensor from outside the traced operators")
        made = Type([axes.fresh(n, reason) for n in tensor.shape])
        self._attach(tensor, made)
        return made

    def stand_in(self, twin: Tensor, tensor: Tensor) -> None:
        """Let `twin` have the very type of `tensor`."""
        self._attach(twin, self.of(tensor))

    def dims(self, tensor: Tensor) -> list[Dim]:
        """The dimensions of a tensor."""
        return self.of(tensor).dims

    def put(
        self,
        tensor: Any,
        dims: Sequence[Dim],
        *,
        live: frozenset[Axis] = NONE,
        value: Value | None = None,
        root: str | None = None,
    ) -> None:
        """Give an operator's output its type; `TypingError` if it does not have these sizes."""
        if not isinstance(tensor, Tensor) or id(tensor) in self.stored:
            return
        if len(dims) != tensor.dim() or any(
            axes.extent(d) != n for d, n in zip(dims, tensor.shape, strict=True)
        ):
            got = [axes.extent(d) for d in dims]
            raise TypingError(f"typed {got} where the operator gave {list(tensor.shape)}")
        self._attach(tensor, Type([tuple(d) for d in dims], live, value, root))

    def like(self, tensor: Any, dims: Sequence[Dim], source: Tensor, *, value: bool = True) -> None:
        """`put` for a tensor that holds the same numbers as `source`, otherwise arranged."""
        kind = self.of(source)
        self.put(tensor, dims, live=kind.live, value=kind.value if value else None, root=kind.root)

    def _attach(self, tensor: Tensor, kind: Type) -> None:
        try:
            setattr(tensor, _NAME, kind)
        except AttributeError:  # a tensor class without attributes of its own
            self.anonymous.append(tensor)
            self.stored[id(tensor)] = Stored("", tensor, kind, False)

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor has a type already."""
        return hasattr(tensor, _NAME) or id(tensor) in self.stored

    def index(self, value: Value | None, dim: Dim, what: str) -> None:
        """Positions of `dim` are picked by numbers that index `value`, or that are data if it is None."""
        counted = None if isinstance(value, Columns) or value is None else _counted(value, axes.extent(dim))
        if counted is not None:
            self.unify(counted, dim)
            return
        # Numbers that index two things of different sizes tie them in a way that has no equation.
        known = value.dims if isinstance(value, Columns) else (value,) if value is not None else ()
        for d in known if not self.marking else ():
            self.freeze(d, f"{what} by its indices, in something of another size")
        self.freeze(dim, f"{what} by data")

    # What rules say ---------------------------------------------------------------------------------

    def unify(self, a: Dim, b: Dim) -> bool:
        """Say that two dimensions are indexed alike."""
        return axes.unify(a, b, blame)

    def cut(self, dim: Dim, at: int) -> tuple[Dim, Dim]:
        """Cut a dimension at a position."""
        return axes.cut(dim, at, blame)

    def freeze(self, dim: Dim, what: str) -> Dim:
        """Freeze a dimension because of the present operator; returns it."""
        axes.freeze(dim, lambda: blame(what))
        return dim

    def note(self, dim: Dim, role: str, root: str | None = None) -> None:
        """State which part a dimension plays: see `kinds`."""
        if dim:
            self.uses.append(Use(dim, role, root))

    def changes(self, dim: Dim, why: str, live: frozenset[Axis] = NONE) -> None:
        """State that removing positions of `dim` is not zeroing them, in a tensor live at `live`."""
        if axes.frozen_reason(dim) is None:
            self.inexact.append(Inexact(dim, (), blame(why), self.modules[-1] if self.modules else "", live))

    def summed(self, dim: Dim, *factors: frozenset[Axis], why: str = "summed where it is not zero") -> None:
        """State that `dim` is summed over a product of factors, each live on the axes given."""
        if all(factors) and axes.frozen_reason(dim) is None:
            self.inexact.append(Inexact(dim, factors, blame(why), self.modules[-1] if self.modules else ""))

    def align(self, dim: Dim, multiple: int, why: str) -> None:
        """State that the operator wants a size that is a multiple, if it is one now."""
        if axes.extent(dim) % multiple == 0 and axes.frozen_reason(dim) is None:
            self.aligned.append((dim, multiple, blame(why)))

    def multiply(self, *dims: Dim) -> None:
        """Count one multiply-accumulate for each position of the product of `dims`."""
        self.products.append(dims)

    def broadcast(self, tensors: Sequence[Tensor], shape: Sequence[int]) -> list[Dim]:
        """Unify tensors' dimensions from the right, as broadcasting does; the dimensions of the result."""
        if len(tensors) == 1 and tensors[0].shape == shape:
            return list(self.dims(tensors[0]))
        out: list[Dim] = []
        found = [self.dims(t) for t in tensors]
        for i, size in enumerate(shape):
            at = i - len(shape)
            here = [
                d[at] for d, t in zip(found, tensors, strict=True) if len(d) >= -at and t.shape[at] == size
            ]
            if size == 1 or not here:
                out.append(axes.fresh(size))
                continue
            for other in here[1:]:
                self.unify(here[0], other)
            out.append(here[0])
        return out

    def missing(self, tensor: Tensor, dims: Sequence[Dim]) -> frozenset[Axis]:
        """Axes of a broadcast result along which `tensor` is constant."""
        extra = len(dims) - tensor.dim()
        absent = [d for i, d in enumerate(dims) if i < extra or tensor.shape[i - extra] == 1]
        return frozenset(axis for d in absent for axis in d)


def everywhere(dims: Iterable[Dim]) -> frozenset[Axis]:
    """All axes of some dimensions: the `live` of a tensor that is nowhere known to be zero."""
    return frozenset(axis for dim in dims for axis in dim)


def _counted(value: Dim, size: int) -> Dim | None:
    """The part of a counted dimension that has `size` positions: all, or all but one that stands for none."""
    if axes.extent(value) == size:
        return value
    atoms = axes.atoms(value)
    if len(atoms) == 1 and atoms[0].terms is not None:
        *parts, last = axes.terms_of(atoms[0])
        if not axes.atoms(last) and sum(map(axes.extent, parts)) == size:
            return axes.concat(parts)
    return None


def meet(*sets: frozenset[Axis]) -> frozenset[Axis]:
    """Leaves that all sets hold; axes found to be the same count as one."""
    if not all(sets):
        return NONE
    first, *others = (axes.leaves(s) for s in sets)
    return frozenset(leaf for leaf in first if all(leaf in other for other in others))


class TypingError(Exception):
    """A rule does not fit a call; the wrapper freezes what the call touches."""


@dataclass
class Axisfacts:
    """Facts about leaves, looked up after the trace."""

    roles: dict[Axis, dict[str, set[str | None]]] = field(default_factory=lambda: defaultdict(dict))
    inexact: dict[Axis, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))


def facts(types: Types, exempt: Container[str] = ()) -> Axisfacts:
    """Roles and reasons of inexactness of every leaf; what happens in `exempt` modules is made good."""
    found = Axisfacts()
    for use in types.uses:
        for leaf in axes.leaves(use.dim):
            found.roles[leaf].setdefault(use.role, set()).add(use.root)
    for event in types.inexact:
        alive = [axes.leaves(live) for live in event.factors]
        if event.module in exempt:
            alive.append(axes.leaves(event.live))
        for leaf in axes.leaves(event.dim):
            if all(leaf in live for live in alive):
                found.inexact[leaf][event.why] = None
    return found
