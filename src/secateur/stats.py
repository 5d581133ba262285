"""What can be measured of a layer: frozen descriptions, used as keys, and running sums that merge.

A *stat* says how one batch is reduced to a sum; sums over batches, blocks of examples and ranks are added
(`Running.merge`), so a result does not depend on how the data is batched. Values come in the shape of the
layer's matrix `[out, in]`, or broadcast to it.

Four kinds, told apart by their base class:

- `ActivationStat`: from a layer's inputs; a forward pass is enough.
- `ExampleStat`: from the gradients of single examples, with the absolute value or the square *inside* the
  mean over examples. (Outside, it is another quantity, and one that shrinks with the batch size.)
- `LossStat`: from the gradient or curvature of the mean loss over all data, in passes of its own.
- `NameStat`: from the layer's name alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.errors import StatsError


class ActivationStat:
    """Reduces a layer's inputs."""

    def reduce(self, inputs: Float[Tensor, "groups tokens in"]) -> Float[Tensor, "groups in"]:
        """Sum over the tokens of a batch (kernel positions, for a convolution)."""
        raise NotImplementedError

    def value(self, running: Running) -> Tensor:
        """The statistic, from the sum over all batches."""
        raise NotImplementedError


class ExampleStat:
    """Reduces the gradients of single examples; its value is the mean over examples."""

    def reduce(
        self, weight: Float[Tensor, "out in"], gradients: Float[Tensor, "examples out in"]
    ) -> Float[Tensor, "out _"]:
        """Sum over the examples of a batch."""
        raise NotImplementedError


class LossStat:
    """Measured on the mean loss over all data, or on the whole network, in passes of its own."""


class NameStat:
    """Follows from the layer's name alone; needs no data."""


@dataclass(frozen=True)
class InputNorm(ActivationStat):
    """Euclidean norm of each input over all tokens, `||X_j||_2`. Value `[1, in]`, or `[out, in]` if grouped.

    The tokens are those of all calls of the layer's module; convolutions count each kernel position, padding
    included.
    """

    def reduce(self, inputs: Float[Tensor, "groups tokens in"]) -> Float[Tensor, "groups in"]:
        return inputs.double().square().sum(dim=1)

    def value(self, running: Running) -> Tensor:
        return running.total.sqrt().float()


@dataclass(frozen=True)
class GradAbs(ExampleStat):
    """Mean absolute gradient over examples, `E_x |dL_x/dw|`. Value `[out, in]`."""

    def reduce(
        self, weight: Float[Tensor, "out in"], gradients: Float[Tensor, "examples out in"]
    ) -> Float[Tensor, "out _"]:
        return gradients.abs().sum(dim=0)


@dataclass(frozen=True)
class GradSquare(ExampleStat):
    """Mean squared gradient over examples, `E_x (dL_x/dw)^2`: the diagonal of the empirical Fisher matrix."""

    def reduce(
        self, weight: Float[Tensor, "out in"], gradients: Float[Tensor, "examples out in"]
    ) -> Float[Tensor, "out _"]:
        return gradients.square().sum(dim=0)


@dataclass(frozen=True)
class RowTaylorSquare(ExampleStat):
    """Squared first-order effect of removing a whole row, `E_x (sum_j w_j dL_x/dw_j)^2`. Value `[out, 1]`."""

    def reduce(
        self, weight: Float[Tensor, "out in"], gradients: Float[Tensor, "examples out in"]
    ) -> Float[Tensor, "out _"]:
        return (gradients * weight).sum(dim=2).square().sum(dim=0)[:, None]


@dataclass(frozen=True)
class GradMean(LossStat):
    """Gradient of the mean loss over all examples, `dL/dw`. Value `[out, in]`."""


@dataclass(frozen=True)
class ExactDiagonal(LossStat):
    """Diagonal of the Hessian of the mean loss: one backward pass a weight, so for small models only.

    Args:
        limit: refuse more weights than this.
    """

    limit: int = 20_000


@dataclass(frozen=True)
class HutchinsonDiagonal(LossStat):
    """Unbiased estimate of the Hessian's diagonal, the mean of `v * (H v)` over Rademacher vectors `v`.

    The variance of one probe is `sum_{j != i} H_ij^2`; values may be negative.

    Args:
        probes: random vectors.
        seed: of their generator.

    Reference: Bekas, Kokiopoulou and Saad 2007, An estimator for the diagonal of a matrix.
    """

    probes: int = 32
    seed: int = 0


@dataclass(frozen=True)
class HessianGradient(LossStat):
    """Hessian times gradient, `H g`, of the mean loss with the logits divided by `temperature`.

    Both are taken for the selected weights: what is not selected is a constant.

    Reference: Wang, Zhang and Grosse 2020, Picking winning tickets before training by preserving gradient
    flow.
    """

    temperature: float = 200.0


@dataclass(frozen=True)
class SynapticFlow(LossStat):
    """`dR/d|w|` of the data-free flow `R = sum of outputs` on an all-ones input, every weight being `|w|`.

    Float64; biases 0 and statistics of batch normalisation at mean 0, variance 1, so that the flow is
    conserved from layer to layer. Layers that normalise by the data at hand are refused. The first batch only
    tells the input's shape.

    Reference: Tanaka et al. 2020, Pruning neural networks without any data by iteratively conserving synaptic
    flow.
    """


@dataclass(frozen=True)
class NameSeed(NameStat):
    """An integer that differs from layer to layer, for reproducible randomness. Value: a scalar int64."""


Stat = ActivationStat | ExampleStat | LossStat | NameStat
Stats = Mapping[Stat, Tensor]


@dataclass
class Running:
    """A sum over examples or tokens and how many went in; sums merge by addition."""

    total: Tensor
    count: int = 0

    def add(self, part: Tensor, count: int) -> None:
        """Add the sum over `count` more examples."""
        self.total += part.to(self.total)
        self.count += count

    def merge(self, other: Running) -> None:
        """Add another running sum, from other batches or another rank."""
        self.add(other.total, other.count)

    def mean(self) -> Tensor:
        """Sum over count."""
        if self.count == 0:
            raise StatsError("A statistic was read before anything was measured.")
        return self.total / self.count

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that restore this sum."""
        return {"total": self.total, "count": torch.tensor(self.count)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Running:
        """Inverse of `state_dict`."""
        return cls(state["total"].clone(), int(state["count"]))


def need(stats: Stats, stat: Stat, who: object) -> Tensor:
    """The value of `stat`, or `StatsError` saying which criterion misses what."""
    try:
        return stats[stat]
    except KeyError:
        raise StatsError(
            f"{who} needs {stat}, which was not collected: pass batches= (and loss=), or collect it first."
        ) from None
