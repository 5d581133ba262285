"""The Fisher matrices of all layers of a model, from one gradient for each batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from secateur.collect import Loss
from secateur.collect.batches import Batches, gradient, mean_loss
from secateur.collect.run import differentiable, same_randomness
from secateur.core.errors import NonFiniteError, StatsError
from secateur.core.modes import evaluation
from secateur.core.names import Target
from secateur.fisher.inverse import InverseFisher
from secateur.patterns import Block, Pattern
from secateur.progress import track


@dataclass
class Estimate:
    """Measures the Fisher matrices on the weights as they are, each time that it is called.

    Attributes:
        asked: gradients to take; None: one for every batch.
        gradients: that the last call took.
        raised: blocks of each layer whose damping had to be raised, and the most that it was raised to.
        idle: layers whose gradients were all zero.
    """

    model: nn.Module
    targets: Sequence[Target]
    data: Batches
    loss: Loss | None
    block: int
    damping: float
    asked: int | None
    pattern: Pattern
    gradients: int = 0
    raised: dict[str, tuple[int, float]] = field(default_factory=dict)
    idle: dict[str, None] = field(default_factory=dict)

    def __call__(self, what: str) -> dict[str, InverseFisher]:
        unit = unit_of(self.pattern)
        block = -(-self.block // unit) * unit
        out = {t.name: InverseFisher(t.weight.numel(), block, t.weight.device) for t in self.targets}
        self._fill(out, what)
        for t in self.targets:
            try:
                found = out[t.name].settle(self.damping)
            except NonFiniteError as error:
                raise NonFiniteError(f"{t.name}: {error}") from None
            if found[0]:
                self.raised[t.name] = max(found, self.raised.get(t.name, found))
            if out[t.name].idle and bool(t.weight.any()):
                self.idle[t.name] = None
        return out

    def notes(self) -> tuple[str, ...]:
        """What a reader of the result must know."""
        notes = [f"All gradients of {name} are 0: only size tells its weights apart." for name in self.idle]
        if self.raised:
            blocks = sum(n for n, _ in self.raised.values())
            most = max(damping for _, damping in self.raised.values())
            more = f" and {len(self.raised) - 1} more" if len(self.raised) > 1 else ""
            notes.append(
                f"{next(iter(self.raised))}{more}: damping raised from {self.damping:g} to up to {most:g} "
                f"in {blocks} blocks, since float32 cannot tell less from zero beside their gradients."
            )
        return tuple(notes)

    def _fill(self, out: Mapping[str, InverseFisher], what: str) -> None:
        """Run the batches, and add the gradient of each."""
        weights = [t.weight for t in self.targets]
        gone = [t.matrix == 0 for t in self.targets]
        chosen = self.data if self.asked is None else islice(self.data, self.asked)
        seen = 0
        with evaluation(self.model), same_randomness(self.targets), differentiable(self.model):
            for batch in track(chosen, what, self.asked):
                value = mean_loss(batch.forward(self.model), batch, self.loss)
                seen += 1
                for t, zero, g in zip(self.targets, gone, gradient(value, weights), strict=True):
                    if not bool(torch.isfinite(g).all()):
                        raise NonFiniteError(
                            f"The gradient of {t.name} on batch {seen} is NaN or infinite: look for NaN or "
                            "overflow in the data or the loss."
                        )
                    # A weight that is gone must not be coupled with those that stay, nor come back.
                    out[t.name].add(flat(self.pattern, t.layout.matrix(g).masked_fill(zero, 0)))
        if self.asked is not None and seen < self.asked:
            raise StatsError(
                f"{self.asked} gradients were asked for, each of one batch, but there are {seen} batches: "
                "pass more, or smaller ones."
            )
        self.gradients = seen


def unit_of(pattern: Pattern) -> int:
    """Entries that are scored together."""
    return pattern.unit if isinstance(pattern, Block) else 1


def flat(pattern: Pattern, matrix: Shaped[Tensor, "out in"]) -> Shaped[Tensor, " n"]:
    """Entries in storage order; those of a block of the pattern one after the other."""
    if not isinstance(pattern, Block):
        return matrix.reshape(-1)
    tiles = matrix.unflatten(1, (-1, pattern.columns)).unflatten(0, (-1, pattern.rows))
    return tiles.transpose(1, 2).reshape(-1)


def unflat(pattern: Pattern, entries: Shaped[Tensor, " n"], shape: torch.Size) -> Shaped[Tensor, "out in"]:
    """Inverse of `flat`."""
    if not isinstance(pattern, Block):
        return entries.view(shape)
    rows, columns = pattern.rows, pattern.columns
    tiles = entries.view(shape[0] // rows, shape[1] // columns, rows, columns)
    return tiles.transpose(1, 2).reshape(shape)
