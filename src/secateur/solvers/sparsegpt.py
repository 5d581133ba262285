"""SparseGPT: one sweep over the columns, each removal made up for by the columns that follow.

Shapes: O outputs, I inputs, C columns of a block. Weights lie transposed, `W_IO`, so that a column of the
layer's matrix is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.core.topk import count, keep_largest_columns, refuse_nan
from secateur.patterns import NM, Block, Pattern, PerRow
from secateur.solvers.base import Solved
from secateur.solvers.quadratic import Quadratic

_INNER = 16  # columns that are updated one by one; all else are products of matrices


@dataclass(frozen=True)
class SparseGPT:
    r"""Columns from left to right: what a removed weight did, the columns after it do as well as they can.

    $$ e = w_j / U_{jj}, \qquad w_{j:} \leftarrow w_{j:} - e\,U_{j,j:}, \qquad H^{-1} = U^T U $$

    The weights that go are chosen block by block of `block` columns, when the sweep reaches them, by the
    smallest $w_j^2 / U_{jj}^2$; for `NM`, group by group. The total is exact. From block to block no inverse
    is needed: with the triangle $R = U^{-1}$ and what the blocks before have lost, $\delta = w^0 - w$, those
    of block $C$ begin at $w_C = w^0_C + \delta R_{:,C} R_{CC}^{-1}$.

    Args:
        block: columns whose mask is chosen at once. A multiple of the pattern's group is taken.
        damping: of the Gram matrix, relative to the mean of its diagonal.

    Reference: Frantar and Alistarh 2023, SparseGPT, algorithm 1. Differs from the paper: no inverse of $H$;
    exact counts, where the authors' code removes one weight a block too many and all that tie.
    """

    block: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.block < 1:
            raise SecateurError(f"SparseGPT(block=...) is at least 1; got {self.block}.")

    def __call__(
        self, weight: Float[Tensor, "out in"], objective: Quadratic, pattern: Pattern, sparsity: float
    ) -> Solved:
        W_OI = weight.float()
        pattern.reachable(W_OI.shape, sparsity)
        refuse_nan(W_OI, "A weight")
        live_OI = W_OI * ~objective.dead_I
        W_IO, keep_IO = swept(live_OI.T, objective.triangle_II, pattern, sparsity, self.block)
        return Solved.of(W_IO.T.contiguous(), keep_IO.T.contiguous(), W_OI, objective)


def swept(
    dense_IO: Float[Tensor, "inputs outputs"],
    R_II: Float[Tensor, "inputs inputs"],
    pattern: Pattern,
    sparsity: float,
    block: int,
) -> tuple[Float[Tensor, "inputs outputs"], Bool[Tensor, "inputs outputs"]]:
    """The weights behind the sweep, and what is kept."""
    inputs, entries = len(dense_IO), dense_IO.numel()
    group = pattern if isinstance(pattern, NM) and _fixed(pattern, sparsity, entries) else None
    width, inner = _multiple(block, pattern), _multiple(_INNER, group) if group else _INNER
    # Where the sweep has not been: what the blocks before lost, times R.
    W_IO = torch.zeros_like(dense_IO, memory_format=torch.contiguous_format)
    keep_IO = torch.ones_like(W_IO, dtype=torch.bool)
    gone = 0
    for start in range(0, inputs, width):
        stop = min(start + width, inputs)
        W_CO, keep_CO, C = W_IO[start:stop], keep_IO[start:stop], stop - start
        dense_CO = dense_IO[start:stop].contiguous()
        U_CC = torch.linalg.solve_triangular(R_II[start:stop, start:stop], _eye(C, R_II), upper=True)
        scale_C1 = U_CC.diagonal()[:, None].clone()
        W_CO.copy_(dense_CO + U_CC.T @ W_CO)
        Q_CC = U_CC / scale_C1  # so that a removed weight itself is what it passes on
        E_CO = torch.empty_like(W_CO)
        if group is None:
            due = _due(pattern, sparsity, W_IO.shape, stop) - gone
            keep_CO.copy_(pattern.keep((W_CO / scale_C1).square_().T, due / W_CO.numel()).T)
            gone += due
        for a in range(0, C, inner):
            b = min(a + inner, C)
            if group is None:
                _columns_(W_CO[a:b], E_CO[a:b], keep_CO[a:b], Q_CC[a:b, a:b])
            else:
                _groups_(W_CO[a:b], E_CO[a:b], keep_CO[a:b], Q_CC[a:b, a:b], scale_C1[a:b], group)
            if b < C:
                W_CO[b:].addmm_(Q_CC[a:b, b:].T, E_CO[a:b], alpha=-1)
        W_CO -= E_CO  # what is gone passed on itself, what is kept passed on zero
        if stop < inputs:
            W_IO[stop:].addmm_(R_II[start:stop, stop:].T, dense_CO - W_CO)
    return W_IO, keep_IO


def _groups_(
    W_CO: Tensor, E_CO: Tensor, keep_CO: Tensor, Q_CC: Tensor, scale_C1: Tensor, pattern: NM
) -> None:
    """Some groups of columns one after the other, each mask chosen when its group is reached."""
    for a in range(0, len(W_CO), pattern.m):
        b = a + pattern.m
        keep_CO[a:b] = keep_largest_columns((W_CO[a:b] / scale_C1[a:b]).abs_(), pattern.m - pattern.n)
        _columns_(W_CO[a:], E_CO[a:b], keep_CO[a:b], Q_CC[a:b, a:])


def _columns_(W_CO: Tensor, E_CO: Tensor, keep_CO: Tensor, Q_CC: Tensor) -> None:
    """As many columns as `E_CO` has, one after the other, with what they do to all of `W_CO`."""
    last = len(W_CO) - 1
    gone_CO = torch.logical_not(keep_CO, out=torch.empty_like(E_CO))  # numbers: a product of types is slower
    for j, (w, e, gone, q) in enumerate(zip(W_CO, E_CO, gone_CO, Q_CC, strict=False)):
        torch.mul(w, gone, out=e)
        if j < last:
            W_CO[j + 1 :].addr_(q[j + 1 :], e, alpha=-1)


def _due(pattern: Pattern, sparsity: float, shape: torch.Size, stop: int) -> int:
    """Entries that are gone once `stop` columns are done, so that the total of the layer is exact."""
    inputs, outputs = shape
    if isinstance(pattern, PerRow) and stop < inputs:
        # Of each row as many, such that what must still go is at least 0 and fits into what comes.
        total = count(sparsity, inputs * outputs)
        least, most = -(-total // outputs) - (inputs - stop), total // outputs
        return max(least, min(count(sparsity, stop), most)) * outputs
    return count(sparsity, stop * outputs // pattern.unit) * pattern.unit


def _fixed(pattern: NM, sparsity: float, entries: int) -> bool:
    """Whether as many go as the pattern itself removes, so that each group decides alone."""
    return count(sparsity, entries) == pattern.forced(entries)


def _multiple(block: int, pattern: Pattern) -> int:
    """The block size, rounded up to whole groups of the pattern."""
    step = pattern.m if isinstance(pattern, NM) else pattern.columns if isinstance(pattern, Block) else 1
    return -(-block // step) * step


def _eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)
