"""Three ways to run operators during a trace, from fast to faithful.

- `Meta`: tensors on the meta device, whatever device the model is on. Shapes only, hardly any overhead.
- `Fake`: torch's fake tensors. Slower, and closer to the real device where code asks for it.
- `Real`: the model's own tensors, for code that reads values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
_META = torch.device("meta")


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


class Meta:
    """Tensors on the meta device."""

    name = "meta"

    def __init__(self, attach: Callable[[Tensor, Tensor], None]) -> None:
        self._attach = attach  # gives a meta tensor the type of the tensor that it stands for
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}  # by id; the original is kept alive

    @contextmanager
    def active(self) -> Iterator[None]:
        yield

    def input(self, t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=_META)

    def _twin(self, t: Tensor) -> Tensor:
        if t.device.type == "meta":
            return t
        known = self._twins.get(id(t))
        if known is None:
            known = t, torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=_META)
            self._attach(known[1], t)
            self._twins[id(t)] = known
        return known[1]

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        args = tuple(self._mapped(a) for a in args)
        kwargs = {k: self._mapped(v) for k, v in kwargs.items()} if kwargs else kwargs
        if _takes_device(func):
            kwargs = {**kwargs, "device": _META}
            kwargs.pop("pin_memory", None)
        quick = _QUICK.get(func)
        return (quick or func)(*args, **kwargs), args, kwargs

    def _mapped(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self._twin(x)
        return tree_map_only(Tensor, self._twin, x) if isinstance(x, list | tuple) else x


_DEVICES: dict[Any, bool] = {}


def _takes_device(func: Any) -> bool:
    if func not in _DEVICES:
        _DEVICES[func] = any(a.name == "device" for a in func._schema.arguments)
    return _DEVICES[func]


def _grouped_mm(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Its own shape function refuses what the operator computes: other types than bfloat16."""
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _batch_norm(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


def _layer_norm(x: Tensor, shape: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    outer = [*x.shape[: -len(shape)], *[1] * len(shape)]
    return torch.empty_like(x), x.new_empty(outer), x.new_empty(outer)


def _same(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(x)


def _convolution(
    x: Tensor, w: Tensor, b: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int,
) -> Tensor:
    rank = w.dim() - 2

    def at(values: list[int], i: int) -> int:
        return values[i] if len(values) > 1 else values[0]

    out = []
    for i in range(rank):
        reach = at(dilation, i) * (w.shape[i + 2] - 1)
        n, p, s = x.shape[i + 2], at(padding, i), at(stride, i)
        out.append((n - 1) * s - 2 * p + reach + at(output_padding, i) + 1 if transposed else (n + 2 * p - reach - 1) // s + 1)
    channels = w.shape[1] * groups if transposed else w.shape[0]
    return x.new_empty([x.shape[0], channels, *out])


# Operators whose shapes torch works out in Python, slowly, though they are plain.
_QUICK: dict[Any, Callable[..., Any]] = {
    aten._grouped_mm.default: _grouped_mm,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.convolution.default: _convolution,
    aten.relu.default: _same,
    aten.gelu.default: _same,
    aten.silu.default: _same,
    aten.hardswish.default: _same,
    aten.sigmoid.default: _same,
}
_REFUSED = {_grouped_mm}
