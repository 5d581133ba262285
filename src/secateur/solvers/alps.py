"""ALPS: the mask by the alternating direction method of multipliers, then the best weights on it.

Shapes: O outputs, I inputs of a layer's matrix. A: Gram matrix scaled to a diagonal of ones. B, D: weights
times the root of its diagonal, free and sparse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.bulk import zero_
from secateur.core.errors import SecateurError
from secateur.patterns import Pattern
from secateur.solvers.base import Solved
from secateur.solvers.products import Rough
from secateur.solvers.quadratic import Quadratic
from secateur.solvers.repair import descend

_HELD = 4  # iterations with one penalty, and one factorisation


@dataclass(frozen=True)
class ALPS:
    r"""Weights $B$ that fit the layer's output, and sparse ones $D$, drawn together by a growing penalty.

    $$ B = B_0 + (D - B_0 - U)\, \rho (A + \rho I)^{-1}, \quad D' = P_k(\hat B + U), \quad
       U' = U + \hat B - D', \quad \hat B = \alpha B + (1 - \alpha) D $$

    with the dense $B_0$ and $P_k$ the projection on the pattern. On the mask that is found, conjugate
    gradients fit the weights. What is multiplied are distances from the dense weights, for which bfloat16 is
    enough: it is used where the processor has it, and changes the error by less than 0.1 %.

    Args:
        damping: of the Gram matrix, relative to the mean of its diagonal.
        penalty: $\rho$ at the start, of the order of the diagonal, which is one.
        growth: factor of the penalty after every fourth iteration.
        relaxation: $\alpha$, in [1, 2).
        iterations: of the search for the mask.
        steps: of conjugate gradients on it.

    Reference: Meng et al. 2024, ALPS, algorithms 1 and 2; over-relaxation as in Boyd et al. 2011, Distributed
    optimization and statistical learning via the alternating direction method of multipliers, section 3.4.3.
    Differs from the paper: over-relaxed, with a larger first penalty that grows at a fixed rate, which comes
    within 4 % of the paper's error in 12 iterations instead of 50 to 100; the penalty's inverse comes from a
    Cholesky factor, not from eigenvectors.
    """

    damping: float = 0.01
    penalty: float = 0.28
    growth: float = 1.5
    relaxation: float = 1.3
    iterations: int = 12
    steps: int = 5

    def __post_init__(self) -> None:
        if not (self.penalty > 0 and self.growth >= 1 and 1 <= self.relaxation < 2 and self.iterations > 0):
            raise SecateurError(
                f"{self}: the penalty is above 0, growth and iterations at least 1, relaxation in [1, 2)."
            )

    def __call__(
        self, weight: Float[Tensor, "out in"], objective: Quadratic, pattern: Pattern, sparsity: float
    ) -> Solved:
        W_OI = weight.float()
        pattern.reachable(W_OI.shape, sparsity)
        B = self._search(W_OI, objective, pattern, sparsity)
        keep = pattern.keep(B.abs(), sparsity)
        solved = descend(W_OI, keep, objective, B / objective.root_I, self.steps, Rough(objective.unit_II))
        return Solved.of(solved, keep, W_OI, objective)

    def _search(self, W_OI: Tensor, objective: Quadratic, pattern: Pattern, sparsity: float) -> Tensor:
        """The free weights of the last iteration, scaled, whose largest are kept."""
        rho = self.penalty
        B0 = W_OI * objective.root_I * ~objective.dead_I
        D, U = B0 * pattern.keep(B0.abs(), sparsity), torch.zeros_like(B0)
        for i in range(self.iterations):
            if i and i % _HELD == 0:
                rho *= self.growth
                U /= self.growth  # the multipliers, over the penalty
            if i % _HELD == 0:
                solve = Rough(_inverse(objective.unit_II, rho).mul_(rho))
            B = solve((D - B0).sub_(U)).add_(B0)
            U.add_(torch.lerp(D, B, self.relaxation))
            D = U.clone()
            zero_(D, pattern.keep(U.abs(), sparsity))
            U -= D
        return B


def _inverse(A_II: Tensor, rho: float) -> Tensor:
    """`(A + rho I)^-1`, in float32: the penalty bounds the condition number by `n / rho`."""
    shifted = A_II.clone()
    shifted.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))
