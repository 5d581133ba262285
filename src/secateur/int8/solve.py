"""Quantisation as part of a solver: what rounding does to a layer's output is made up for.

Shapes: O outputs, I inputs of a layer's matrix, C columns of a block. In the sweep weights lie transposed,
`W_IO`, so that a column of the layer's matrix is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.errors import MaskError
from secateur.int8.grid import Grid, precision
from secateur.patterns import Pattern
from secateur.solvers import Quadratic, Solved, Solver

_BLOCK = 64  # columns that are updated one by one; all else are products of matrices


@dataclass(frozen=True)
class Quantized:
    """Prune by a solver, then put what survives on a grid, in one visit to each layer.

    The order matters: the solver sees the weights as they were, the scale comes from the survivors alone, and
    what rounding does to the layer's output is made up for as a removal is, see `quantized`. In `prune_` each
    layer is fitted to what the pruned and quantised layers before it pass on.

    Args:
        solver: chooses the mask and fits the weights on it: `SparseGPT()`, `ALPS()`, `Select(Wanda())`.
        bits: of a weight with its sign, from 2 to 8.
        group: inputs that share a scale; a whole row if None.
        dtype: in which the weights will be stored; if None, the narrowest that holds the dense ones. See
            `quantized`.

    Raises `SecateurError` for bits or a group that cannot be.

    Reference: Frantar and Alistarh 2023, SparseGPT, section 3.5. Differs from the paper: the mask is chosen
    and its weights are fitted before anything is rounded, so that any solver will do. With one mask and the
    same scales, both give the same weights.
    """

    solver: Solver
    bits: int = 8
    group: int | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        Grid(self.bits, self.group)

    @property
    def damping(self) -> float:
        """That of the solver."""
        return self.solver.damping

    def __call__(
        self, weight: Float[Tensor, "out in"], objective: Quadratic, pattern: Pattern, sparsity: float
    ) -> Solved:
        solved = self.solver(weight, objective, pattern, sparsity)
        dtype = self.dtype or precision(weight)
        W_OI = quantized(solved.weight, solved.keep, objective, self.bits, self.group, dtype)
        return Solved.of(W_OI, solved.keep, weight.float(), objective)


@dataclass(frozen=True)
class AsPruned:
    """The solver that removes what is zero already and leaves the rest as it is, whatever it is asked."""

    damping: float = 0.01

    def __call__(
        self, weight: Float[Tensor, "out in"], objective: Quadratic, pattern: Pattern, sparsity: float
    ) -> Solved:
        return Solved.of(weight.float(), weight != 0, weight.float(), objective)


def quantized(
    weight: Float[Tensor, "out in"],
    keep: Bool[Tensor, "out in"],
    objective: Quadratic,
    bits: int = 8,
    group: int | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "out in"]:
    r"""Survivors rounded to a grid from left to right; what rounding does, the columns after it make up for.

    $$ q_j = s\,\mathrm{round}(w_j / s) \text{ where kept, else } 0, \quad
    e = (w_j - q_j) / U_{jj}, \quad w_{j:} \leftarrow w_{j:} - e\,U_{j,j:}, \quad H^{-1} = U^T U $$

    Levels go from $-(2^{b-1} - 1)$ to $2^{b-1} - 1$; a weight that the updates carry beyond becomes the last.
    The scale $s$ of a row, or of a group when the sweep reaches it, is the smallest that takes in the largest
    survivor, rounded up to the significant bits that `dtype` has beside those of a level, so that every point
    is a number of that type. With levels of 8 bits these are 17 in float32, 4 in float16, and 1 in bfloat16,
    a power of two; with levels of 4 bits they are 5 in bfloat16.

    Args:
        weight: fitted to the mask; or dense, and the removal is made up for in the same sweep.
        keep: the mask.
        objective: of the layer's inputs.
        bits: of a level with its sign, from 2 to 8.
        group: inputs that share a scale; a whole row if None.
        dtype: in which the weights will be stored; if None, the narrowest that holds those given.

    Returns:
        float32 weights, zero outside `keep`, whole multiples of their scales: see `scales_of`.

    Raises:
        MaskError: shapes that do not fit. NonFiniteError: NaN or infinite weights.
        SecateurError: bits or a group that cannot be.

    References: Frantar et al. 2023, GPTQ, algorithm 1; Frantar and Alistarh 2023, SparseGPT, section 3.5.
    """
    grid = Grid(bits, group)
    if weight.shape != keep.shape or weight.shape[1] != objective.inputs:
        raise MaskError(
            f"A weight of {tuple(weight.shape)}, a mask of {tuple(keep.shape)} and a Gram matrix of "
            f"{objective.inputs} inputs do not fit together."
        )
    grid.check(weight)
    W_IO = weight.float().T.clone(memory_format=torch.contiguous_format)
    _sweep_(W_IO, keep.T.contiguous(), objective.upper_II, grid, dtype or precision(weight))
    return W_IO.T.contiguous()


def _sweep_(W_IO: Tensor, keep_IO: Tensor, U_II: Tensor, grid: Grid, dtype: torch.dtype) -> None:
    inputs, outputs = W_IO.shape
    group = grid.group or inputs
    width = group * max(1, _BLOCK // group) if grid.group else _BLOCK
    E_CO = torch.empty(min(width, inputs), outputs, dtype=W_IO.dtype, device=W_IO.device)
    for start in range(0, inputs, width):
        stop = min(start + width, inputs)
        U_CC, E = U_II[start:stop, start:stop], E_CO[: stop - start]
        for j in range(start, stop):
            if j % group == 0:
                survivors = W_IO[j : j + group] * keep_IO[j : j + group]
                scale_O = grid.scale(survivors.abs().amax(0), dtype)
            _column_(W_IO[j:stop], U_CC[j - start, j - start :], keep_IO[j], E[j - start], grid, scale_O)
        if stop < inputs:
            W_IO[stop:].addmm_(U_II[start:stop, stop:].T, E, alpha=-1)


def _column_(W_CO: Tensor, u_C: Tensor, keep_O: Tensor, e_O: Tensor, grid: Grid, scale_O: Tensor) -> None:
    """Rounds the first column and updates the others; `e_O` takes what it passes on."""
    q_O = grid.nearest(W_CO[0], scale_O) * keep_O
    torch.sub(W_CO[0], q_O, out=e_O)
    e_O /= u_C[0]
    W_CO[0] = q_O
    if len(W_CO) > 1:
        W_CO[1:].addr_(u_C[1:], e_O, alpha=-1)
