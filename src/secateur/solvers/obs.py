"""Optimal brain surgery for one layer: slow and greedy, the reference for faster solvers.

Shapes: R rows of a batch, O outputs, I inputs of a layer's matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.errors import PatternError
from secateur.core.topk import count, keep_largest
from secateur.patterns import NM, Pattern, PerRow, Unstructured
from secateur.solvers.base import Solved
from secateur.solvers.quadratic import Quadratic

_BATCH = 1 << 24  # entries of the inverses that are kept at a time


@dataclass(frozen=True)
class OBS:
    r"""One weight after the other, each time the one whose loss grows least, the others of its row adapting.

    $$ p = \arg\min_j w_j^2 / [H^{-1}]_{jj}, \qquad w' = w - \frac{w_p}{[H^{-1}]_{pp}} H^{-1}_{:,p} $$

    Takes `inputs^3` operations a row, in float64: for small layers and for tests. Rows are independent; for
    `Unstructured` their removals are ranked together by the loss that each adds.

    Args:
        damping: of the Gram matrix, relative to the mean of its diagonal.

    Reference: Frantar, Singh and Alistarh 2022, Optimal brain compression, algorithm 1.
    """

    damping: float = 0.01

    def __call__(
        self, weight: Float[Tensor, "out in"], objective: Quadratic, pattern: Pattern, sparsity: float
    ) -> Solved:
        if not isinstance(pattern, Unstructured | PerRow | NM):
            raise PatternError(f"OBS removes weights one by one; {pattern} removes them together.")
        W_OI = weight.double().masked_fill(objective.dead_I, 0)
        pattern.reachable(W_OI.shape, sparsity)
        if isinstance(pattern, NM) and count(sparsity, W_OI.numel()) not in (0, pattern.forced(W_OI.numel())):
            raise PatternError(f"OBS removes what {pattern} must lose and no more; got sparsity {sparsity}.")
        inverse_II = torch.linalg.inv(objective.H_II.double())
        rows = max(1, _BATCH // inverse_II.numel())
        traces = [_trace(part, inverse_II, pattern) for part in W_OI.split(rows)]
        rank_OI = torch.cat(traces)
        keep = _cut(rank_OI, pattern, sparsity)
        solved = exact(weight, keep, objective)
        return Solved.of(solved, keep, weight, objective)


def _trace(W_RI: Tensor, inverse_II: Tensor, pattern: Pattern) -> Tensor:
    """For each entry the loss that its removal added, infinity if it stays.

    Never less than what went before it in its row, so that what went first ranks first.
    """
    R, inputs = W_RI.shape
    W, inv = W_RI.clone(), inverse_II.expand(R, -1, -1).clone()
    rank = torch.full_like(W, torch.inf)
    most = torch.zeros(R, dtype=W.dtype, device=W.device)
    open_ = torch.ones_like(W, dtype=torch.bool)
    at = torch.arange(R, device=W.device)
    rounds = inputs // pattern.m * (pattern.m - pattern.n) if isinstance(pattern, NM) else inputs
    for step in range(rounds):
        diagonal = inv.diagonal(dim1=1, dim2=2)
        loss = (W.square() / diagonal).masked_fill(~open_, torch.inf)
        cost, p = loss.min(1)
        # A strictly growing rank keeps the order of removals among equal losses.
        most = torch.maximum(most * (1 + 1e-12) + 1e-300 * (step + 1), cost)
        rank[at, p] = most
        open_[at, p] = False
        if isinstance(pattern, NM):
            group = p // pattern.m
            gone = (~open_).view(R, -1, pattern.m) & rank.view(R, -1, pattern.m).isfinite()
            full = gone[at, group].sum(1) == pattern.m - pattern.n
            closed = open_.view(R, -1, pattern.m)
            closed[at[full], group[full]] = False
        column = inv[at, :, p]
        pivot = column[at, p][:, None]
        W -= W[at, p][:, None] / pivot * column
        inv -= column[:, :, None] * (column / pivot)[:, None, :]
        # Its row and column are zero now but for rounding; a one keeps the quotient above finite.
        inv[at, p, p] = 1.0
        W[at, p] = 0
    return rank


def _cut(rank_OI: Tensor, pattern: Pattern, sparsity: float) -> Bool[Tensor, "out in"]:
    if isinstance(pattern, NM | PerRow):
        return pattern.keep(rank_OI, sparsity)
    return keep_largest(rank_OI, count(sparsity, rank_OI.numel()))


def exact(
    weight: Float[Tensor, "out in"], keep: Bool[Tensor, "out in"], objective: Quadratic
) -> Float[Tensor, "out in"]:
    """The best weights on a mask, row by row in float64: what `fit` comes near in a few steps."""
    H = objective.H_II.double()
    W0 = weight.double()
    out = torch.zeros_like(W0)
    for row, mask, target in zip(out, keep, W0 @ H, strict=True):
        if bool(mask.any()):
            row[mask] = torch.linalg.solve(H[mask][:, mask], target[mask])
    return out.float()
