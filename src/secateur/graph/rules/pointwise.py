"""Operators that work entry by entry: torch tags them, and they share one rule."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from secateur.graph import axes
from secateur.graph.axes import Axis, Dim
from secateur.graph.rules.base import Call, rule, words
from secateur.graph.types import NONE, Columns, Types, everywhere, meet

# f(0) = 0, so that zero stays zero.
_KEEPS_ZERO = words(
    """relu gelu silu tanh mish hardswish leaky_relu elu selu celu hardtanh relu6 softshrink hardshrink sin
    sqrt abs neg expm1 log1p erf sign sgn round floor ceil trunc frac atan asinh sinh tan asin square
    clone _to_copy detach alias lift_fresh lift_fresh_copy lift native_dropout dropout nan_to_num
    _prelu_kernel prelu positive conj _conj resolve_conj contiguous real imag type_as rrelu_with_noise
    bernoulli zeros_like _fused_dropout pin_memory threshold fmod copysign deg2rad rad2deg
    feature_dropout alpha_dropout glu_jvp isnan isinf view_as_real_copy"""
)
_SUMS = words("add sub rsub maximum minimum hypot lerp complex where copy __or__ logical_or")
_PRODUCTS = words("mul logical_and bitwise_and __and__ masked_fill_zero")
_QUOTIENTS = words("div floor_divide true_divide remainder atan2 xlogy")
# The integers in the result index what those of the argument index.
_KEEPS_VALUE = words(
    """clone _to_copy detach alias lift_fresh lift_fresh_copy contiguous clamp clamp_min clamp_max
    masked_fill abs positive to fill copy"""
)
_FORGETS_VALUE = words(
    "zeros_like ones_like empty_like full_like rand_like randn_like isnan isinf where fill zero new_zeros"
)
_COMPARISONS = words("eq ne lt le gt ge")
_UNTAGGED = words(
    """clone _to_copy detach alias lift_fresh lift_fresh_copy lift zeros_like ones_like empty_like
    full_like rand_like randn_like fill zero normal uniform bernoulli native_dropout _conj isnan isinf
    nan_to_num copy contiguous masked_fill pin_memory random log_sigmoid_forward _conj_physical relu
    sigmoid where _prelu_kernel hardtanh polar complex real imag floor_divide fmod type_as hardswish
    hardsigmoid silu mish softplus elu gelu leaky_relu celu selu relu6 threshold softshrink hardshrink
    log_sigmoid angle rrelu_with_noise _fused_dropout new_empty_like"""
)


@cache
def is_pointwise(func: Any, name: str) -> bool:
    """Whether an operator without a rule of its own works entry by entry."""
    return torch.Tag.pointwise in func.tags or name.removesuffix("_") in _UNTAGGED


def pointwise(types: Types, call: Call) -> None:
    """Broadcast all tensors against each other."""
    tensors = call.tensors
    base = call.name.rpartition("::")[2].removesuffix("_")
    if not tensors:
        for out in call.outs:
            types.put(out, [axes.fresh(n) for n in out.shape])
        return
    if call.name.endswith("_"):
        _in_place(types, call, base, tensors)
        return
    for out in call.outs:
        dims = types.broadcast(tensors, out.shape)
        live = _live(types, call, base, tensors, dims)
        value = _value(types, base, tensors, call)
        types.put(out, dims, live=live, value=value, root=None)


def _in_place(types: Types, call: Call, base: str, tensors: list[Tensor]) -> None:
    target = tensors[0]
    dims = types.broadcast(tensors, target.shape)
    live = _live(types, call, base, tensors, dims)
    kind = types.of(target)
    kind.live = live if base != "copy" else types.of(tensors[-1]).live | types.missing(tensors[-1], dims)
    if base == "copy" and types.of(tensors[-1]).value is not None:
        kind.value = types.of(tensors[-1]).value
    else:
        _value(types, base, tensors, call)
    for out in call.outs:
        if out is not target and out.shape == target.shape:
            types.put(out, kind.dims, live=kind.live, value=kind.value)


def _live(types: Types, call: Call, base: str, tensors: list[Tensor], dims: list[Dim]) -> frozenset[Axis]:
    """Where the result is not known to be zero at removed positions."""

    def along(t: Tensor) -> frozenset[Axis]:
        return types.of(t).live | types.missing(t, dims)

    first = along(tensors[0])
    if base in ("zeros_like", "zero"):
        return NONE
    if base in ("fill", "masked_fill") and _number(call, base) == 0:
        return first if base == "masked_fill" else NONE
    if base in _KEEPS_ZERO:
        return frozenset().union(*map(along, tensors)) if len(tensors) > 1 else first
    if base in _PRODUCTS or (base == "mul" and len(tensors) == 1):
        return meet(*map(along, tensors))
    if base in _QUOTIENTS:
        return first | _may_be_zero(types, tensors[1]) if len(tensors) > 1 else first
    if base == "pow" and len(tensors) == 1 and _positive_power(call):
        return first
    if base in _SUMS and len(tensors) > 1 and not _has_scalar_summand(call, base):
        return frozenset().union(*map(along, tensors[-2:] if base == "where" else tensors))
    if base in ("clamp", "clamp_min", "clamp_max") and len(tensors) == 1 and _clamp_keeps_zero(call):
        return first
    if base == "addcmul" and len(tensors) == 3:
        return first | meet(along(tensors[1]), along(tensors[2]))
    return everywhere(dims)


def _may_be_zero(types: Types, divisor: Tensor) -> frozenset[Axis]:
    """Axes at whose removed positions a divisor is zero, where zero over zero is not zero."""
    live = axes.leaves(types.of(divisor).live)
    return frozenset(leaf for d in types.dims(divisor) for leaf in axes.leaves(d) if leaf not in live)


def _number(call: Call, base: str) -> Any:
    values = [x for x in tree_leaves((call.args[1:], call.kwargs)) if isinstance(x, int | float)]
    return values[-1] if values else None


def _positive_power(call: Call) -> bool:
    exponent = _number(call, "pow")
    return exponent is not None and exponent > 0 and isinstance(call.args[0], Tensor)


def _has_scalar_summand(call: Call, base: str) -> bool:
    """Whether a number other than zero is added; `alpha` only scales."""
    if base not in ("add", "sub", "rsub", "maximum", "minimum", "where"):
        return False
    return any(isinstance(x, int | float) and not isinstance(x, bool) and x != 0 for x in call.args)


def _clamp_keeps_zero(call: Call) -> bool:
    low = call["min"] if call.has("min") else None
    high = call["max"] if call.has("max") else None
    low = -math.inf if low is None else low
    high = math.inf if high is None else high
    return bool(low <= 0 <= high) if not isinstance(low, Tensor) and not isinstance(high, Tensor) else False


def _value(types: Types, base: str, tensors: list[Tensor], call: Call) -> Any:
    """What the integers in the result index; indices that enter arithmetic freeze what they index."""
    values = [v for t in tensors if (v := types.of(t).value) is not None]
    if not values:
        return None
    if len(values) == 1 and (base in _KEEPS_VALUE or (len(tensors) == 1 and base in _FORGETS_VALUE)):
        return values[0] if base in _KEEPS_VALUE else None
    if base in _FORGETS_VALUE:
        return None
    numbers = [x for x in tree_leaves((call.args, call.kwargs)) if type(x) in (int, float)]
    for value in values:
        for dim in value.dims if isinstance(value, Columns) else (value,):
            # Comparing with the number of positions is how a position beyond the last is told.
            if base in _COMPARISONS and numbers and numbers[0] == axes.extent(dim):
                continue
            types.freeze(dim, f"its indices are used as numbers ({base})")
    return None


@rule("polar", "complex")
def _(types: Types, call: Call) -> None:
    dims = types.broadcast(call.tensors, call.out.shape)
    types.put(call.out, dims, live=everywhere(dims))
