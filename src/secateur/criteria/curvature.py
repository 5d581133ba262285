"""Second-order criteria."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.stats import ExactDiagonal, GradSquare, HessianGradient, HutchinsonDiagonal, Stat, Stats, need


@dataclass(frozen=True)
class OBD:
    r"""Optimal Brain Damage: :math:`s_i = \tfrac12 h_{ii} w_i^2`, the loss increase at a minimum.

    Three estimators of the diagonal: `GradSquare()`, the empirical Fisher from gradients of single examples
    (the default); `HutchinsonDiagonal(probes)`, unbiased for the true Hessian; `ExactDiagonal()`, for small
    models and tests. Negative curvature, which the derivation excludes, counts as 0.

    Reference: LeCun, Denker and Solla 1990, Optimal brain damage, eq. 5.
    """

    diagonal: GradSquare | HutchinsonDiagonal | ExactDiagonal = GradSquare()
    rounds = 1

    @property
    def needs(self) -> tuple[Stat, ...]:
        return (self.diagonal,)

    def __call__(self, weight: Float[Tensor, "out in"], stats: Stats) -> Float[Tensor, "out in"]:
        return need(stats, self.diagonal, self).clamp(min=0) * weight.float().square() / 2


@dataclass(frozen=True)
class GraSP:
    r"""Gradient signal preservation: keep the weights whose removal would reduce the gradient norm.

    Wang et al. score :math:`-\theta \odot Hg` and remove the *largest*; here larger means keep, so
    :math:`s = \theta \odot Hg`. Meant for networks at initialisation. The logits are divided by
    `temperature`, which the model's output must allow (one tensor of logits).

    Reference: Wang, Zhang and Grosse 2020, Picking winning tickets before training by preserving gradient
    flow, eq. 8.
    """

    temperature: float = 200.0
    rounds = 1

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise SecateurError(f"GraSP(temperature=...) is positive; got {self.temperature}.")

    @property
    def needs(self) -> tuple[Stat, ...]:
        return (HessianGradient(self.temperature),)

    def __call__(self, weight: Float[Tensor, "out in"], stats: Stats) -> Float[Tensor, "out in"]:
        return weight * need(stats, HessianGradient(self.temperature), self)
