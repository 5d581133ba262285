"""Convolutions: plain, grouped, depthwise, transposed."""

from __future__ import annotations

from secateur.graph import axes
from secateur.graph.axes import Axis, Dim
from secateur.graph.rules.base import Call, rule
from secateur.graph.types import Types, everywhere, meet

KERNEL = "a kernel's extent"
"""Why kernels' height and width are frozen: every convolution has them, and nothing is held back by them."""


@rule(
    "convolution",
    "_convolution",
    "mkldnn_convolution",
    "convolution_overrideable",
    "thnn_conv2d",
    "_slow_conv2d_forward",
    "_conv_depthwise2d",
    "slow_conv3d",
    "conv1d",
    "conv2d",
    "conv3d",
)
def _(types: Types, call: Call) -> None:
    x, w = call.tensors[:2]
    bias = call["bias"]
    groups = call["groups"] if call.has("groups") else 1
    transposed = call["transposed"] if call.has("transposed") else False
    X, W = types.dims(x), types.dims(w)
    root = types.of(w).root or _name(types, w)
    for d in W[2:]:
        types.freeze(d, KERNEL)
    first, second = (W[1], W[0]) if transposed else (W[0], W[1])
    channels, out, inner = _channels(types, X[1], first, second, groups, transposed, x.shape[1])
    types.note(out, "out", root)
    types.note(out, "conv", root)
    types.note(channels, "conv", root)
    if groups == 1:
        types.note(channels, "in", root)
    elif x.shape[1] != groups:
        types.note(inner, "in", root)
    # A channel is multiplied with its own weights only: zero weights make it zero.
    types.summed(inner, types.of(x).live, types.of(w).live)
    live = meet(types.of(w).live, everywhere([out]))
    if bias is not None:
        types.unify(types.dims(bias)[0], out)
        live |= types.of(bias).live
    for d in X[2:]:
        types.freeze(d, "convolved over")
    spatial = [axes.fresh(n, "a convolution's output extent") for n in call.out.shape[2:]]
    types.multiply(X[0], out, inner, *W[2:], *(X[2:] if transposed else spatial))
    types.put(call.out, [X[0], out, *spatial], live=live)


def _name(types: Types, w: object) -> str | None:
    stored = types.stored.get(id(w))
    return stored.name if stored is not None else None


def _channels(
    types: Types, channels: Dim, first: Dim, second: Dim, groups: int, transposed: bool, count: int
) -> tuple[Dim, Dim, Dim]:
    """Unify channels with weights; the input channels, output channels and summed channels of a group.

    A weight is `[out, in / groups, ...]`, transposed `[in, out / groups, ...]`; `first` is its dimension of
    outputs and `second` that of inputs.
    """
    if groups == 1:
        types.unify(channels, second)
        return channels, first, second
    if count == groups and not transposed:  # depthwise: outputs are channels x multiplier
        types.unify(first, (*channels, *axes.fresh(axes.extent(first) // groups)))
        types.note(channels, "depthwise")
        return channels, first, ()
    group: Dim = channels if count == groups else (Axis(groups),)
    if count != groups:
        types.note(group, "groups")
    inside = axes.fresh(count // groups)
    types.unify(channels, (*group, *inside))
    if transposed:
        types.unify(second, channels)
        return channels, (*group, *first), inside
    types.unify(second, inside)
    types.unify(first, (*group, *axes.fresh(axes.extent(first) // groups)))
    return channels, first, inside
