"""Alternating compressed and decompressed phases of training (AC/DC)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from secateur.allocation import Allocation, global_
from secateur.collect import Loss
from secateur.core.errors import ScheduleError
from secateur.core.names import Where, select, unwrap
from secateur.criteria import Criterion
from secateur.patterns import Pattern
from secateur.prune import refuse_class
from secateur.training.attach import Optimizer
from secateur.training.choice import Choice
from secateur.training.method import Method
from secateur.training.optimizer_state import forget_


@dataclass(frozen=True)
class Phases:
    """Steps at which training changes: to sparse at the first, to dense at the second, and so on.

    Raises `ScheduleError` unless the steps increase, start at 0 at the earliest, and end with a sparse phase.
    """

    switches: tuple[int, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.switches))
        if len(self.switches) % 2 == 0 or self.switches[0] < 0 or not rising:
            raise ScheduleError(
                "Phases are an odd number of increasing steps, so that the last phase is a sparse one; got "
                f"{self.switches}."
            )


def phases(*, begin: int, period: int, dense_from: int, sparse_from: int) -> Phases:
    """The plan of the paper: dense, then alternating, then a last dense and a long last sparse phase.

    With 100 epochs the paper is dense for 10, alternates every 5, is dense from 75 on and sparse from 85.

    >>> phases(begin=10, period=5, dense_from=35, sparse_from=45).switches
    (10, 15, 20, 25, 30, 35, 45)
    """
    if period < 1 or not 0 <= begin < dense_from < sparse_from:
        raise ScheduleError(
            "Phases need a period of at least 1 and 0 <= begin < dense_from < sparse_from; got "
            f"begin={begin}, period={period}, dense_from={dense_from}, sparse_from={sparse_from}."
        )
    switches = list(range(begin, dense_from, period))
    if len(switches) % 2 == 1:  # else the phase before is dense as well, and both are one
        switches.append(dense_from)
    return Phases((*switches, sparse_from))


class ACDC(Method):
    """Train sparse and dense in turns, and end sparse.

        acdc = sc.ACDC(model, sc.Magnitude(), 0.9, sc.phases(begin=1000, period=500, ...))
        with acdc.attach(optimizer):
            ...  # the loop, as it was

    At the beginning of each sparse phase the weights to be removed are chosen anew and held at zero
    throughout; at the beginning of a dense phase they come back, from zero and without a past in the
    optimizer.

    Args:
        model: any module.
        criterion: what a weight is worth; the paper takes the magnitude.
        sparsity: fraction of the selected layers' weights that is removed in sparse phases.
        phases: when each begins.
        pattern: which entries may survive; `Unstructured()` if None.
        allocation: how much from each layer; the paper ranks all layers together.
        where: which layers; see `Where`.
        batches: data for criteria that need statistics, read at the beginning of every sparse phase.
        loss: `loss(output, target)`, mean over the batch; None if the model returns its loss.

    Raises:
        SecateurError: one of its subclasses, for anything wrong with the input.

    Reference: Peste et al. 2021, AC/DC: Alternating compressed/decompressed training of deep neural networks.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        sparsity: float,
        phases: Phases,
        *,
        pattern: Pattern | None = None,
        allocation: Allocation = global_,
        where: Where | None = None,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
    ) -> None:
        refuse_class(phases)
        self.sparsity, self.phases = sparsity, phases
        selection = select(unwrap(model), where)
        self._choice = Choice(unwrap(model), selection.targets, criterion, pattern, allocation, batches, loss)
        settings = {"sparsity": repr(sparsity), "phases": repr(phases)} | self._choice.settings(where)
        super().__init__(model, selection, settings)
        self._choice(sparsity)  # what cannot be had fails before training

    @property
    def end(self) -> int:
        return self.phases.switches[-1]

    def start(self) -> None:
        if self.phases.switches[0] == 0 and not self.history:
            self._compress()

    def after_step(self, optimizer: Optimizer) -> None:
        self.step += 1
        self.live.write()
        if self.step not in self.phases.switches:
            return
        if self.phases.switches.index(self.step) % 2 == 0:
            self._compress()
        else:
            back = {t.name: ~self.live[t.name] for t in self.live.targets}
            self._change({name: torch.ones_like(gone) for name, gone in back.items()}, 0.0)
            for t in self.live.targets:
                forget_(optimizer, t.weight, back[t.name])

    def _compress(self) -> None:
        keep, notes = self._choice(self.sparsity)
        self._notes.update(dict.fromkeys(notes))
        self._change(keep, self.sparsity)
