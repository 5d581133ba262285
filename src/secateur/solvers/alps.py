"""ALPS: the mask by the alternating direction method of multipliers, then the best weights on it.

Shapes: O outputs, I inputs of a layer's matrix. A: Gram matrix scaled to a diagonal of ones. B, D: weights
times the root of its diagonal, free and sparse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.patterns import Pattern
from secateur.solvers.base import Solved
from secateur.solvers.quadratic import Quadratic
from secateur.solvers.repair import fit

_CHECK = 3  # iterations between looks at the mask
_SETTLED = 3e-4  # share of kept entries whose change ends the search, after `_AT_LEAST` iterations
_AT_LEAST = 30
_LARGEST = 1e6  # of the penalty
_SMALLEST = 1e-4  # of the first penalty, at which a mask that has never moved is taken to be settled


@dataclass(frozen=True)
class ALPS:
    r"""Weights $B$ that fit the layer's output, and sparse ones $D$, drawn together by a growing penalty.

    $$ B = (G - V + \rho D)(A + \rho I)^{-1}, \quad D = P_k(B + V / \rho), \quad V' = V + \rho (B - D) $$

    Every third iteration the penalty $\rho$ grows by how much the mask still changes. On the mask that is
    found, conjugate gradients fit the weights.

    Args:
        damping: of the Gram matrix, relative to the mean of its diagonal.
        penalty: $\rho$ at the start.
        iterations: at most so many.
        steps: of conjugate gradients on the final mask.

    Reference: Meng et al. 2024, ALPS, algorithms 1 and 2.
    """

    damping: float = 0.01
    penalty: float = 0.1
    iterations: int = 300
    steps: int = 10

    def __post_init__(self) -> None:
        if not self.penalty > 0 or self.iterations < 1:
            raise SecateurError(f"{self}: penalty is above 0 and iterations at least 1.")

    def __call__(
        self, weight: Float[Tensor, "out in"], objective: Quadratic, pattern: Pattern, sparsity: float
    ) -> Solved:
        W_OI = weight.float()
        pattern.reachable(W_OI.shape, sparsity)
        keep = self._mask(W_OI, objective, pattern, sparsity)
        solved = fit(W_OI, keep, objective, steps=self.steps) if self.steps else W_OI * keep
        return Solved(solved, keep, objective.error(solved, W_OI), tuple(objective.notes))

    def _mask(self, W_OI: Tensor, objective: Quadratic, pattern: Pattern, sparsity: float) -> Tensor:
        A, rho = objective.unit_II, self.penalty
        B0 = W_OI * objective.root_I * ~objective.dead_I
        G = B0 @ A
        keep = pattern.keep(B0.square(), sparsity)
        D, V = B0 * keep, torch.zeros_like(B0)
        inverse = _inverse(A, rho)
        before, moved = keep, False
        for i in range(1, self.iterations + 1):
            B = torch.addmm(torch.zeros_like(B0), G - V + rho * D, inverse)
            free = B + V / rho
            keep = pattern.keep(free.square(), sparsity)
            D = free * keep
            V = rho * (free - D)
            if i % _CHECK:
                continue
            changed = int((keep ^ before).count_nonzero())
            share = changed / max(1, int(keep.count_nonzero()))
            before = keep
            if changed == 0 and (moved or rho < self.penalty * _SMALLEST):
                break
            if changed == 0 or (not moved and share <= 0.005):
                # The penalty holds the mask from the first iteration on: less of it, from the start.
                rho /= 5
                D, V = B0 * pattern.keep(B0.square(), sparsity), torch.zeros_like(B0)
            else:
                moved = True
                rho = min(_LARGEST, rho * (1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1))
            if i >= _AT_LEAST and share < _SETTLED and moved:
                break
            inverse = _inverse(A, rho)
        return pattern.keep(B.square(), sparsity)


def _inverse(A_II: Tensor, rho: float) -> Tensor:
    """`(A + rho I)^-1`, in float32: the penalty bounds the condition number by `n / rho`."""
    shifted = A_II.clone()
    shifted.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))
