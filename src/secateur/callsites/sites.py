"""Calls of `view`, `reshape` and attention in somebody's source, and edits of them as plain data."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import ModuleType
from typing import Any

import torch

from secateur.callsites.sources import CallSiteError, Unit, attribute
from secateur.core.errors import ArtifactError

METHODS = ("view", "reshape")
ATTENTION = "scaled_dot_product_attention"
_MOST_SIZES = 64  # more dimensions than torch allows a tensor
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_QUALNAME = re.compile(r"([^\W\d]\w*\.)*([^\W\d]\w*|<lambda>)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Reason:
    """Why a call cannot be repaired."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Edit:
    """One size argument of one call, replaced by -1 or by the receiver's `shape[dimension]`.

    Or a call of attention without a scale, which takes it from its module where the module keeps one. It is
    plain data, and it says no more than which number to take from where: no code is read from a file.

    Attributes:
        module: where the function is defined, "torchvision.models.swin_transformer".
        qualname: of the outermost function around the call.
        source: SHA-256 of the text of that function.
        line: of the name of what is called, counted from the first line of the function.
        column: of that word, in bytes of UTF-8, as Python counts.
        method: "view", "reshape" or "scaled_dot_product_attention".
        argument: which size, counted from 0; of attention 0.
        dimension: None for -1, or the dimension of the receiver that has this size.
    """

    module: str
    qualname: str
    source: str
    line: int
    column: int
    method: str
    argument: int
    dimension: int | None

    @property
    def kept_in(self) -> str:
        """The attribute of the module that an edited call of attention takes its scale from, its own one."""
        return f"_secateur_scale_{self.source[:8]}_{self.line}_{self.column}"

    @property
    def function(self) -> tuple[str, str, str]:
        """Module, name and source of the function."""
        return self.module, self.qualname, self.source

    def __str__(self) -> str:
        if self.method == ATTENTION:
            return (
                f"{self.module}.{self.qualname} line +{self.line}, {ATTENTION}: scale as the module keeps it"
            )
        new = "-1" if self.dimension is None else f"shape[{self.dimension}]"
        return (
            f"{self.module}.{self.qualname} line +{self.line}, {self.method}: size {self.argument} as {new}"
        )

    def to_dict(self) -> dict[str, str | int | None]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Edit:
        """From JSON; `ArtifactError` unless it is exactly what `to_dict` gives."""
        names = {f.name for f in fields(cls)}
        if not isinstance(data, Mapping) or set(data) != names:
            raise ArtifactError(
                f"An edit of a call has the fields {sorted(names)}, and this has others: {data!r:.200}."
            )
        for name, is_sound in _SOUND.items():
            if not is_sound(data[name]):
                raise ArtifactError(
                    f"An edit of a call has {data[name]!r:.200} as {name!r}, which it cannot be."
                )
        return cls(**data)


def _is_text(pattern: re.Pattern[str]) -> Any:
    return lambda value: isinstance(value, str) and len(value) < 1000 and pattern.fullmatch(value) is not None


def _is_below(limit: int) -> Any:
    return lambda value: type(value) is int and 0 <= value < limit


_SOUND = {
    "module": _is_text(_NAME),
    "qualname": _is_text(_QUALNAME),
    "source": _is_text(_SHA256),
    "line": _is_below(2**31),
    "column": _is_below(2**31),
    "method": lambda value: isinstance(value, str) and value in (*METHODS, ATTENTION),
    "argument": _is_below(_MOST_SIZES),
    "dimension": lambda value: value is None or _is_below(_MOST_SIZES)(value),
}


@dataclass(frozen=True)
class CallSite:
    """A call of `view`, `reshape` or attention in somebody's source.

    Attributes:
        sizes: the size arguments as they are written; `edit` counts them from 0. Of attention none.
        path: file and line, for messages.
        The others are as in `Edit`.
    """

    module: str
    qualname: str
    source: str
    line: int
    column: int
    method: str
    sizes: tuple[str, ...]
    path: str

    def edit(self, argument: int, dimension: int | None = None) -> Edit:
        """Take size `argument` from the receiver's `shape[dimension]`, or as what is left (-1) by default.

        Prefer a dimension where there is one: of a tensor without elements -1 cannot be told, and one call
        can have only one.
        """
        if not 0 <= argument < len(self.sizes):
            raise CallSiteError(f"{self} has {len(self.sizes)} sizes, and none is number {argument}.")
        return Edit(*self._place, argument, dimension)

    def scale(self) -> Edit:
        """Take the scale of this call of attention from the module, where it keeps one."""
        if self.method != ATTENTION:
            raise CallSiteError(f"{self} has no scale.")
        return Edit(*self._place, 0, None)

    @property
    def _place(self) -> tuple[str, str, str, int, int, str]:
        return self.module, self.qualname, self.source, self.line, self.column, self.method

    def __str__(self) -> str:
        return f"{self.method}({', '.join(self.sizes)}) at {self.path}"


