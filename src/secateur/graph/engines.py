"""Three ways to run operators during a trace, from fast to faithful.

- `Light`: small tensors that no parameter went into keep their values, all others have shapes alone. So
  positions and masks are computed, and code may read them, while nothing that costs anything is.
- `Fake`: torch's fake tensors. Slower, and closer to the real device where code asks for it.
- `Real`: the model's own tensors, for code that reads values of activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from secateur.graph.types import Types

aten = torch.ops.aten
_META, _CPU = torch.device("meta"), torch.device("cpu")
_CHEAP = 2**18  # entries of a tensor whose values are worth having


@runtime_checkable
class Engine(Protocol):
    """Runs operators, and makes inputs for them."""

    name: str

    def active(self) -> Any:
        """A context manager that holds during the trace."""

    def input(self, t: Tensor) -> Tensor:
        """An input tensor, new, on which a type can be set."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """What an operator returns, and the arguments that it got."""


class Real:
    """The model's own tensors."""

    name = "real"

    @contextmanager
    def active(self) -> Iterator[None]:
        yield

    def input(self, t: Tensor) -> Tensor:
        return t.clone()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        return func(*args, **kwargs), args, kwargs


class Fake:
    """Torch's fake tensors."""

    name = "fake"

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def active(self) -> Any:
        return self._mode

    def input(self, t: Tensor) -> Tensor:
        return self._mode.from_tensor(t)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        quick = _QUICK.get(func)
        return (quick(*args, **kwargs) if quick in _REFUSED else func(*args, **kwargs)), args, kwargs


class Light:
    """Values where they are cheap, shapes elsewhere."""

    name = "light"

    def __init__(self, types: Types) -> None:
        self._types = types
        self._shadows: dict[int, tuple[Tensor, Tensor]] = {}  # by id; the original is kept alive
        self._metas: dict[int, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            yield

    def input(self, t: Tensor) -> Tensor:
        return _meta(t) if t.is_meta or t.numel() > _CHEAP else t.detach().cpu().clone()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        found = [t for a in args for t in _tensors(a)]
        if kwargs:
            found += [t for v in kwargs.values() for t in _tensors(v)]
        empty = any([self._is_empty(t) for t in found]) if found else _asks_for_much(args)
        if found:
            target, stand_in = found[0], self._emptied if empty else self._shadow
            args = tuple([_mapped(stand_in, a) for a in args])
            kwargs = {k: _mapped(stand_in, v) for k, v in kwargs.items()} if kwargs else kwargs
            if empty and not target.is_meta and func._schema.is_mutable and isinstance(args[0], Tensor):
                self._shadows[id(target)] = target, args[0]  # what was written into it has no values
        if _takes_device(func):
            empty = empty or kwargs.get("device") == _META  # asked for by name: without values
            kwargs = {**kwargs, "device": _META if empty else _CPU}
            kwargs.pop("pin_memory", None)
        quick = _QUICK.get(func) if empty else None
        return (quick or func)(*args, **kwargs), args, kwargs

    def _is_empty(self, t: Tensor) -> bool:
        """Whether what stands for a tensor has no values."""
        known = self._shadows.get(id(t))
        if known is not None:
            return known[1].is_meta
        return t.is_meta or not self._is_cheap(t)

    def _is_cheap(self, t: Tensor) -> bool:
        """Whether a tensor is an intermediate one, or a small buffer."""
        stored = self._types.stored.get(id(t))
        return stored is None or not (stored.is_parameter or t.is_meta or t.numel() > _CHEAP)

    def _shadow(self, t: Tensor) -> Tensor:
        """What stands for a tensor: its own shape for a parameter, a copy for a small buffer."""
        known = self._shadows.get(id(t))
        if known is not None:
            return known[1]
        if id(t) not in self._types.stored:
            return t
        made = t.detach().cpu().clone() if self._is_cheap(t) else _meta(t)
        self._types.stand_in(made, t)
        self._shadows[id(t)] = t, made
        return made

    def _emptied(self, t: Tensor) -> Tensor:
        """What stands for a tensor among others without values."""
        known = self._shadows.get(id(t)) or self._metas.get(id(t))
        if known is not None and known[1].is_meta:
            return known[1]
        if t.is_meta and id(t) not in self._types.stored:
            return t
        made = _meta(t)
        self._types.stand_in(made, t)
        self._metas[id(t)] = t, made
        return made


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, (list, tuple)):
        return [t for v in x for t in _tensors(v)]
    return []


def _meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=_META)


def _mapped(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, (list, tuple)) and any([isinstance(v, (Tensor, list, tuple)) for v in x]):
        return type(x)([_mapped(function, v) for v in x])
    return x


def _asks_for_much(args: tuple[Any, ...]) -> bool:
    """Whether a factory is asked for a large tensor."""
    first = args[0] if args else ()
    return isinstance(first, list | tuple) and math.prod(n for n in first if isinstance(n, int)) > _CHEAP


_DEVICES: dict[Any, bool] = {}


def _takes_device(func: Any) -> bool:
    if func not in _DEVICES:
        _DEVICES[func] = any(a.name == "device" for a in func._schema.arguments)
    return _DEVICES[func]


def _grouped_mm(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Its own shape function refuses what the operator computes: other types than bfloat16."""
    return a.new_empty(*a.shape[:-1], b.shape[-1])  # fake or meta, like the tensors


def _empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=_META)


def _batch_norm(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _meta(x), _empty(x, (0,)), _empty(x, (0,))


def _layer_norm(x: Tensor, shape: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    outer = [*x.shape[: -len(shape)], *[1] * len(shape)]
    return _meta(x), _empty(x, outer), _empty(x, outer)


def _same(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _meta(x)


def _binary(x: Tensor, y: Any, **kwargs: Any) -> Tensor:
    """Sum or product: of one type and shape mostly, else torch says what comes out."""
    if not isinstance(y, Tensor):
        return _meta(x) if x.is_floating_point() else torch.add(x, y)
    if x.dtype != y.dtype:
        return torch.add(x, y)
    return _meta(x) if x.shape == y.shape else _empty(x, torch.broadcast_shapes(x.shape, y.shape))


def _itself(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x


def _convolution(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    rank = w.dim() - 2

    def at(values: list[int], i: int) -> int:
        return values[i] if len(values) > 1 else values[0]

    out = []
    for i in range(rank):
        reach = at(dilation, i) * (w.shape[i + 2] - 1)
        n, p, s = x.shape[i + 2], at(padding, i), at(stride, i)
        out.append(
            (n - 1) * s - 2 * p + reach + at(output_padding, i) + 1
            if transposed
            else (n + 2 * p - reach - 1) // s + 1
        )
    channels = w.shape[1] * groups if transposed else w.shape[0]
    return _empty(x, (x.shape[0], channels, *out))


# Operators whose shapes torch works out in Python, slowly, though they are plain.
_QUICK: dict[Any, Callable[..., Any]] = {
    aten._grouped_mm.default: _grouped_mm,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.convolution.default: _convolution,
    aten.relu.default: _same,
    aten.add.Tensor: _binary,
    aten.mul.Tensor: _binary,
    aten.relu_.default: _itself,
    aten.add_.Tensor: _itself,
    aten.mul_.Tensor: _itself,
    aten.hardswish_.default: _itself,
    aten.silu_.default: _itself,
    aten.gelu.default: _same,
    aten.silu.default: _same,
    aten.hardswish.default: _same,
    aten.sigmoid.default: _same,
}
_REFUSED = {_grouped_mm}
