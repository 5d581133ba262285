"""Looking up by index. An index that is known to count an axis ties the indexed dimension to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.graph import axes
from secateur.graph.axes import Dim
from secateur.graph.rules.base import Call, positive, rule
from secateur.graph.types import Columns, Types, everywhere


def look_up(types: Types, index: Tensor, dim: Dim, what: str) -> None:
    """The positions of `dim` are picked by the numbers in `index`."""
    types.index(types.of(index).value, dim, what)


@rule("embedding")
def _(types: Types, call: Call) -> None:
    table, index = call["weight"], call["indices"]
    W = types.dims(table)
    look_up(types, index, W[0], "its rows are looked up")
    types.note(W[1], "out", types.of(table).root)
    types.note(W[1], "embedding", types.of(table).root)
    types.put(call.out, [*types.dims(index), W[1]], live=types.of(table).live)


@rule("_embedding_bag", "_embedding_bag_forward_only", "embedding_bag")
def _(types: Types, call: Call) -> None:
    W = types.dims(call["weight"])
    types.freeze(W[0], "its rows are looked up by data")
    types.note(W[1], "out", types.of(call["weight"]).root)
    outs = call.outs
    types.put(outs[0], [axes.fresh(outs[0].shape[0], "bags"), W[1]], live=types.of(call["weight"]).live)
    for t in outs[1:]:
        types.put(t, [axes.fresh(n, "bags") for n in t.shape])


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


@rule("index", "_unsafe_index", "_unsafe_masked_index")
def _(types: Types, call: Call) -> None:
    source, indices = call["self"], list(call["indices"])
    dims = types.dims(source)
    kept: list[Dim] = []
    first: int | None = None  # where the dimensions of the indices go
    apart = False
    last = -1
    used: list[Tensor] = []
    masked = False
    at = 0
    while at < len(dims):
        index = indices.pop(0) if indices else None
        if index is None:
            kept.append(dims[at])
            at += 1
            continue
        apart |= first is not None and last != at
        first = len(kept) if first is None else first
        span = index.dim() if _is_mask(index) else 1
        if _is_mask(index):
            masked = True
            for d, theirs in zip(dims[at : at + span], types.dims(index), strict=True):
                types.freeze(d, "picked by a mask")
                types.freeze(theirs, "picked by a mask")
        else:
            look_up(types, index, dims[at], "its positions are picked")
            used.append(index)
        at += span
        last = at
    where = 0 if apart or first is None else first
    if masked:
        found = [
            axes.fresh(n, "picked by a mask")
            for n in call.out.shape[where : where + call.out.dim() - len(kept)]
        ]
    else:
        found = types.broadcast(used, torch.broadcast_shapes(*(t.shape for t in used)))
    kind = types.of(source)
    types.put(
        call.out, [*kept[:where], *found, *kept[where:]], live=kind.live | everywhere(found), value=kind.value
    )


@rule("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
def _(types: Types, call: Call) -> None:
    target, indices, values = call["self"], list(call["indices"]), call["values"]
    dims = types.dims(target)
    free: list[Dim] = []
    at = 0
    while at < len(dims):
        index = indices.pop(0) if indices else None
        if index is None:
            free.append(dims[at])
            at += 1
            continue
        span = index.dim() if _is_mask(index) else 1
        for d in dims[at : at + span]:
            if _is_mask(index):
                types.freeze(d, "written by a mask")
            else:
                look_up(types, index, d, "its positions are written")
        at += span
    for d, theirs in zip(free[::-1], types.dims(values)[::-1], strict=False):
        if axes.extent(d) != axes.extent(theirs):
            break
        types.unify(d, theirs)
    _written(types, call, target, values)


def _written(types: Types, call: Call, target: Tensor, *parts: Tensor) -> None:
    """The type of a tensor into which parts were written, in place or not."""
    kind = types.of(target)
    live = kind.live.union(*(types.of(p).live | types.missing(p, kind.dims) for p in parts))
    kind_of_out = call.out
    if kind_of_out is target or types.has(kind_of_out):
        kind.live = live
    else:
        types.put(kind_of_out, kind.dims, live=live, value=kind.value)


@rule("index_select", "index_select_")
def _(types: Types, call: Call) -> None:
    source, index = call["self"], call["index"]
    dims = list(types.dims(source))
    if dims:
        i = positive(call["dim"], len(dims))
        look_up(types, index, dims[i], "its positions are picked")
        dims[i] = types.dims(index)[0] if index.dim() else ()
    types.like(call.out, dims, source)


def _others(types: Types, a: list[Dim], b: list[Dim], but: int, what: str) -> None:
    """All dimensions but one correspond; where one tensor is longer, both stay as they are."""
    for j, (x, y) in enumerate(zip(a, b, strict=True)):
        if j == but:
            continue
        if axes.extent(x) == axes.extent(y):
            types.unify(x, y)
        else:
            types.freeze(x, f"{what} in part")
            types.freeze(y, f"{what} in part")


@rule("gather", "take_along_dim")
def _(types: Types, call: Call) -> None:
    source, index = call["self"], call["index"]
    dims, picked = types.dims(source), types.dims(index)
    if dims:
        i = positive(call["dim"], len(dims))
        _others(types, dims, picked, i, "gathered")
        look_up(types, index, dims[i], "its positions are gathered")
    kind = types.of(source)
    types.put(
        call.out, picked, live=kind.live | everywhere(picked[i : i + 1] if dims else []), value=kind.value
    )


@rule("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")
def _(types: Types, call: Call) -> None:
    target, index = call["self"], call["index"]
    source: Any = call["src"] if call.has("src") else None
    dims, picked = types.dims(target), types.dims(index)
    i = positive(call["dim"], len(dims))
    _others(types, dims, picked, i, "scattered")
    look_up(types, index, dims[i], "its positions are scattered to")
    if isinstance(source, Tensor):
        _others(types, picked, types.dims(source), -1, "scattered")
        _written(types, call, target, source)
    else:
        _written(types, call, target)
        types.of(call.out).live |= everywhere(dims)


@rule(
    "index_add",
    "index_add_",
    "index_copy",
    "index_copy_",
    "index_reduce",
    "index_reduce_",
    "index_fill",
    "index_fill_",
)
def _(types: Types, call: Call) -> None:
    target, index = call["self"], call["index"]
    dims = types.dims(target)
    i = positive(call["dim"], len(dims))
    look_up(types, index, dims[i], "its positions are written")
    if call.has("source"):
        source = call["source"]
        _others(types, dims, types.dims(source), i, "written")
        _written(types, call, target, source)
    else:
        _written(types, call, target)
        types.of(call.out).live |= everywhere(dims)


@rule("nonzero", "argwhere")
def _(types: Types, call: Call) -> None:
    columns = Columns(tuple(types.dims(call["self"])))
    types.put(call.out, [axes.fresh(n, "a list of found positions") for n in call.out.shape], value=columns)


@rule("masked_select")
def _(types: Types, call: Call) -> None:
    for t in call.tensors:
        for dim in types.dims(t):
            types.freeze(dim, "picked by a mask")
    types.put(call.out, [axes.fresh(n, "picked by a mask") for n in call.out.shape])


@rule("masked_scatter", "masked_scatter_")
def _(types: Types, call: Call) -> None:
    target = call["self"]
    dims = types.broadcast([target, call["mask"]], target.shape)
    for dim in dims:
        types.freeze(dim, "written by a mask")
    for dim in types.dims(call["source"]):
        types.freeze(dim, "written by a mask")
    _written(types, call, target)


@rule("one_hot")
def _(types: Types, call: Call) -> None:
    value = types.of(call["self"]).value
    known = value is not None and not isinstance(value, Columns) and axes.extent(value) == call.out.shape[-1]
    last = value if known else axes.fresh(call.out.shape[-1], "one-hot of data")
    dims = [*types.dims(call["self"]), last]
    types.put(call.out, dims, live=everywhere(dims))  # type: ignore[arg-type]


@rule("histc", "bincount")
def _(types: Types, call: Call) -> None:
    value = types.of(call["self"]).value
    known = value is not None and not isinstance(value, Columns) and axes.extent(value) == call.out.shape[0]
    dim: Any = value if known else axes.fresh(call.out.shape[0], "a histogram of data")
    types.put(call.out, [dim], live=everywhere([dim]))


@rule("_local_scalar_dense", "item")
def _(types: Types, call: Call) -> None:
    value = types.of(call["self"]).value
    if value is not None and not isinstance(value, Columns) and types.selecting is None:
        types.freeze(value, "an index into it is read as a Python number")


@rule(
    "sym_size",
    "sym_numel",
    "is_same_size",
    "equal",
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "is_nonzero",
    "is_pinned",
    "allclose",
)
def _(types: Types, call: Call) -> None:
    """Nothing comes out that has dimensions."""
