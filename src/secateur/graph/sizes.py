"""Calls that take sizes: each ties an integer of the Python code to a dimension of the result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from secateur.callsites import ATTENTION
from secateur.graph import axes
from secateur.graph.axes import Dim
from secateur.graph.ints import Expr, Ledger, Op, Size, TracedInt, expr_of, plain
from secateur.graph.rules import RULES, Call
from secateur.graph.scales import DefaultScales
from secateur.graph.types import Columns, Place, Types, blame, place

_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_DEVICE = torch.Tensor.device.__get__
_VIEWS = ("view", "reshape")


@dataclass(frozen=True)
class Argument:
    """Where in a call a size stands.

    Attributes:
        call: name of the function.
        index: of the size among the call's sizes.
        inferred: whether another size of the call is -1.
        same_as: dimension of the input that the size repeats, if it does.
    """

    call: str
    index: int = 0
    inferred: bool = False
    same_as: int | None = None

    @property
    def repairable(self) -> bool:
        """Whether the source could say -1, or the input's own size, instead."""
        return self.call in _VIEWS and (not self.inferred or self.same_as is not None)


@dataclass(frozen=True)
class Tie:
    """The extent of `dim` must be the value of `expr`, at a place in the code."""

    dim: Dim
    expr: Expr
    place: Place
    argument: Argument