@dataclass(frozen=True)
class Parts:
    """A `view` or `reshape` call taken apart.

    Attributes:
        func: what is called, `x.reshape` or `torch.reshape`.
        receiver: the tensor.
        sizes: the size arguments.
        is_method: whether the receiver stands before the dot.
        holder: the list or tuple that holds the sizes; None if they are arguments of their own.
    """

    func: ast.Attribute
    receiver: ast.expr
    sizes: list[ast.expr]
    is_method: bool
    holder: ast.List | ast.Tuple | None


def word(func: ast.Attribute | ast.Name) -> tuple[int, int]:
    """Line and column of the name after the last dot. No two calls share it, and their starts they may."""
    assert func.end_lineno is not None and func.end_col_offset is not None  # both are set by the parser
    return func.end_lineno, func.end_col_offset - len(called(func).encode())


def called(func: ast.Attribute | ast.Name) -> str:
    """What is called, without what stands before the dot."""
    return func.attr if isinstance(func, ast.Attribute) else func.id


def take_apart(call: ast.Call, unit: Unit, module: ModuleType) -> Parts:
    """Receiver and sizes of a call; `CallSiteError` if they cannot be told apart from the source."""
    func = call.func
    if not isinstance(func, ast.Attribute) or func.attr not in METHODS:
        raise CallSiteError(f"{ast.unparse(func)} is neither view nor reshape of a tensor.")
    owner = _global(func.value, unit, module)
    args = list(call.args)
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    is_method = owner is not torch
    if isinstance(owner, type | ModuleType) and is_method:
        raise CallSiteError(
            f"{ast.unparse(func)} is called with the tensor as an argument, which is not supported."
        )
    receiver = func.value if is_method else args.pop(0) if args else named.pop("input", None)
    if receiver is None or any(isinstance(a, ast.Starred) for a in (receiver, *args)):
        raise CallSiteError(f"The sizes of {ast.unparse(call)} are unpacked with a star.")
    if not args and len(named) == 1 and set(named) <= {"size", "shape"}:
        args = list(named.values())
    elif named:
        raise CallSiteError(f"{ast.unparse(call)} has arguments of other names than those of the sizes.")

    holder: ast.expr | None = args[0] if len(args) == 1 else None
    if (
        isinstance(holder, ast.Call)
        and _global(holder.func, unit, module) is torch.Size
        and len(holder.args) == 1
    ):
        holder = holder.args[0]
    if isinstance(holder, ast.Tuple | ast.List):
        if any(isinstance(size, ast.Starred) for size in holder.elts):
            raise CallSiteError(f"The sizes of {ast.unparse(call)} are unpacked with a star.")
        return Parts(func, receiver, holder.elts, is_method, holder)
    if len(args) < 2 or not is_method or any(isinstance(size, ast.Tuple | ast.List) for size in args):
        raise CallSiteError(f"{ast.unparse(call)} does not list its sizes.")
    return Parts(func, receiver, args, is_method, None)


def _global(node: ast.expr, unit: Unit, module: ModuleType) -> Any:
    """What a dotted name of the module's globals means; None for anything else."""
    if isinstance(node, ast.Attribute):
        owner = _global(node.value, unit, module)
        return attribute(owner, node.attr) if isinstance(owner, ModuleType) else None
    if not isinstance(node, ast.Name):
        return None
    for inner in ast.walk(unit.node):  # a local variable may have the name of a module, or be one
        if isinstance(inner, ast.alias) and (inner.asname or inner.name.split(".")[0]) == node.id:
            return ModuleType(node.id)  # some module: importing it to see which would be a side effect
        if isinstance(inner, ast.arg) and inner.arg == node.id:
            return None
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store) and inner.id == node.id:
            return None
    return vars(module).get(node.id)
