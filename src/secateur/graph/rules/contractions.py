"""Matrix products: two dimensions meet and vanish."""

from __future__ import annotations

from torch import Tensor

from secateur.graph.axes import Axis, Dim
from secateur.graph.rules.base import Call, rule
from secateur.graph.types import Types, everywhere, meet

_GROUPED_ALIGNMENT = 16  # bytes between rows, which torch's grouped product insists on


def contract(
    types: Types, a: Tensor, b: Tensor, kept_a: list[Dim], inner: tuple[Dim, Dim], kept_b: list[Dim]
) -> frozenset[Axis]:
    """Unify the inner dimensions; note who produces and who consumes; return where the product is live.

    `kept_a` and `kept_b` are the dimensions that only one factor has.
    """
    types.unify(*inner)
    live_a, live_b = types.of(a).live, types.of(b).live
    types.summed(inner[0], live_a, live_b)
    root_a, root_b = types.of(a).root, types.of(b).root
    for root, kept, dim in ((root_a, kept_a, inner[0]), (root_b, kept_b, inner[1])):
        if root is not None:
            types.note(dim, "in", root)
            for d in kept:
                types.note(d, "out", root)
    if root_a is None and root_b is None:
        types.note(inner[0], "dot")
    return meet(live_a | everywhere(kept_b), live_b | everywhere(kept_a))


def add_bias(types: Types, bias: Tensor, dims: list[Dim], live: frozenset[Axis]) -> frozenset[Axis]:
    """Broadcast a summand; where the sum is live."""
    for d, size, theirs in zip(dims[::-1], bias.shape[::-1], types.dims(bias)[::-1], strict=False):
        if size != 1:
            types.unify(theirs, d)
    return live | types.of(bias).live | types.missing(bias, dims)


@rule("mm")
def _(types: Types, call: Call) -> None:
    a, b = call["self"], call["mat2"]
    (i, k), (m, j) = types.dims(a), types.dims(b)
    live = contract(types, a, b, [i], (k, m), [j])
    types.multiply(i, k, j)
    types.put(call.out, [i, j], live=live)


@rule("addmm", "addmm_", "_addmm_activation")
def _(types: Types, call: Call) -> None:
    a, b = call["mat1"], call["mat2"]
    (i, k), (m, j) = types.dims(a), types.dims(b)
    live = contract(types, a, b, [i], (k, m), [j])
    types.multiply(i, k, j)
    live = add_bias(types, call["self"], [i, j], live)
    types.put(call.out, [i, j], live=live)


@rule("linear")
def _(types: Types, call: Call) -> None:
    x, w, bias = call["input"], call["weight"], call["bias"]
    *outer, k = types.dims(x)
    out, m = types.dims(w) if w.dim() == 2 else ((), types.dims(w)[0])
    live = contract(types, x, w, outer, (k, m), [out])
    types.multiply(*outer, k, out)
    dims = [*outer, out] if w.dim() == 2 else outer
    if bias is not None:
        live = add_bias(types, bias, dims, live)
    types.put(call.out, dims, live=live)


@rule("bmm")
def _(types: Types, call: Call) -> None:
    dims, live = _batched(types, call["self"], call["mat2"])
    types.put(call.out, dims, live=live)


@rule("baddbmm", "baddbmm_")
def _(types: Types, call: Call) -> None:
    dims, live = _batched(types, call["batch1"], call["batch2"])
    types.put(call.out, dims, live=add_bias(types, call["self"], dims, live))


def _batched(types: Types, a: Tensor, b: Tensor) -> tuple[list[Dim], frozenset[Axis]]:
    (n, i, k), (o, m, j) = types.dims(a), types.dims(b)
    types.unify(n, o)
    live = contract(types, a, b, [i], (k, m), [j])
    if types.of(a).root is None and types.of(b).root is None:
        types.note(n, "batch")
        types.note(j, "value")
    types.multiply(n, i, k, j)
    return [n, i, j], live


