"""Operators that put tensors side by side or shift them: cat, stack, pad, flip, roll."""

from __future__ import annotations

from torch import Tensor

from secateur.graph import axes
from secateur.graph.axes import Dim
from secateur.graph.rules.base import Call, as_list, positive, rule
from secateur.graph.rules.views import sliced
from secateur.graph.types import NONE, Types, everywhere


def _live(types: Types, tensors: list[Tensor]) -> frozenset[axes.Axis]:
    return frozenset().union(*(types.of(t).live for t in tensors))


@rule("cat", "concat", "concatenate")
def _(types: Types, call: Call) -> None:
    out = call.out
    parts = [t for t in call["tensors"] if t.dim() == out.dim()]  # an empty vector joins anything
    i = positive(call["dim"], out.dim())
    dims = list(types.dims(parts[0]))
    for other in parts[1:]:
        for j, d in enumerate(types.dims(other)):
            if j != i:
                types.unify(dims[j], d)
    dims[i] = axes.concat(types.dims(t)[i] for t in parts)
    values = [types.of(t).value for t in parts]
    value = values[0] if all(v is not None and v == values[0] for v in values) else None
    types.put(out, dims, live=_live(types, parts), value=value)


@rule("stack")
def _(types: Types, call: Call) -> None:
    parts = call["tensors"]
    dims = list(types.dims(parts[0]))
    for other in parts[1:]:
        for a, b in zip(dims, types.dims(other), strict=True):
            types.unify(a, b)
    dims.insert(positive(call["dim"], call.out.dim()), axes.fresh(len(parts), "a stack of tensors"))
    types.put(call.out, dims, live=_live(types, parts))


@rule(
    "constant_pad_nd",
    "pad",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
)
def _(types: Types, call: Call) -> None:
    source, pad, dims = call["self"], as_list(call.args[1]), list(types.dims(call["self"]))
    constant = call.name.endswith("constant_pad_nd")
    for j in range(len(pad) // 2):
        i, before, after = source.dim() - 1 - j, pad[2 * j], pad[2 * j + 1]
        if before or after:
            dims[i] = _padded(types, dims[i], before, after, constant)
    live = types.of(source).live
    types.put(call.out, dims, live=live, value=types.of(source).value if constant else None)


def _padded(types: Types, dim: Dim, before: int, after: int, constant: bool) -> Dim:
    """New positions at the ends, or fewer; a pad by neighbours reads positions by their number."""
    n = axes.extent(dim)
    if not constant:
        types.freeze(dim, "padded by its neighbours")
    if reason := axes.frozen_reason(dim):
        return axes.fresh(n + before + after, reason)
    inner = sliced(types, dim, max(0, -before), n - max(0, -after), 1)
    ends = [axes.fresh(k, "padding") if k > 0 else (axes.Axis(0),) for k in (before, after)]
    return axes.concat([ends[0], inner, ends[1]])


@rule("flip", "roll")
def _(types: Types, call: Call) -> None:
    source, dims = call["self"], types.dims(call["self"])
    flips = call.name.endswith("flip")
    for i in as_list(call["dims"]) or range(len(dims)):
        types.freeze(dims[i], "flipped" if flips else "rolled")
    types.like(call.out, dims, source)


@rule("unfold")
def _(types: Types, call: Call) -> None:
    source, dims = call["self"], list(types.dims(call["self"]))
    i = positive(call["dimension"], len(dims))
    types.freeze(dims[i], "cut into windows")
    dims[i] = axes.fresh(call.out.shape[i], "windows")
    types.like(call.out, [*dims, axes.fresh(call.out.shape[-1], "windows")], source, value=False)


@rule("diagonal", "diag_embed", "diagonal_copy", "diag", "trace")
def _(types: Types, call: Call) -> None:
    for dim in types.dims(call.tensors[0]):
        types.freeze(dim, "its diagonal is taken")
    types.put(call.out, [axes.fresh(n, "a diagonal") for n in call.out.shape])


@rule("tril", "tril_", "triu", "triu_")
def _(types: Types, call: Call) -> None:
    dims = types.dims(call["self"])
    for dim in dims[-2:]:
        types.freeze(dim, "a triangle of it is taken")
    types.like(call.out, dims, call["self"], value=False)


@rule(
    "zeros",
    "ones",
    "empty",
    "full",
    "rand",
    "randn",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "_efficientzerotensor",
)
def _(types: Types, call: Call) -> None:
    dims = [axes.fresh(n) for n in call.out.shape]  # what they are used with says what they are
    zero = call.name.endswith(("zeros", "_efficientzerotensor"))
    types.put(call.out, dims, live=NONE if zero else everywhere(dims))


@rule("scalar_tensor", "randint", "normal", "empty_strided", "new_empty_strided")
def _(types: Types, call: Call) -> None:
    types.put(call.out, [types.freeze(axes.fresh(n), "made with sizes of its own") for n in call.out.shape])


@rule("arange", "linspace", "eye", "logspace", "hann_window", "tril_indices", "triu_indices", "randperm")
def _(types: Types, call: Call) -> None:
    if not call.out.dim():
        return
    name = call.name.rpartition("::")[2]
    dims = [
        types.freeze(axes.fresh(n), f"its values depend on the position ({name})") for n in call.out.shape
    ]
    types.put(call.out, dims)
