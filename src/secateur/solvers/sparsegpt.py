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
from secateur.core.topk import count
from secateur.patterns import NM, Block, Pattern, PerRow
from secateur.solvers.base import Solved
from secateur.solvers.quadratic import Quadratic

_INNER = 16  # columns that are updated one by one; all else are products of matrices


@dataclass(frozen=True)
class SparseGPT:
    r"""Columns from left to right: what a removed weight did, the columns after it do as well as they can.

    $$ e = w_j / U_{jj}, \qquad w_{j:} \leftarrow w_{j:} - e\,U_{j,j:}, \qquad H^{-1} = U^T U $$

    The weights that go are chosen block by block of `block` columns, when the sweep reaches them, by the
    smallest $w_j^2 / U_{jj}^2$; for `NM`, group by group. The total is exact.

    Args:
        block: columns whose mask is chosen at once. A multiple of the pattern's group is taken.
        damping: of the Gram matrix, relative to the mean of its diagonal.

    Reference: Frantar and Alistarh 2023, SparseGPT, algorithm 1. Differs from the paper: exact counts, where
    the authors' code removes one weight a block too many and all that tie.
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
        W_IO = W_OI.T.clone(memory_format=torch.contiguous_format)  # a single row would be its own transpose
        W_IO[objective.dead_I] = 0
        keep_IO = sweep_(W_IO, objective.upper_II, pattern, sparsity, self.block)
        solved = W_IO.T.contiguous()
        return Solved.of(solved, keep_IO.T.contiguous(), W_OI, objective)


def sweep_(
    W_IO: Float[Tensor, "inputs outputs"],
    U_II: Float[Tensor, "inputs inputs"],
    pattern: Pattern,
    sparsity: float,
    block: int,
) -> Bool[Tensor, "inputs outputs"]:
    """The sweep, in place; returns what is kept."""
    inputs, outputs = W_IO.shape
    by_group = isinstance(pattern, NM) and count(sparsity, W_IO.numel()) == pattern.forced(W_IO.numel())
    width = _multiple(block, pattern)
    inner = pattern.m if by_group and isinstance(pattern, NM) else _INNER
    keep_IO = torch.ones_like(W_IO, dtype=torch.bool)
    E_CO = torch.empty(min(width, inputs), outputs, dtype=W_IO.dtype, device=W_IO.device)
    gone = 0
    for start in range(0, inputs, width):
        stop = min(start + width, inputs)
        W_CO, keep_CO, E = W_IO[start:stop], keep_IO[start:stop], E_CO[: stop - start]
        U_CC = U_II[start:stop, start:stop]
        if not by_group:
            due = _due(pattern, sparsity, W_IO.shape, stop) - gone
            scores_OC = _scores(W_CO, U_CC)
            keep_CO.copy_(pattern.keep(scores_OC, due / scores_OC.numel()).T)
            gone += due
        for a in range(0, stop - start, inner):
            b = min(a + inner, stop - start)
            if by_group:
                keep_CO[a:b] = pattern.keep(_scores(W_CO[a:b], U_CC[a:b, a:b]), sparsity).T
            _columns_(W_CO[a:b], U_CC[a:b, a:b], keep_CO[a:b], E[a:b])
            if b < stop - start:
                W_CO[b:].addmm_(U_CC[a:b, b:].T, E[a:b], alpha=-1)
        if stop < inputs:
            W_IO[stop:].addmm_(U_II[start:stop, stop:].T, E, alpha=-1)
    return keep_IO


def _columns_(W_CO: Tensor, U_CC: Tensor, keep_CO: Tensor, E_CO: Tensor) -> None:
    """A few columns one after the other; `E_CO` takes what each passes on."""
    gone_CO = ~keep_CO
    for j in range(len(W_CO)):
        torch.mul(W_CO[j], gone_CO[j], out=E_CO[j])
        E_CO[j] /= U_CC[j, j]
        if j + 1 < len(W_CO):
            W_CO[j + 1 :].addr_(U_CC[j, j + 1 :], E_CO[j], alpha=-1)
    W_CO.masked_fill_(gone_CO, 0)


def _scores(W_CO: Tensor, U_CC: Tensor) -> Tensor:
    return (W_CO / U_CC.diagonal()[:, None]).square().T


def _due(pattern: Pattern, sparsity: float, shape: torch.Size, stop: int) -> int:
    """Entries that are gone once `stop` columns are done, so that the total of the layer is exact."""
    inputs, outputs = shape
    if isinstance(pattern, PerRow) and stop < inputs:
        # Of each row as many, such that what must still go is at least 0 and fits into what comes.
        total = count(sparsity, inputs * outputs)
        least, most = -(-total // outputs) - (inputs - stop), total // outputs
        return max(least, min(count(sparsity, stop), most)) * outputs
    return count(sparsity, stop * outputs // pattern.unit) * pattern.unit


def _multiple(block: int, pattern: Pattern) -> int:
    """The block size, rounded up to whole groups of the pattern."""
    step = pattern.m if isinstance(pattern, NM) else pattern.columns if isinstance(pattern, Block) else 1
    return -(-block // step) * step
