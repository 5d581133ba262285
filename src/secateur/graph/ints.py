"""Integers that remember where they come from, so that sizes which Python code keeps can follow a surgery."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from secateur.graph import axes
from secateur.graph.axes import Dim
from secateur.graph.types import Place, called_from_outside, place


@dataclass(frozen=True)
class Attr:
    """An integer that an object keeps: an attribute, or one entry of a tuple or list in it."""

    owner: int  # id of the object; `Owner` knows more
    name: str
    index: int | None = None

    def __str__(self) -> str:
        return self.name if self.index is None else f"{self.name}[{self.index}]"


@dataclass(frozen=True)
class Size:
    """The extent of a dimension."""

    dim: Dim

    def __str__(self) -> str:
        return f"size {axes.extent(self.dim)}"


@dataclass(frozen=True)
class Op:
    """Arithmetic on integers."""

    name: str
    args: tuple[Expr, ...]

    def __str__(self) -> str:
        return f"{self.name.strip('_')}({', '.join(map(str, self.args))})"


Expr = int | Attr | Size | Op


@dataclass(frozen=True)
class Guard:
    """A comparison that the code made, and how it came out."""

    name: str
    left: Expr
    right: Expr
    outcome: bool


@dataclass
class Ledger:
    """What a trace learns about integers."""

    values: dict[Attr, int] = field(default_factory=dict)
    guards: dict[tuple[Any, ...], Guard] = field(default_factory=dict)
    numbers: dict[tuple[str, Expr, Place], None] = field(default_factory=dict)  # sizes used as numbers
    listening: bool = False

    def compared(self, name: str, left: Expr, right: Expr, outcome: bool) -> None:
        """Remember a comparison."""
        if self.listening and not (isinstance(left, int) and isinstance(right, int)):
            self.guards.setdefault((name, left, right, outcome), Guard(name, left, right, outcome))

    def used_as_number(self, expr: Expr, what: str) -> None:
        """Remember that a size became a number: a scale, a divisor, a fill value."""
        if self.listening and not isinstance(expr, int):
            self.numbers[f"{expr} ({what})", expr, place()] = None


class TracedInt(int):
    """An integer with the expression that gave it."""

    expr: Expr
    ledger: Ledger

    def __new__(cls, value: int, expr: Expr, ledger: Ledger) -> TracedInt:
        made = int.__new__(cls, value)
        made.expr, made.ledger = expr, ledger
        return made

    __hash__ = int.__hash__

    def __repr__(self) -> str:
        return int.__repr__(self)

    __str__ = __repr__

    def __neg__(self) -> int:
        return TracedInt(int.__neg__(self), Op("__neg__", (self.expr,)), self.ledger)

    def __truediv__(self, other: Any) -> Any:
        self.ledger.used_as_number(self.expr, "divided")
        return int(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        self.ledger.used_as_number(self.expr, "a divisor")
        return other / int(self)

    def __float__(self) -> float:
        self.ledger.used_as_number(self.expr, "as a float")
        return int.__float__(self)

    def __int__(self) -> int:
        # This package and torch strip the expression all the time; only the traced code loses it by that.
        if called_from_outside():
            self.ledger.used_as_number(self.expr, "by int")
        return int.__index__(self)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        self.ledger.used_as_number(self.expr, f"in numpy's {ufunc.__name__}")
        return getattr(ufunc, method)(*map(plain, inputs), **kwargs)

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        result = int.__pow__(self, other) if isinstance(other, int) else NotImplemented
        if isinstance(result, int) and isinstance(other, int):
            return TracedInt(result, Op("__pow__", (self.expr, expr_of(other))), self.ledger)
        self.ledger.used_as_number(self.expr, "a power")
        return int(self) ** other

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __deepcopy__(self, memo: Any) -> TracedInt:
        return self

    def __copy__(self) -> TracedInt:
        return self

    def __reduce__(self) -> Any:
        return int, (int(self),)


@contextmanager
def watched(ledger: Ledger) -> Iterator[None]:
    """While this holds, functions of Python that would strip an integer of its expression say so."""
    saved = [(module, name, getattr(module, name)) for module, names in _STRIPPING for name in names]

    def telling(function: Any, name: str) -> Any:
        def told(*args: Any) -> Any:
            for a in args:
                if isinstance(a, TracedInt):
                    ledger.used_as_number(a.expr, f"in {name}")
            return function(*args)

        return (
            _Told(name, (), {"of": function, "call": staticmethod(told)})
            if isinstance(function, type)
            else told
        )

    try:
        for module, name, function in saved:
            setattr(module, name, telling(function, name))
        yield
    finally:
        for module, name, function in saved:
            setattr(module, name, function)


class _Told(type):
    """Stands for a type, for those that ask whether something is an instance of it."""

    def __call__(cls, *args: Any) -> Any:
        return cls.call(*args)  # type: ignore[attr-defined]

    def __instancecheck__(cls, thing: Any) -> bool:
        return isinstance(thing, cls.of)  # type: ignore[attr-defined]

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, cls.of)  # type: ignore[attr-defined]


_STRIPPING = ((builtins, ("range",)), (math, ("log", "log2", "log10", "isqrt", "gcd", "lcm")))


def expr_of(value: Any) -> Expr:
    """The expression behind an integer; the integer itself if nothing is known."""
    return value.expr if isinstance(value, TracedInt) else int(value)


def _arithmetic(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: TracedInt, other: Any) -> Any:
        result = plain(self, other)
        if not isinstance(result, int) or not isinstance(other, int):
            if isinstance(other, float):
                self.ledger.used_as_number(self.expr, "multiplied with a number")
            return result
        return TracedInt(result, Op(name, (self.expr, expr_of(other))), self.ledger)

    return method


def _comparison(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: TracedInt, other: Any) -> Any:
        result = plain(self, other)
        if isinstance(other, int) and isinstance(result, bool):
            self.ledger.compared(name, self.expr, expr_of(other), result)
        return result

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(TracedInt, f"__{_name}__", _arithmetic(f"__{_name}__"))
    setattr(TracedInt, f"__r{_name}__", _arithmetic(f"__r{_name}__"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(TracedInt, f"__{_name}__", _comparison(f"__{_name}__"))
TracedInt.__hash__ = int.__hash__  # type: ignore[assignment,method-assign]


def evaluate(expr: Expr, size: Callable[[Dim], int], attr: Callable[[Attr], int]) -> int | None:
    """The value under new sizes and attributes; None where it has none (division by zero)."""
    if isinstance(expr, int):
        return expr
    if isinstance(expr, Attr):
        return attr(expr)
    if isinstance(expr, Size):
        return size(expr.dim)
    args = [evaluate(a, size, attr) for a in expr.args]
    if any(a is None for a in args):
        return None
    if expr.name == "ceildiv":
        return -(-args[0] // args[1]) if args[1] else None  # type: ignore[operator]
    try:
        result = getattr(int, expr.name)(*args)
    except (ZeroDivisionError, ValueError):
        return None
    return result if isinstance(result, int) else None


def parts(expr: Expr) -> Iterator[Attr | Size]:
    """The attributes and sizes in an expression."""
    if isinstance(expr, Attr | Size):
        yield expr
    elif isinstance(expr, Op):
        for arg in expr.args:
            yield from parts(arg)


def plain(value: Any) -> Any:
    """The same arguments with ordinary integers, as operators want them."""
    if isinstance(value, TracedInt):
        return int(value)
    kind = type(value)
    if kind.__name__ == "Size":
        return kind(int(i) for i in value)
    if kind in (tuple, list):
        return kind(plain(v) for v in value)
    if kind is dict:
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    return value
