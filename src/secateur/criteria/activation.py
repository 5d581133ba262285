"""Criteria that weigh a weight by the traffic through it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.stats import InputNorm, Stats, need


@dataclass(frozen=True)
class Wanda:
    r"""Weight magnitude times input norm: :math:`s_{ij} = |W_{ij}| \cdot \lVert X_{\cdot j} \rVert_2`.

    Pair it with the pattern `PerRow`, as the paper does for language models: within a row the scores estimate
    the change of one output, between rows they need not compare.

    Reference: Sun et al. 2023, A simple and effective pruning approach for large language models, eq. 1.

    >>> Wanda()(torch.tensor([[3.0, 1.0]]), {InputNorm(): torch.tensor([[1.0, 4.0]])})
    tensor([[3., 4.]])
    """

    needs = (InputNorm(),)
    rounds = 1

    def __call__(self, weight: Float[Tensor, "out in"], stats: Stats) -> Float[Tensor, "out in"]:
        return weight.abs() * need(stats, InputNorm(), self)


@dataclass(frozen=True)
class RIA:
    r"""Relative importance and activations, the norm of the input to the power a times the weight's shares.

    :math:`s_{ij} = (|W_{ij}|/\sum_k|W_{kj}| + |W_{ij}|/\sum_k|W_{ik}|)\,\lVert X_{\cdot j}\rVert_2^a`.
    The share of a weight in its input's and in its output's total keeps whole channels from vanishing. (In a
    grouped convolution a column holds one input of each group, and the share is taken over all of them.)

    Args:
        power: a, the exponent of the input norm.

    Reference: Zhang et al. 2024, Plug-and-play: an efficient post-training pruning method for large language
    models, eq. 3-4.
    """

    power: float = 0.5
    needs = (InputNorm(),)
    rounds = 1

    def __post_init__(self) -> None:
        if not self.power >= 0:
            raise SecateurError(f"RIA(power=...) is not negative; got {self.power}.")

    def __call__(self, weight: Float[Tensor, "out in"], stats: Stats) -> Float[Tensor, "out in"]:
        size = weight.abs().float()
        # An all-zero row or column has no shares to give: its entries score 0.
        column = size.sum(dim=0, keepdim=True).clamp(min=1e-38)
        row = size.sum(dim=1, keepdim=True).clamp(min=1e-38)
        return (size / column + size / row) * need(stats, InputNorm(), self) ** self.power