class SizeMode(TorchFunctionMode):
    """Answers `shape`, `size` and `numel` with traced integers, and collects ties."""

    def __init__(
        self, types: Types, ledger: Ledger, ties: list[Tie], device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.types, self.ledger, self.ties = types, ledger, ties
        self.calls: dict[object, set[Argument]] = defaultdict(set)  # of every view, by its place in the code
        self.scales = DefaultScales(types)
        self.device = device  # what tensors say they are on, if it is not where they are

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == _SHAPE:
            return self._sizes(args[0])
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            return self.device if func == _DEVICE and self.device is not None else func(*args, **kwargs)
        if name == "size" and isinstance(args[0], Tensor):
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            sizes = self._sizes(args[0])
            return sizes if dim is None else sizes[dim]
        if name in ("numel", "nelement", "__len__") and isinstance(args[0], Tensor):
            return self._count(func, name, args[0])
        self._numbers(name, args, kwargs)
        if name == ATTENTION and kwargs.get("scale") is None:
            kwargs = kwargs | {"scale": self.scales.of(args[0] if args else kwargs["query"])}
        whole = _WHOLE.get(name) if self.device is not None else None
        if whole is not None and self._without_values(args):
            out = self._typed(whole, tuple(map(plain, args)), {k: plain(v) for k, v in kwargs.items()})
        else:
            self.types.selecting = self._selected(name, args)
            self.types.marking = name == "one_hot"
            try:
                out = func(*(plain(a) for a in args), **{k: plain(v) for k, v in kwargs.items()})
            finally:
                self.types.selecting, self.types.marking = None, False
        handler = _HANDLERS.get(name)
        if handler is not None:
            try:
                handler(self, name, args, kwargs, out)
            except Exception as error:  # a form of the call that is not understood: nothing of it is cut
                self._refuse(f"the sizes given to {name} are not understood ({error})", args, kwargs, out)
        return out

    def _without_values(self, args: tuple[Any, ...]) -> bool:
        """Whether a parameter, or what came of one, is among the arguments."""
        return any(isinstance(a, Tensor) and (a.is_meta or id(a) in self.types.stored) for a in args)

    def _typed(self, whole: _Whole, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The result of an operator that torch would take apart where there are no values."""
        name = f"aten::{whole.func._schema.name.rpartition('::')[2]}"
        call = Call(whole.func, name, args, kwargs, None)
        call.out = torch.empty(whole.shape(call), dtype=call.tensors[0].dtype, device="meta")
        self.types.operators[name] += 1
        RULES[name](self.types, call)
        return call.out

    def _refuse(self, why: str, *trees: Any) -> None:
        for t in tree_leaves(trees):
            if isinstance(t, Tensor):
                for dim in self.types.dims(t):
                    self.types.freeze(dim, why)

    def _traced(self, dim: Dim) -> int:
        n = axes.extent(dim)
        return TracedInt(n, Size(dim), self.ledger) if n > 1 else n

    def _sizes(self, tensor: Tensor) -> torch.Size:
        return torch.Size([self._traced(d) for d in self.types.dims(tensor)])

    def _count(self, func: Any, name: str, tensor: Tensor) -> int:
        dims = self.types.dims(tensor)
        if name == "__len__":
            if dims:
                self.types.freeze(dims[0], "its length is read as a Python number")
            return int(func(tensor))
        return self._traced(tuple(axis for d in dims for axis in d))

    def _numbers(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Sizes that enter tensors' arithmetic as numbers, and dimensions that become Python lists."""
        if name in ("tolist", "numpy") and isinstance(args[0], Tensor):
            for d in self.types.dims(args[0]):
                self.types.freeze(d, "read as a Python list")
        if name in _ARITHMETIC:
            for value in (*args, *kwargs.values()):
                if isinstance(value, TracedInt):
                    self.ledger.used_as_number(value.expr, f"in {name.strip('_')}")

    def _selected(self, name: str, args: tuple[Any, ...]) -> Any:
        if name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dim() == 0:
            value = self.types.of(args[1]).value
            return None if isinstance(value, Columns) else value
        return None

    def tie(self, dim: Dim, size: Any, argument: Argument) -> None:
        """`size` was given where the result has `dim`."""
        if isinstance(size, TracedInt):
            if not isinstance(size.expr, int):
                self.ties.append(Tie(dim, size.expr, place(), argument))
        elif not isinstance(size, bool) and int(size) != 1 and axes.frozen_reason(dim) is None:
            if argument.repairable:
                self.ties.append(Tie(dim, int(size), place(), argument))
            else:
                axes.freeze(dim, blame(f"the number {int(size)} stands in the code"))


@dataclass(frozen=True)
class _Whole:
    """An operator, and the shape that it gives."""

    func: Any
    shape: Callable[[Call], tuple[int, ...]]


_WHOLE = {
    "linear": _Whole(
        torch.ops.aten.linear.default,
        lambda call: (*_SHAPE(call["input"])[:-1], *_SHAPE(call["weight"])[:-1]),
    ),
    "scaled_dot_product_attention": _Whole(
        torch.ops.aten.scaled_dot_product_attention.default,
        lambda call: (*_SHAPE(call["query"])[:-1], _SHAPE(call["value"])[-1]),
    ),
    "one_hot": _Whole(
        torch.ops.aten.one_hot.default, lambda call: (*_SHAPE(call["self"]), call["num_classes"])
    ),
}

_ARITHMETIC = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "true_divide",
        "rsub",
        "pow",
        "__add__",
        "__radd__",
        "__sub__",
        "__rsub__",
        "__mul__",
        "__rmul__",
        "__truediv__",
        "__rtruediv__",
        "__rdiv__",
        "__div__",
        "__floordiv__",
        "__mod__",
        "__pow__",
        "__rpow__",
        "__itruediv__",
        "__imul__",
        "__iadd__",
        "__isub__",
        "add_",
        "sub_",
        "mul_",
        "div_",
        "full",
        "full_like",
        "fill_",
        "new_full",
        "masked_fill",
        "masked_fill_",
        "clamp",
        "tensor",
        "where",
        "scalar_tensor",
        "as_tensor",
        "new_tensor",
    ]
)

Handler = Callable[[SizeMode, str, tuple[Any, ...], dict[str, Any], Any], None]
_HANDLERS: dict[str, Handler] = {}


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def register(function: Handler) -> Handler:
        for name in names:
            _HANDLERS[name] = function
        return function

    return register


def _given(args: Sequence[Any], kwargs: dict[str, Any], i: int, *names: str, default: Any = None) -> Any:
    if len(args) > i:
        return args[i]
    return next((kwargs[n] for n in names if n in kwargs), default)


def _flat(args: Sequence[Any]) -> list[Any]:
    out: list[Any] = []
    for x in args:
        if isinstance(x, tuple | list):
            out.extend(x)
        elif isinstance(x, int) and not isinstance(x, bool):
            out.append(x)
        else:
            break
    return out


def _front(i: int, n: int) -> int:
    return int(i) + n if i < 0 else int(i)


