"""A criterion as a solver: its mask, and then the best weights on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.errors import SecateurError, StatsError
from secateur.criteria import Criterion
from secateur.patterns import Pattern
from secateur.solvers.base import Solved
from secateur.solvers.quadratic import Quadratic
from secateur.solvers.repair import fit
from secateur.stats import InputNorm


@dataclass(frozen=True)
class Select:
    """The mask that a criterion gives, with the weights fitted to it.

    Args:
        criterion: one on weights alone, or on the norms of inputs: `Magnitude`, `Wanda`, `RIA`, `Random`.
        steps: of conjugate gradients on the mask; 0 leaves the weights as they are.
        damping: of the Gram matrix, relative to the mean of its diagonal.

    Reference: for the fit, Meng et al. 2024, ALPS, algorithm 2, which serves any mask.
    """

    criterion: Criterion
    steps: int = 10
    damping: float = 0.01

    def __post_init__(self) -> None:
        if missing := [s for s in self.criterion.needs if not isinstance(s, InputNorm)]:
            raise StatsError(
                f"Select measures the inputs of layers alone, but {self.criterion} needs {missing[0]}: "
                "pass the criterion to prune_ itself."
            )
        if self.steps < 0:
            raise SecateurError(f"Select(steps=...) is at least 0; got {self.steps}.")

    def __call__(
        self, weight: Float[Tensor, "out in"], objective: Quadratic, pattern: Pattern, sparsity: float
    ) -> Solved:
        W_OI = weight.float()
        stats = dict.fromkeys(self.criterion.needs, objective.norms_I[None, :])
        scores = self.criterion(W_OI, stats).masked_fill(objective.dead_I, -torch.inf)
        keep = pattern.keep(scores, sparsity)
        solved = fit(W_OI, keep, objective, steps=self.steps) if self.steps else W_OI * keep
        return Solved.of(solved, keep, W_OI, objective)
