"""Proofs by running: permuted and masked copies of a model against the model itself."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.modes import evaluation
from secateur.graph import axes
from secateur.graph.axes import Axis, Dim
from secateur.graph.plan import keep_mask
from secateur.graph.trace import results, stored_tensors
from secateur.graph.types import Types


@dataclass(frozen=True)
class Check:
    """How far two models' outputs lie apart, relative to the largest output.

    Attributes:
        error: largest difference that should be zero.
        change: largest difference that the operation itself makes; where it is small, a small error
            shows nothing.
        tolerance: error that counts as rounding.
    """

    error: float
    change: float
    tolerance: float = 1e-5

    @property
    def ok(self) -> bool:
        """Whether the error is no more than rounding."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = "equal" if self.ok else "NOT equal"
        return f"{verdict}: error {self.error:.1e}, change {self.change:.1e}, relative to the largest output"


def outputs(model: nn.Module, example: tuple[Sequence[Any], Mapping[str, Any]]) -> list[Tensor]:
    """Floating-point outputs on the example, in evaluation mode."""
    with evaluation(model), torch.no_grad():
        found = results(model(*copy.deepcopy(example[0]), **copy.deepcopy(dict(example[1]))))
    return [t.detach() for t in found if t.is_floating_point()]


def difference(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """Largest difference of tensors of one shape, relative to the largest entry; NaN is infinite."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or x.numel() == 0:
            continue
        x, y = x.double(), y.double()
        finite = x.isfinite() | y.isfinite()
        if not bool(((x == y) | finite).all()):
            return float("inf")
        gap = torch.where(x == y, torch.zeros_like(x), (x - y).abs())
        scale = float(torch.where(x.isfinite(), x.abs(), torch.zeros_like(x)).amax())
        worst = max(worst, float(gap.nan_to_num(float("inf")).amax()) / (scale or 1.0))
    return worst


def permuted(model: nn.Module, types: Types, orders: Mapping[Axis, Tensor]) -> nn.Module:
    """A copy of `model` with the positions of some axes in another order, in every tensor that has them."""
    twin = copy.deepcopy(model)
    by_name = stored_tensors(twin)
    with torch.no_grad():
        for stored in types.stored.values():
            if stored.name not in by_name:
                continue
            tensor = by_name[stored.name]
            for i, dim in enumerate(stored.type.dims):
                index = _order(dim, orders)
                if not torch.equal(index, torch.arange(len(index))):
                    tensor.data = tensor.data.index_select(i, index.to(tensor.device))
    return twin


def _order(dim: Dim, orders: Mapping[Axis, Tensor]) -> Tensor:
    """Where each position of a permuted dimension comes from. Int64 `[extent]`."""
    out = torch.zeros(1, dtype=torch.int64)
    for axis in axes.atoms(dim):
        if axis.terms is None:
            own = orders.get(axis, torch.arange(axis.size))
        else:
            pieces, start = [], 0
            for term in axes.terms_of(axis):
                pieces.append(_order(term, orders) + start)
                start += axes.extent(term)
            own = torch.cat(pieces)
        out = (out[:, None] * axis.size + own[None]).reshape(-1)
    return out


def masked(model: nn.Module, types: Types, masks: Mapping[Axis, Tensor]) -> nn.Module:
    """A copy of `model` whose parameters are zero wherever a position is not kept."""
    twin = copy.deepcopy(model)
    mask_(twin, types, masks)
    return twin


def mask_(model: nn.Module, types: Types, masks: Mapping[Axis, Tensor]) -> None:
    """Zero the parameters of `model` wherever a position is not kept, in place."""
    by_name = stored_tensors(model)
    cache: dict[Axis, Tensor] = {}
    with torch.no_grad():
        for stored in types.stored.values():
            if not stored.is_parameter or stored.name in types.untouched:
                continue
            tensor = by_name[stored.name]
            for i, dim in enumerate(stored.type.dims):
                keep = keep_mask(dim, masks, cache)
                if not bool(keep.all()):
                    tensor.data.index_fill_(i, (~keep).nonzero().flatten().to(tensor.device), 0)
