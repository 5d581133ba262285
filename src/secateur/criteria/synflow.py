"""Synaptic flow: pruning without data."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.stats import Stats, SynapticFlow, need


@dataclass(frozen=True)
class SynFlow:
    r"""Synaptic flow: :math:`s_i = |w_i|\,\partial R / \partial |w_i|`, needing no data but an input's shape.

    Scored and pruned in `rounds` steps, density falling as :math:`d^{k/n}`, because a single shot can empty a
    layer. Pair it with `allocation=global_`, as the paper does.

    Differs from the authors' code: biases are left out of the flow and the statistics of batch normalisation
    are neutral, so that each layer's scores sum to the same number (conservation, theorem 1).

    Args:
        rounds: n; the paper's is 100.

    Reference: Tanaka et al. 2020, Pruning neural networks without any data by iteratively conserving synaptic
    flow, algorithm 1.
    """

    rounds: int = 100
    needs = (SynapticFlow(),)

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise SecateurError(f"SynFlow(rounds=...) is at least 1; got {self.rounds}.")

    def __call__(self, weight: Float[Tensor, "out in"], stats: Stats) -> Float[Tensor, "out in"]:
        return weight.abs().double() * need(stats, SynapticFlow(), self)
