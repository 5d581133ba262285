"""Reductions: dimensions that vanish, softmax, and choices by size."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from secateur.graph import axes
from secateur.graph.axes import Dim
from secateur.graph.rules.base import Call, as_list, positive, rule
from secateur.graph.rules.pointwise import pointwise
from secateur.graph.types import Types, everywhere

_PLAIN = {"sum", "nansum", "linalg_vector_norm", "norm", "count_nonzero", "any"}  # zeros add nothing
_POSITIONS = {"argmax", "argmin"}


@rule(
    "sum",
    "nansum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "argmax",
    "argmin",
    "var",
    "var_mean",
    "std",
    "std_mean",
    "linalg_vector_norm",
    "norm",
    "prod",
    "any",
    "all",
    "logsumexp",
    "count_nonzero",
    "aminmax",
    "median",
    "nanmedian",
    "mode",
)
def _(types: Types, call: Call) -> None:
    source: Tensor = call.tensors[0]
    base = call.name.rpartition("::")[2]
    if base in ("max", "min") and call.has("other"):
        pointwise(types, call)
        return
    dims = types.dims(source)
    over = _reduced(call, len(dims))
    keep = call["keepdim"] if call.has("keepdim") else False
    kind = types.of(source)
    kept: list[Dim] = []
    for i, d in enumerate(dims):
        if i not in over:
            kept.append(d)
            continue
        if base in _PLAIN:
            types.summed(d, kind.live)
        else:
            types.changes(d, f"{base} over it", kind.live)
        types.note(d, "mean" if base == "mean" else "reduced")
        if keep:
            kept.append(())
    live = (
        kind.live if base in {*_PLAIN, "mean", "amax", "amin", "max", "min", "aminmax"} else everywhere(kept)
    )
    for j, out in enumerate(call.outs):
        value: Any = None
        if (base in _POSITIONS or (j == 1 and base in ("max", "min", "median", "mode"))) and len(over) == 1:
            value = dims[next(iter(over))]
            types.note(value, "choice")
        types.put(out, kept, live=live, value=value)


def _reduced(call: Call, rank: int) -> set[int]:
    dim = call["dim"] if call.has("dim") else None
    if dim is None or dim == []:
        return set(range(rank))
    return {positive(i, rank) for i in as_list(dim)}


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def _(types: Types, call: Call) -> None:
    dims = types.dims(call["self"])
    if dims:
        along = dims[positive(call["dim"], len(dims))]
        types.note(along, "softmax")
        types.changes(along, "softmax over it")
    types.put(call.out, dims, live=everywhere(dims))


@rule("glu")
def _(types: Types, call: Call) -> None:
    source, dims = call["self"], list(types.dims(call["self"]))
    i = positive(call["dim"], len(dims))
    value, gate = types.cut(dims[i], source.shape[i] // 2)
    types.unify(value, gate)
    dims[i] = value
    types.put(call.out, dims, live=types.of(source).live)  # the value is multiplied with the gate


@rule("topk", "sort", "argsort", "kthvalue", "msort")
def _(types: Types, call: Call) -> None:
    source, base = call["self"], call.name.rpartition("::")[2]
    dims = list(types.dims(source))
    if not dims:
        for out in call.outs:
            types.put(out, [])
        return
    i = positive(call["dim"] if call.has("dim") else 0, len(dims))
    along = dims[i]
    types.note(along, "choice")
    types.changes(along, f"{base} over it")
    if base != "topk":
        types.freeze(along, "sorted")
    for j, out in enumerate(call.outs):
        ranked = [
            *dims[:i],
            axes.fresh(out.shape[i] if out.dim() == len(dims) else 1, "ranks"),
            *dims[i + 1 :],
        ]
        if out.dim() < len(dims):
            del ranked[i]
        indices = j == 1 or base == "argsort"
        types.put(out, ranked, live=everywhere(ranked), value=along if indices else types.of(source).value)
