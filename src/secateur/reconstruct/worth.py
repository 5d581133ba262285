"""Whether repair is worth it, judged by what the whole model does.

Least squares bring the output of each layer nearer to the dense one's, and mostly that of the model too. Not
always: units may carry much of a layer's output and little of what matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.collect import Loss
from secateur.collect.batches import Batch, Batches, mean_loss
from secateur.core.modes import evaluation
from secateur.graph import oracle
from secateur.surgery import Plan

_ENTRIES = 1 << 26  # of the dense model's outputs that are kept for comparison


class Judge:
    """Compares smaller models with the dense one on batches: by the loss, or by the distance of outputs.

    Made before anything is removed. The loss is the one that was passed, or the model's own; without one, it
    is the squared difference of the outputs over the square of the dense ones, on the first batches, as many
    as fit into 256 MiB.
    """

    def __init__(self, dense: nn.Module, data: Batches, loss: Loss | None) -> None:
        self._data, self._loss = data, loss
        with evaluation(dense), torch.no_grad():
            self.by_loss = loss is not None or _has_loss(next(iter(data)).forward(dense))
        # With their batches: a loader may shuffle.
        self._outputs = [] if self.by_loss else list(_some(dense, data))

    @property
    def what(self) -> str:
        """What is compared; less is better."""
        return "loss" if self.by_loss else "squared error of the output"

    def __call__(self, model: nn.Module) -> float:
        """The measure on a model."""
        with evaluation(model), torch.no_grad():
            if self.by_loss:
                found = [(b.size, float(mean_loss(b.forward(model), b, self._loss))) for b in self._data]
                return sum(n * x for n, x in found) / sum(n for n, _ in found)
            lost = whole = 0.0
            for batch, dense in self._outputs:
                for y, d in zip(_outputs(model, batch), dense, strict=True):
                    lost += float((y - d).square().sum(dtype=torch.float64))
                    whole += float(d.square().sum(dtype=torch.float64))
            return lost / whole if whole else lost


@dataclass(frozen=True)
class Gain:
    """What repair did to the whole model, on the calibration batches.

    Attributes:
        what: the measure, of which less is better.
        plain: with the weights that stay as they were, batch normalisation measured anew.
        repaired: with repaired weights.
    """

    what: str
    plain: float
    repaired: float

    @property
    def kept(self) -> bool:
        """Whether the repaired weights are the better ones."""
        return self.repaired <= self.plain or math.isnan(self.plain)

    def __str__(self) -> str:
        return f"{self.what} {self.plain:.4g} with plain removal, {self.repaired:.4g} with repaired weights"


def plain_values(plan: Plan, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is left of tensors that had the values `before` the surgery."""
    values = {}
    for name, value in before.items():
        for dim in range(value.dim()):
            keep = plan.keep(name, dim).to(value.device)
            value = value.index_select(dim, keep.nonzero().flatten())
        values[name] = value
    return values


@torch.no_grad()
def put(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write values into parameters, in place; returns those that they had."""
    had = {}
    for name, value in values.items():
        parameter = model.get_parameter(name)
        had[name] = parameter.detach().clone()
        parameter.copy_(value)
    return had


def _some(dense: nn.Module, data: Batches) -> Iterator[tuple[Batch, Sequence[Tensor]]]:
    """Batches with the dense model's outputs, the first in any case."""
    left = _ENTRIES
    for batch in data:
        found = _outputs(dense, batch)
        if left < _ENTRIES and sum(t.numel() for t in found) > left:
            return
        left -= sum(t.numel() for t in found)
        yield batch, found


def _outputs(model: nn.Module, batch: Batch) -> Sequence[Tensor]:
    return oracle.outputs(model, (batch.args, batch.kwargs))


def _has_loss(output: object) -> bool:
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return isinstance(own, Tensor) and own.numel() == 1