@rule("mv")
def _(types: Types, call: Call) -> None:
    a, b = call["self"], call["vec"]
    (i, k), (m,) = types.dims(a), types.dims(b)
    live = contract(types, a, b, [i], (k, m), [])
    types.multiply(i, k)
    types.put(call.out, [i], live=live)


@rule("addmv", "addmv_")
def _(types: Types, call: Call) -> None:
    a, b = call["mat"], call["vec"]
    (i, k), (m,) = types.dims(a), types.dims(b)
    live = contract(types, a, b, [i], (k, m), [])
    types.multiply(i, k)
    types.put(call.out, [i], live=add_bias(types, call["self"], [i], live))


@rule("dot", "vdot")
def _(types: Types, call: Call) -> None:
    a, b = call.tensors
    contract(types, a, b, [], (types.dims(a)[0], types.dims(b)[0]), [])
    types.put(call.out, [])


@rule("addr", "ger", "outer")
def _(types: Types, call: Call) -> None:
    *base, a, b = call.tensors
    dims = [types.dims(a)[0], types.dims(b)[0]]
    live = meet(types.of(a).live | everywhere([dims[1]]), types.of(b).live | everywhere([dims[0]]))
    for summand in base:
        live = add_bias(types, summand, dims, live)
    types.put(call.out, dims, live=live)


@rule("_grouped_mm", "transformers::grouped_mm_fallback")
def _(types: Types, call: Call) -> None:
    a, b = call.tensors[:2]
    *outer, k = types.dims(a)
    *stack, m, j = types.dims(b)
    live = contract(types, a, b, outer, (k, m), [j])
    offsets = call.tensors[2] if len(call.tensors) > 2 else None
    if offsets is not None and stack:
        types.unify(stack[0], types.dims(offsets)[0])
    types.multiply(*outer, k, j)
    bytes_apart = _GROUPED_ALIGNMENT // b.element_size()
    for dim in (k, j):
        types.align(dim, bytes_apart, f"a grouped matrix product wants multiples of {bytes_apart}")
    types.put(call.out, [*outer, j], live=live)


@rule("_trilinear")
def _(types: Types, call: Call) -> None:
    factors = [call["i1"], call["i2"], call["i3"]]
    expands = [call["expand1"], call["expand2"], call["expand3"]]
    rank = factors[0].dim() + len(expands[0])
    full: list[Dim] = [()] * rank
    lives = []
    for factor, expand in zip(factors, expands, strict=True):
        own = iter(types.dims(factor))
        for i in range(rank):
            if i in expand:
                continue
            dim = next(own)
            if dim and full[i]:
                types.unify(full[i], dim)
            full[i] = full[i] or dim
        lives.append(types.of(factor).live)
    for i, (factor, expand) in enumerate(zip(factors, expands, strict=True)):
        lives[i] = lives[i] | everywhere(full[j] for j in expand) | types.missing(factor, [])
        if (root := types.of(factor).root) is not None:
            for j in range(rank):
                if j not in expand:
                    types.note(full[j], "in" if j in call["sumdim"] else "out", root)
    for i in call["sumdim"]:
        types.summed(full[i], *lives)
    types.multiply(*full)
    kept = [d for i, d in enumerate(full) if i not in call["sumdim"]]
    types.put(call.out, kept, live=meet(*lives))


@rule("cdist", "_cdist_forward", "_euclidean_dist")
def _(types: Types, call: Call) -> None:
    a, b = call.tensors[:2]
    (*outer, i, k), (*others, j, m) = types.dims(a), types.dims(b)
    types.unify(k, m)
    for x, y in zip(outer, others, strict=True):
        types.unify(x, y)
    types.summed(k, types.of(a).live | types.of(b).live, why="a distance over it where it is not zero")
    dims = [*outer, i, j]
    types.put(call.out, dims, live=everywhere(dims))
