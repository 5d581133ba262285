"""Recurrent layers that arrive as one operator."""

from __future__ import annotations

from secateur.graph import axes
from secateur.graph.rules.base import Call, rule
from secateur.graph.types import Types, blame, everywhere


@rule("mkldnn_rnn_layer")
def _(types: Types, call: Call) -> None:
    x, w_in, w_hidden = call["input"], call["weight0"], call["weight1"]
    bias, bias2, hx, cx = call["weight2"], call["weight3"], call["hx_"], call["cx_"]
    hidden = axes.fresh(w_hidden.shape[1])
    gates = axes.fresh(w_hidden.shape[0] // w_hidden.shape[1], blame("the gates of a recurrent layer"))
    X, W, U = types.dims(x), types.dims(w_in), types.dims(w_hidden)
    types.unify(W[0], (*gates, *hidden))
    types.unify(U[0], (*gates, *hidden))
    types.unify(U[1], hidden)
    types.unify(W[1], X[-1])
    for t in (bias, bias2):
        types.unify(types.dims(t)[0], (*gates, *hidden))
    for t in (hx, cx):
        types.unify(types.dims(t)[-1], hidden)
    for root, dim, role in (
        (types.of(w_in).root, W[0], "out"),
        (types.of(w_in).root, W[1], "in"),
        (types.of(w_hidden).root, U[0], "out"),
        (types.of(w_hidden).root, U[1], "in"),
    ):
        types.note(dim, role, root)
    types.summed(X[-1], types.of(x).live, types.of(w_in).live)
    types.multiply(*X, *W[:1])
    types.multiply(*X[:-1], *U)
    # With zero weights a cell's state and output stay zero, whatever the constant gates are.
    live = types.of(hx).live | types.of(cx).live
    outs = call.outs
    types.put(outs[0], [*X[:-1], hidden], live=live)
    for t in outs[1:]:
        if t.shape == hx.shape:
            types.put(t, types.dims(hx), live=live)
        else:
            types.put(
                t, [axes.fresh(n, "internal to a recurrent layer") for n in t.shape], live=everywhere([])
            )
