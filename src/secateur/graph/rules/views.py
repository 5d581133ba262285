"""Operators that rearrange: the same numbers in other places."""

from __future__ import annotations

from torch import Tensor

from secateur.graph import axes
from secateur.graph.axes import Axis, Dim
from secateur.graph.rules.base import Call, as_list, positive, rule
from secateur.graph.types import Columns, Types, TypingError, Value, blame


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "unflatten")
def _(types: Types, call: Call) -> None:
    source: Tensor = call["self"]
    if 0 in source.shape:
        types.put(call.out, [axes.fresh(n, "an empty tensor") for n in call.out.shape])
    else:
        types.like(call.out, axes.regroup(types.dims(source), call.out.shape, blame), source)


@rule("view.dtype")
def _(types: Types, call: Call) -> None:
    source: Tensor = call["self"]
    if source.shape != call.out.shape:
        raise TypingError("the bytes of several entries become one")
    types.like(call.out, types.dims(source), source, value=False)


@rule("permute", "permute_copy")
def _(types: Types, call: Call) -> None:
    dims = types.dims(call["self"])
    types.like(call.out, [dims[i] for i in call["dims"]], call["self"])


@rule("transpose", "transpose_", "transpose_copy", "swapaxes")
def _(types: Types, call: Call) -> None:
    # In place, the tensor still has its old type, whose dimensions are swapped alike.
    dims = list(types.dims(call["self"]))
    i, j = positive(call["dim0"], len(dims)), positive(call["dim1"], len(dims))
    dims[i], dims[j] = dims[j], dims[i]
    types.like(call.out, dims, call["self"])


@rule("t", "t_", "t_copy", "numpy_T")
def _(types: Types, call: Call) -> None:
    types.like(call.out, types.dims(call["self"])[::-1], call["self"])


@rule("unsqueeze", "unsqueeze_", "unsqueeze_copy")
def _(types: Types, call: Call) -> None:
    dims = list(types.dims(call["self"]))
    dims.insert(positive(call["dim"], len(dims) + 1), ())
    types.like(call.out, dims, call["self"])


@rule("squeeze", "squeeze_", "squeeze_copy")
def _(types: Types, call: Call) -> None:
    source, dims = call["self"], types.dims(call["self"])
    where = range(len(dims)) if not call.has("dim") else as_list(call["dim"])
    gone = {positive(i, len(dims)) for i in where}
    kept = [d for i, d in enumerate(dims) if i not in gone or axes.extent(d) != 1]
    types.like(call.out, kept, source)


@rule("expand", "expand_copy", "broadcast_to")
def _(types: Types, call: Call) -> None:
    source, out = call["self"], call.out
    dims, extra = types.dims(source), out.dim() - source.dim()
    expanded: list[Dim] = []
    for i, size in enumerate(out.shape):
        if i >= extra and source.shape[i - extra] == size:
            expanded.append(dims[i - extra])
        else:
            expanded.append(axes.fresh(size))
            types.note(expanded[-1], "repeat")
    # Along a repetition the tensor is constant, so not zero where positions of it are removed.
    grown = frozenset(a for d in expanded if all(d is not old for old in dims) for a in d)
    kind = types.of(source)
    types.put(out, expanded, live=kind.live | grown, value=kind.value, root=kind.root)


@rule("repeat")
def _(types: Types, call: Call) -> None:
    source, repeats = call["self"], call["repeats"]
    dims, extra = types.dims(source), len(repeats) - source.dim()
    out: list[Dim] = []
    grown: set[Axis] = set()
    for i, n in enumerate(repeats):
        times = axes.fresh(n)
        types.note(times, "repeat")
        grown |= {*times}
        out.append((*times, *(dims[i - extra] if i >= extra else ())))
    kind = types.of(source)
    types.put(call.out, out, live=kind.live | grown, value=kind.value)


@rule("repeat_interleave")
def _(types: Types, call: Call) -> None:
    if not call.has("self") or isinstance(call["repeats"], Tensor):
        raise TypingError("repeated as often as data says")
    source, dims = call["self"], list(types.dims(call["self"]))
    dim = call["dim"]
    if dim is None:
        dims, dim = [tuple(axis for d in dims for axis in d)], 0
    times = axes.fresh(call["repeats"])
    types.note(times, "repeat")
    dim = positive(dim, len(dims))
    dims[dim] = (*dims[dim], *times)
    kind = types.of(source)
    types.put(call.out, dims, live=kind.live | {*times}, value=kind.value)


@rule("select", "select_copy")
def _(types: Types, call: Call) -> None:
    source, index = call["self"], call["index"]
    dims = list(types.dims(source))
    at = positive(call["dim"], len(dims))
    dim = dims.pop(at)
    _pin(types, dim, index)
    kind = types.of(source)
    value = _column(kind.value, index, at, source.dim()) if isinstance(kind.value, Columns) else kind.value
    types.put(call.out, dims, live=kind.live, value=value, root=kind.root)


