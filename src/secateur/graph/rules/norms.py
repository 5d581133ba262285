"""Normalisations: statistics over some dimensions, and a weight and bias along others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from secateur.graph import axes
from secateur.graph.axes import Axis, Dim
from secateur.graph.rules.base import Call, rule
from secateur.graph.types import Types, everywhere, meet


def _affine(
    types: Types, weight: Tensor | None, bias: Tensor | None, dims: Sequence[Dim], out: Sequence[Dim]
) -> frozenset[Axis]:
    """Unify weight and bias with the last dimensions in `dims`; where the result is live."""
    live = everywhere(out)
    for t in (weight, bias):
        if t is not None:
            for theirs, d in zip(types.dims(t), dims, strict=True):
                types.unify(theirs, d)
    if weight is not None:
        live = meet(live, types.of(weight).live | (everywhere(out) - everywhere(dims)))
    if bias is not None:
        live |= types.of(bias).live | (everywhere(out) - everywhere(dims))
    return live


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "batch_norm",
    "_native_batch_norm_legit.no_stats",
)
def _(types: Types, call: Call) -> None:
    x, dims = call["input"], types.dims(call["input"])
    statistics = [call[n] for n in ("running_mean", "running_var") if call.has(n)]
    for t in statistics:
        if t is not None:
            types.unify(types.dims(t)[0], dims[1])
    types.note(dims[1], "batch_norm")
    own = all(t is None for t in statistics) or (call.has("training") and call["training"])
    if own:  # statistics of the tensor itself: instance norm, weight standardisation
        for i, d in enumerate(dims):
            if i != 1:
                types.note(d, "norm")
                types.changes(d, "normalised over it")
    live = _affine(types, call["weight"], call["bias"], [dims[1]], dims)
    outs = call.outs
    types.put(outs[0], dims, live=live)
    for t in outs[1:]:
        along = [dims[1]] if t.shape == x.shape[1:2] else [axes.fresh(n, "statistics") for n in t.shape]
        types.put(t, along, live=everywhere(along))


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def _(types: Types, call: Call) -> None:
    x, n = call["input"], len(call["normalized_shape"])
    dims = types.dims(x)
    inner = dims[-n:]
    for d in inner:
        types.note(d, "norm")
        types.changes(d, "normalised over it", types.of(x).live)
    bias = call["bias"] if call.has("bias") else None
    types.put(call.outs[0], dims, live=_affine(types, call["weight"], bias, inner, dims))
    for t in call.outs[1:]:
        outer = [*dims[:-n], *[()] * (t.dim() - len(dims) + n)]
        types.put(t, outer, live=everywhere(outer))


@rule("native_group_norm", "group_norm")
def _(types: Types, call: Call) -> None:
    x, dims = call["input"], types.dims(call["input"])
    groups = call["group"] if call.has("group") else call["num_groups"]
    inner = dims[1]
    if groups > 1:
        group, inner = (Axis(groups),), axes.fresh(axes.extent(dims[1]) // groups)
        types.unify(dims[1], (*group, *inner))
        types.note(group, "groups")
    types.note(inner, "norm")
    types.changes(inner, "normalised over it")
    for d in dims[2:]:
        types.changes(d, "normalised over it")
    live = _affine(types, call["weight"], call["bias"], [dims[1]], dims)
    types.put(call.outs[0], types.dims(x), live=live)
    for t in call.outs[1:]:
        types.put(t, [axes.fresh(n, "statistics") for n in t.shape])


@rule("_weight_norm_interface", "_weight_norm")
def _(types: Types, call: Call) -> None:
    v, g, dim = call["v"], call["g"], call["dim"]
    for i, d in enumerate(types.dims(v)):
        if i != dim % v.dim():
            types.note(d, "norm")
            types.changes(d, "the norm of a weight runs over it")
    for theirs, d in zip(types.dims(g), types.dims(v), strict=True):
        if axes.extent(theirs) == axes.extent(d):
            types.unify(theirs, d)
    root = types.of(v).root
    # Zero over zero is not zero: a masked twin zeroes the length and leaves the direction alone.
    if root is not None:
        types.untouched.add(root)
    types.put(call.outs[0], types.dims(v), live=types.of(g).live, root=root)
    if len(call.outs) > 1:
        types.put(call.outs[1], types.dims(g))
