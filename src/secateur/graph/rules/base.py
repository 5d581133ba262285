"""How rules are found: one function for each operator, by the operator's name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from secateur.graph.types import Types, TypingError


class Call:
    """One call of an operator: arguments by the names of its schema, and what it returned."""

    __slots__ = ("_arguments", "args", "func", "kwargs", "name", "out")

    def __init__(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.func, self.name, self.args, self.kwargs, self.out = func, name, args, kwargs, out
        self._arguments = _arguments(func)

    def __getitem__(self, name: str) -> Any:
        """The argument, or its default."""
        if name in self.kwargs:
            return self.kwargs[name]
        known = self._arguments.get(name)
        if known is None:
            raise TypingError(f"it has no argument {name!r}")
        i, default = known
        return self.args[i] if i < len(self.args) else default

    def has(self, name: str) -> bool:
        """Whether the schema has an argument of this name."""
        return name in self._arguments

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        found: list[Tensor] = []
        _collect(self.args, found)
        _collect(tuple(self.kwargs.values()), found)
        return found

    @property
    def outs(self) -> list[Tensor]:
        """All tensors returned."""
        if isinstance(self.out, Tensor):
            return [self.out]
        found: list[Tensor] = []
        _collect(self.out, found)
        return found


@cache
def _arguments(func: Any) -> dict[str, tuple[int, Any]]:
    """Position and default of each argument of an operator."""
    return {a.name: (i, a.default_value) for i, a in enumerate(func._schema.arguments)}


def _collect(tree: Any, found: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, tuple | list):
        for x in tree:
            _collect(x, found)


Rule = Callable[[Types, Call], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how an operator types its outputs.

    A rule gets the types of the trace and the call. It unifies dimensions that are indexed alike, freezes
    what must not be cut, and gives each output a type with `types.put` or `types.like`. An operator
    without a rule freezes all dimensions that it touches.

    Args:
        names: as in `torch.ops`, with the namespace: `"aten::mm"`, `"mylib::fused_mlp"`.

    >>> @sc.rule("mylib::scale_rows")
    ... def scale_rows(types, call):
    ...     types.unify(types.dims(call["x"])[0], types.dims(call["scale"])[0])
    ...     types.like(call.out, types.dims(call["x"]), call["x"])
    """

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name if "::" in name else f"aten::{name}"] = function
        return function

    return register


def positive(i: int, n: int) -> int:
    """A dimension counted from the front."""
    return i + n if i < 0 else i


def as_list(dims: Any) -> list[int]:
    """One dimension or several, as a list."""
    return list(dims) if isinstance(dims, list | tuple) else [dims]


def words(text: str) -> frozenset[str]:
    """Names that stand in one text."""
    return frozenset(text.split())