@_handles(
    "view",
    "reshape",
    "expand",
    "broadcast_to",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "zeros",
    "ones",
    "empty",
    "full",
    "rand",
    "randn",
)
def _sized(mode: SizeMode, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    factory = name in ("zeros", "ones", "empty", "full", "rand", "randn")
    rest = args if factory else args[1:]
    sizes = _flat(rest) if rest else _flat([kwargs.get("size", kwargs.get("shape", ()))])
    if not isinstance(out, Tensor) or len(sizes) != out.dim():
        return  # a view as another dtype
    source = mode.types.dims(args[0]) if name in _VIEWS else []
    inferred = any(int(s) == -1 for s in sizes)
    arguments = []
    for j, (size, dim) in enumerate(zip(sizes, mode.types.dims(out), strict=True)):
        like = next((i for i, d in enumerate(source) if axes.same(d, dim)), None)
        arguments.append(argument := Argument(name, j, inferred, like))
        if int(size) != -1:
            mode.tie(dim, size, argument)
    if name in _VIEWS:
        here = place()
        mode.calls[here.code, here.instruction].update(arguments)


@_handles("unflatten")
def _unflattened(mode: SizeMode, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    at = _front(_given(args, kwargs, 1, "dim"), args[0].dim())
    for j, size in enumerate(_given(args, kwargs, 2, "sizes")):
        if int(size) != -1:
            mode.tie(mode.types.dims(out)[at + j], size, Argument(name, j))


@_handles("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def _split(mode: SizeMode, name: str, args: Any, kwargs: Any, out: Any) -> None:
    sizes = _given(args, kwargs, 1, "split_size", "split_sizes", "split_size_or_sections")
    at = _front(_given(args, kwargs, 2, "dim", default=0), args[0].dim())
    if isinstance(sizes, list | tuple):
        for part, size in zip(out, sizes, strict=True):
            mode.tie(mode.types.dims(part)[at], size, Argument(name))
        return
    if not isinstance(sizes, TracedInt):
        mode.types.freeze(mode.types.dims(args[0])[at], f"split into parts of {int(sizes)}")
    for part in out:
        whole = part.shape[at] == int(sizes)
        mode.tie(mode.types.dims(part)[at], sizes if whole else int(part.shape[at]), Argument(name))


@_handles("chunk", "tensor_split", "unsafe_chunk")
def _chunked(mode: SizeMode, name: str, args: Any, kwargs: Any, out: Any) -> None:
    n = _given(args, kwargs, 1, "chunks", "indices_or_sections", "sections")
    at = _front(_given(args, kwargs, 2, "dim", default=0), args[0].dim())
    whole = mode.types.dims(args[0])[at]
    if not isinstance(n, int):
        mode.types.freeze(whole, "split at given positions")
    elif axes.frozen_reason(whole) is None:
        part: Expr = Op("ceildiv", (Size(whole), expr_of(n)))
        parts = [mode.types.dims(o)[at] for o in out]
        # The last part is what is left: where it was as large as the others, it stays so.
        alike = parts if axes.extent(parts[-1]) == axes.extent(parts[0]) else parts[:-1]
        mode.ties.extend(Tie(dim, part, place(), Argument(name)) for dim in alike)


@_handles("narrow")
def _narrowed(mode: SizeMode, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    at = _front(_given(args, kwargs, 1, "dim"), args[0].dim())
    start, length = _given(args, kwargs, 2, "start"), _given(args, kwargs, 3, "length")
    dim = mode.types.dims(args[0])[at]
    if axes.frozen_reason(dim) is None:
        if int(start) > 0:
            mode.tie(mode.types.cut(dim, int(start))[0], start, Argument(name))
        mode.tie(mode.types.dims(out)[at], length, Argument(name))


@_handles("__getitem__", "__setitem__")
def _item(mode: SizeMode, name: str, args: Any, kwargs: Any, out: Any) -> None:
    tensor, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
    if not any(isinstance(i, slice) for i in index):
        return
    dims = mode.types.dims(tensor)
    spans = [_span(i) for i in index]
    at = 0
    for i, span in zip(index, spans, strict=True):
        if i is Ellipsis:
            at = len(dims) - sum(spans[_position(index, Ellipsis) + 1 :])
        elif isinstance(i, slice) and (i.step is None or int(i.step) == 1):
            _slice(mode, dims[at], i)
            at += 1
        else:
            at += span


def _position(index: Sequence[Any], what: Any) -> int:
    return next(i for i, x in enumerate(index) if x is what)


def _span(i: Any) -> int:
    if i is None or i is Ellipsis:
        return 0
    return i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1


def _slice(mode: SizeMode, dim: Dim, i: slice) -> None:
    n = axes.extent(dim)
    for edge in (i.start, i.stop):
        if edge is None or int(edge) == 0 or (int(edge) >= n and not isinstance(edge, TracedInt)):
            continue
        at = min(_front(edge, n), n)
        before, after = mode.types.cut(dim, at)
        mode.tie(before if edge >= 0 else after, edge if edge >= 0 else -edge, Argument("slice"))


@_handles("layer_norm", "rms_norm")
def _normed(mode: SizeMode, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    shape = _given(args, kwargs, 1, "normalized_shape")
    for size, dim in zip(shape, mode.types.dims(args[0])[-len(shape) :], strict=True):
        mode.tie(dim, size, Argument(name))


@_handles("group_norm")
def _grouped_norm(mode: SizeMode, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    _grouped(mode, mode.types.dims(args[0])[1], _given(args, kwargs, 1, "num_groups"), name)


@_handles("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolved(mode: SizeMode, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    x, w = _given(args, kwargs, 0, "input"), _given(args, kwargs, 1, "weight")
    groups = _given(args, kwargs, 6, "groups", default=1)
    _grouped(mode, mode.types.dims(x)[1 if x.dim() == w.dim() else 0], groups, name)


def _grouped(mode: SizeMode, dim: Dim, groups: Any, name: str) -> None:
    if int(groups) > 1 and axes.frozen_reason(dim) is None:
        outer = dim if axes.extent(dim) == int(groups) else axes.split_product(dim, int(groups), blame)[0]
        mode.tie(outer, groups, Argument(name))


@_handles("arange")
def _counted(mode: SizeMode, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    if len(args) == 1 and isinstance(args[0], TracedInt):
        mode.tie(mode.types.dims(out)[0], args[0], Argument(name))


@_handles("one_hot")
def _one_hot(mode: SizeMode, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    value, dims = mode.types.of(args[0]).value, mode.types.dims(out)
    if value is not None and not isinstance(value, Columns):
        extra = out.shape[-1] - axes.extent(value)
        if extra not in (0, 1):
            mode.types.freeze(value, "one-hot of another size")
            return
        # One position more than there are: that of "none of them".
        last = value if extra == 0 else axes.concat([value, axes.fresh(1)])
        mode.types.of(out).dims[-1] = last
        dims = mode.types.dims(out)
    classes = _given(args, kwargs, 1, "num_classes", default=-1)
    if int(classes) != -1:
        mode.tie(dims[-1], classes, Argument(name))


@_handles("repeat", "tile")
def _repeated(mode: SizeMode, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    times = _flat(args[1:])
    times = [1] * (out.dim() - len(times)) + times
    for dim, n in zip(mode.types.dims(out), times, strict=True):
        if int(n) > 1:
            outer = dim if axes.extent(dim) == int(n) else axes.split_product(dim, int(n), blame)[0]
            mode.tie(outer, n, Argument(name))


@_handles("repeat_interleave")
def _interleaved(mode: SizeMode, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    times, dim = _given(args, kwargs, 1, "repeats"), _given(args, kwargs, 2, "dim")
    if isinstance(times, int) and int(times) > 1 and dim is not None:
        whole = mode.types.dims(out)[int(dim)]
        mode.tie(axes.split_product(whole, axes.extent(whole) // int(times), blame)[1], times, Argument(name))


@_handles("histc", "bincount")
def _histogram(mode: SizeMode, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    bins = _given(args, kwargs, 1, "bins") if name == "histc" else _given(args, kwargs, 2, "minlength")
    if isinstance(bins, int):
        mode.tie(mode.types.dims(out)[0], bins, Argument(name))


@_handles("channel_shuffle", "native_channel_shuffle")
def _shuffled(mode: SizeMode, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    groups = _given(args, kwargs, 1, "groups")
    dim = mode.types.dims(out)[1]
    mode.tie(axes.split_product(dim, axes.extent(dim) // int(groups), blame)[1], groups, Argument(name))
