"""Entries to units: what the labels of an index say, as a few scatter operations.

Shapes: N indices along the group's dimension, R entries beside each, U units.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

NORMS = (None, "mean", "max", "sum", "l2")


def index_rows(values: Tensor, dim: int) -> Float[Tensor, "N R"]:
    """A tensor with one row for each index of `dim`."""
    return values.movedim(dim, 0).reshape(values.shape[dim], -1)


def add_units(
    values_N: Float[Tensor, "*x N"], labels_N: Int[Tensor, "N"], size: int
) -> Float[Tensor, "*x U"]:
    """Sums over the indices of each unit, along the last dimension; indices of no unit are left out."""
    kept = labels_N >= 0
    total = values_N.new_zeros(*values_N.shape[:-1], size)
    return total.index_add_(-1, labels_N[kept], values_N[..., kept])


def count_units(labels_N: Int[Tensor, "N"], size: int) -> Float[Tensor, "U"]:
    """Indices of each unit."""
    return add_units(torch.ones(labels_N.shape, dtype=torch.float64, device=labels_N.device), labels_N, size)


def within_member(
    scores_NR: Float[Tensor, "N R"], labels_N: Int[Tensor, "N"], size: int, how: str
) -> Float[Tensor, "U"]:
    """Scores of one tensor's entries reduced to units, in float64; 0 for a unit that has none here.

    `sum` and `l1`: the sum. `l2`: the root of the sum of squares. `mean`: sum over number of entries. `max`.
    """
    if how == "max":
        kept = labels_N >= 0
        units = torch.full((size,), -torch.inf, dtype=torch.float64, device=scores_NR.device)
        units.scatter_reduce_(0, labels_N[kept], scores_NR.amax(dim=1).double()[kept], "amax")
        return units.where(count_units(labels_N, size) > 0, 0)
    if how == "l2":
        # Squared in float64: the squares of small scores underflow in float32.
        rows = torch.linalg.vector_norm(scores_NR, dim=1, dtype=torch.float64).square()
        return add_units(rows, labels_N, size).sqrt()
    total = add_units(scores_NR.sum(dim=1, dtype=torch.float64), labels_N, size)
    if how != "mean":
        return total
    return total / (count_units(labels_N, size) * scores_NR.shape[1]).clamp(min=1)


def across_members(
    parts_MU: Float[Tensor, "M U"], has_MU: Float[Tensor, "M U"], how: str, squares: bool
) -> Float[Tensor, "U"]:
    """Units of several members combined over those that hold the unit: `sum`, `mean` or `max`.

    `squares` combines squares and takes the root afterwards, so that `sum` of L2 norms is the norm of all.
    """
    parts = parts_MU.square() if squares else parts_MU
    if how == "max":
        best = parts.masked_fill(has_MU == 0, -torch.inf).amax(dim=0)
    else:
        best = (parts * has_MU).sum(dim=0)
        if how == "mean":
            best = best / has_MU.sum(dim=0)
    return best.sqrt() if squares else best
