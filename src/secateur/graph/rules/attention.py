"""Fused attention."""

from __future__ import annotations

from secateur.graph import axes
from secateur.graph.rules.base import Call, rule
from secateur.graph.types import Types, everywhere, meet


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_attention_math_for_mps",
    "scaled_dot_product_attention",
)
def _(types: Types, call: Call) -> None:
    query, key, value = call["query"], call["key"], call["value"]
    (*Q, q, d), (*K, k, e), (*V, v, w) = (types.dims(t) for t in (query, key, value))
    types.unify(d, e)
    types.unify(k, v)
    shared = [q]  # along these the values are the same, zero or not
    for a, b, c in zip(Q, K, V, strict=True):
        types.unify(b, c)
        if axes.extent(a) == axes.extent(b):
            types.unify(a, b)
        else:  # several query heads for each key head
            repeat = axes.fresh(axes.extent(a) // axes.extent(b))
            types.unify(a, (*b, *repeat))
            types.note(repeat, "repeat")
            shared.append(repeat)
        types.note(a, "heads")  # wherever they stand: what comes from the input is frozen anyway
        types.note(a, "batch")
        types.note(b, "batch")
    types.note(d, "dot")
    types.note(w, "value")
    types.summed(d, types.of(query).live, types.of(key).live)
    types.changes(k, "softmax over it")
    if call["scale"] is None:  # called by no Python code: see `graph.scales`
        types.changes(d, "the default scale of attention depends on its size")
    full = [*Q, q, k]
    for mask in call.tensors[3:]:
        types.broadcast([mask], mask.shape)
        for theirs, ours, n in zip(types.dims(mask)[::-1], full[::-1], mask.shape[::-1], strict=False):
            if n != 1 and axes.extent(theirs) == axes.extent(ours):
                types.unify(theirs, ours)
    types.multiply(*Q, q, k, d)
    types.multiply(*Q, q, k, w)
    outs = call.outs
    # A head is zero where its values are; a key is not, since softmax gives it a share.
    types.put(
        outs[0], [*Q, q, w], live=meet(types.of(value).live | everywhere(shared), everywhere([*Q, q, w]))
    )
    for t in outs[1:]:
        plain = (
            [*Q, q]
            if t.dim() == len(Q) + 1 and t.shape[:-1] == query.shape[:-2] and t.shape[-1] == query.shape[-2]
            else None
        )
        types.put(t, plain or [axes.fresh(n, "internal to attention") for n in t.shape])
