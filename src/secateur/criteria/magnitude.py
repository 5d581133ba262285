"""Criteria on the weights alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.stats import NameSeed, Stats, need


@dataclass(frozen=True)
class Magnitude:
    r"""Absolute weight to the power `norm`: :math:`s_{ij} = |W_{ij}|^p`.

    Entries rank alike for L1 (`norm=1`) and L2 (`norm=2`); blocks, which score the sum over their entries,
    rank by their L1 norm or their squared L2 norm.

    Reference: Han et al. 2015, Learning both weights and connections for efficient neural networks.

    >>> Magnitude()(torch.tensor([[3.0, -4.0]]), {})
    tensor([[3., 4.]])
    """

    norm: int = 1
    needs = ()
    rounds = 1

    def __post_init__(self) -> None:
        if self.norm not in (1, 2):
            raise SecateurError(f"Magnitude(norm=...) is 1 or 2; got {self.norm}.")

    def __call__(self, weight: Float[Tensor, "out in"], stats: Stats) -> Float[Tensor, "out in"]:
        size = weight.abs().float()
        return size if self.norm == 1 else size.square_()


@dataclass(frozen=True)
class Random:
    """Uniform noise: the baseline that every criterion must beat.

    The same seed gives the same scores for a layer of the same name, whatever else is pruned.
    """

    seed: int = 0
    needs = (NameSeed(),)
    rounds = 1

    def __call__(self, weight: Float[Tensor, "out in"], stats: Stats) -> Float[Tensor, "out in"]:
        name_seed = int(need(stats, NameSeed(), self))
        generator = torch.Generator().manual_seed((name_seed ^ self.seed * 0x9E3779B97F4A7C15) & (2**63 - 1))
        return torch.rand(weight.shape, generator=generator).to(weight.device)