def _pin(types: Types, dim: Dim, index: int) -> None:
    """One position is used by its number: it must stay where it is."""
    if types.selecting is not None:
        types.index(types.selecting, dim, "one position is picked")
        return
    size = axes.extent(dim)
    if size > 1 and index in (0, -1, size - 1):
        types.cut(dim, 1 if index == 0 else size - 1)  # the first or last is pinned, the others stay free
    else:
        types.freeze(dim, "one position is picked by its number")


def _column(value: Columns, index: int, at: int, rank: int) -> Value | None:
    if at == rank - 1:
        return value.dims[index] if -len(value.dims) <= index < len(value.dims) else None
    return value


@rule("unbind", "unbind_copy")
def _(types: Types, call: Call) -> None:
    source = call["self"]
    dims = list(types.dims(source))
    at = positive(call["dim"], len(dims))
    types.freeze(dims.pop(at), "unbound into single positions")
    kind = types.of(source)
    for j, out in enumerate(call.outs):
        value = kind.value
        if isinstance(value, Columns):
            value = _column(value, j, at, source.dim())
        types.put(out, dims, live=kind.live, value=value, root=kind.root)


def sliced(types: Types, dim: Dim, start: int | None, stop: int | None, step: int) -> Dim:
    """The dimension of a slice."""
    n = axes.extent(dim)
    low, high, step = slice(start, stop, step).indices(n)
    high = max(low, high)
    if step == 1:
        return types.cut(types.cut(dim, low)[1], high - low)[0] if (low, high) != (0, n) else dim
    count = -(-(high - low) // step)
    if n % step == 0 and low < step and count == n // step and axes.frozen_reason(dim) is None:
        # Every step-th position: the dimension is count x step, of which one column is taken.
        rest = axes.fresh(count)
        types.unify(dim, (*rest, Axis(step, blame("a slice with a step"))))
        return rest
    types.freeze(dim, "a slice with a step")
    return axes.fresh(count, axes.frozen_reason(dim))


@rule("slice", "slice_copy")
def _(types: Types, call: Call) -> None:
    source, dims = call["self"], list(types.dims(call["self"]))
    i = positive(call["dim"], len(dims))
    dims[i] = sliced(types, dims[i], call["start"], call["end"], call["step"])
    types.like(call.out, dims, source)


@rule("narrow", "narrow_copy")
def _(types: Types, call: Call) -> None:
    source, dims = call["self"], list(types.dims(call["self"]))
    i, start = positive(call["dim"], len(dims)), positive(call["start"], source.shape[call["dim"]])
    dims[i] = sliced(types, dims[i], start, start + call["length"], 1)
    types.like(call.out, dims, source)


@rule(
    "split",
    "split_with_sizes",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "chunk",
    "unsafe_chunk",
    "split_copy",
    "split_with_sizes_copy",
    "tensor_split",
)
def _(types: Types, call: Call) -> None:
    source, dims = call["self"], types.dims(call["self"])
    i = positive(call["dim"], len(dims))
    parts = axes.split(dims[i], [out.shape[i] for out in call.outs], blame)
    for out, part in zip(call.outs, parts, strict=True):
        types.like(out, [*dims[:i], part, *dims[i + 1 :]], source)


@rule("as_strided", "as_strided_")
def _(types: Types, call: Call) -> None:
    source, out = call["self"], call.out
    if source.shape != out.shape or source.stride() != out.stride():
        raise TypingError("other strides than the tensor's own")
    types.like(out, types.dims(source), source)


@rule("view_as_complex")
def _(types: Types, call: Call) -> None:
    dims = types.dims(call["self"])
    types.freeze(dims[-1], "a complex number's two parts")
    types.like(call.out, dims[:-1], call["self"])


@rule("view_as_real")
def _(types: Types, call: Call) -> None:
    types.like(
        call.out, [*types.dims(call["self"]), axes.fresh(2, "a complex number's two parts")], call["self"]
    )


@rule("slice_scatter", "select_scatter")
def _(types: Types, call: Call) -> None:
    source, part, dims = call["self"], call["src"], list(types.dims(call["self"]))
    i = positive(call["dim"], len(dims))
    if call.has("index"):
        _pin(types, dims[i], call["index"])
        inner = dims[:i] + dims[i + 1 :]
    else:
        inner = [*dims[:i], sliced(types, dims[i], call["start"], call["end"], call["step"]), *dims[i + 1 :]]
    for a, b in zip(inner, types.dims(part), strict=True):
        types.unify(a, b)
    types.put(call.out, dims, live=types.of(source).live | types.of(part).live)
