"""First-order criteria: what the loss does when a weight goes, to first order."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from secateur.stats import GradAbs, GradMean, GradSquare, RowTaylorSquare, Stats, need


@dataclass(frozen=True)
class Taylor:
    r"""First-order Taylor: :math:`s_i = \mathbb{E}_x\,|w_i\,\partial L_x / \partial w_i|`.

    The absolute value is taken for each example, inside the mean. At a minimum the mean gradient vanishes
    while the gradients of single examples do not: with the absolute value outside, the score would be noise.

    Reference: Molchanov et al. 2019, Importance estimation for neural network pruning, section 3.1; on gates,
    Michel et al. 2019, eq. 2.
    """

    needs = (GradAbs(),)
    rounds = 1

    def __call__(self, weight: Float[Tensor, "out in"], stats: Stats) -> Float[Tensor, "out in"]:
        return weight.abs() * need(stats, GradAbs(), self)


@dataclass(frozen=True)
class TaylorSquared:
    r"""Squared first-order Taylor: :math:`s_i = \mathbb{E}_x\,(w_i\,\partial L_x / \partial w_i)^2`.

    Sums over a block's entries, which gives the *independent* group form, blind to cancellation inside it.

    Reference: Molchanov et al. 2019, eq. 8.
    """

    needs = (GradSquare(),)
    rounds = 1

    def __call__(self, weight: Float[Tensor, "out in"], stats: Stats) -> Float[Tensor, "out in"]:
        return weight.float().square() * need(stats, GradSquare(), self)


@dataclass(frozen=True)
class TaylorGroup:
    r"""Squared first-order effect of a row: :math:`\mathbb{E}_x\,(\sum_j w_j\,\partial L_x/\partial w_j)^2`.

    The *joint* group form: the effect of a gate on the output before its bias, cancellation included. Every
    entry of a row gets the row's score divided by the row's length, so that a block of whole rows sums to it.

    Reference: Molchanov et al. 2019, eq. 9.
    """

    needs = (RowTaylorSquare(),)
    rounds = 1

    def __call__(self, weight: Float[Tensor, "out in"], stats: Stats) -> Float[Tensor, "out in"]:
        return (need(stats, RowTaylorSquare(), self) / weight.shape[1]).expand(weight.shape).contiguous()


@dataclass(frozen=True)
class SNIP:
    r"""Connection sensitivity: :math:`s_i = |w_i\,\partial L / \partial w_i|`, the gradient of the mean loss.

    Meant for networks at initialisation. Gradients are summed over all data first, the absolute value comes
    last; the normalisation of the paper does not change the ranking and is left out.

    Reference: Lee, Ajanthan and Torr 2019, SNIP: single-shot network pruning, eq. 4-6.
    """

    needs = (GradMean(),)
    rounds = 1

    def __call__(self, weight: Float[Tensor, "out in"], stats: Stats) -> Float[Tensor, "out in"]:
        return (weight * need(stats, GradMean(), self)).abs()
