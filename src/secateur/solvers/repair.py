"""The best weights on a given mask, by conjugate gradients for all rows at once.

Shapes: O outputs, I inputs of a layer's matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.bulk import zero_
from secateur.core.errors import MaskError, SecateurError
from secateur.solvers.quadratic import Quadratic


def fit(
    weight: Float[Tensor, "out in"],
    keep: Bool[Tensor, "out in"],
    objective: Quadratic,
    start: Float[Tensor, "out in"] | None = None,
    steps: int = 10,
) -> Float[Tensor, "out in"]:
    r"""Weights that are zero outside `keep` and minimise the layer's error, whatever chose the mask.

    $$ \min_V \mathrm{tr}\,(V - W_0) H (V - W_0)^T \quad \text{with } V = V \odot M $$

    Conjugate gradients with the diagonal of $H$ as preconditioner; residual and direction are masked, so each
    row solves its own system, and one product of matrices serves all rows.

    Args:
        weight: $W_0$, of the dense layer.
        keep: the mask.
        objective: of the layer's inputs.
        start: weights to begin with, those of the dense layer on the mask if None.
        steps: of conjugate gradients.

    Returns:
        float32 weights. Not worse than `start`, up to rounding.

    Raises:
        MaskError: shapes that do not fit. SecateurError: negative steps.

    Reference: Meng et al. 2024, ALPS, algorithm 2.
    """
    if weight.shape != keep.shape or weight.shape[1] != objective.inputs:
        raise MaskError(
            f"A weight of {tuple(weight.shape)}, a mask of {tuple(keep.shape)} and a Gram matrix of "
            f"{objective.inputs} inputs do not fit together."
        )
    if steps < 0:
        raise SecateurError(f"steps=... is at least 0; got {steps}.")
    first = weight if start is None else start
    return descend(weight, keep, objective, first, steps, lambda P: P @ objective.unit_II)


def descend(
    weight: Tensor,
    keep: Tensor,
    objective: Quadratic,
    start: Tensor,
    steps: int,
    times_H: Callable[[Tensor], Tensor],
) -> Tensor:
    """Steps of conjugate gradients from `start`, `times_H` doing the products with the scaled H.

    That of the first residual is exact, so rough ones still lead towards the minimum of the right objective.
    """
    W0, scale_I = weight.float(), objective.root_I
    V = start * scale_I
    zero_(V, keep)
    R = (W0 * scale_I - V) @ objective.unit_II
    zero_(R, keep)
    P = R.clone()
    rr = R.square().sum(1, keepdim=True)
    for _ in range(steps):
        Q = times_H(P)
        zero_(Q, keep)
        alpha = _ratio(rr, (P * Q).sum(1, keepdim=True))
        V.addcmul_(alpha, P)
        R.addcmul_(alpha, Q, value=-1)
        new = R.square().sum(1, keepdim=True)
        P.mul_(_ratio(new, rr)).add_(R)
        rr = new
    return V / scale_I


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, zero where a row has converged and both vanish."""
    return torch.where(b > 0, a / b, torch.zeros_like(a))
