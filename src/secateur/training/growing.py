"""A penalty that grows on what will be removed, until removing it changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocation import Allocation, global_
from secateur.core.errors import MaskError, ScheduleError
from secateur.core.names import Where, select, unwrap
from secateur.criteria import Criterion
from secateur.patterns import Pattern
from secateur.training.attach import Optimizer
from secateur.training.choice import Choice
from secateur.training.method import Method
from secateur.training.regularize import check_strength


class Growing(Method):
    r"""Penalise what will be removed more and more, and remove it once it is small (GReg).

        greg = sc.Growing(model, sc.Magnitude(), 0.9, end=9000)
        with greg.attach(optimizer):
            ...  # the loop, as it was

    An L2 penalty grows by `increment` every `interval` steps, up to `ceiling`. Until step `pick` it lies on
    all weights alike, which moves those apart that the loss holds on to and those that it does not (GReg-2);
    then what goes is chosen, at once with `pick` 0 (GReg-1), and the penalty stays on that alone. At `end` it
    is removed, and stays away. The learning rate times the ceiling must stay below 2, or the penalised
    weights oscillate.

    Args:
        model: any module.
        criterion: what a weight is worth; the paper takes the magnitude.
        sparsity: fraction of the selected layers' weights to remove.
        end: step at which they are removed.
        pick: step at which they are chosen.
        increment: by which the penalty grows.
        interval: steps between.
        ceiling: largest penalty.
        pattern: which entries may survive; `Unstructured()` if None.
        allocation: how much from each layer.
        where: which layers; see `Where`.

    Reference: Wang et al. 2021, Neural pruning via growing regularization, algorithms 1 and 2. Differs: one
    increment before and after the choice, which in the paper's code is a tenth before.
    """

    reads_gradients = True

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        sparsity: float,
        *,
        end: int,
        pick: int = 0,
        increment: float = 1e-4,
        interval: int = 5,
        ceiling: float = 1.0,
        pattern: Pattern | None = None,
        allocation: Allocation = global_,
        where: Where | None = None,
    ) -> None:
        if end < 1 or interval < 1:
            raise ScheduleError(f"Growing takes steps of at least 1; got end={end}, interval={interval}.")
        if not 0 <= pick < end:
            raise ScheduleError(f"Growing chooses before it removes: 0 <= pick < {end}; got {pick}.")
        check_strength("Growing", increment)
        check_strength("Growing", ceiling)
        self.increment, self.interval, self.ceiling = increment, interval, ceiling
        self.pick, self.last, self.sparsity = pick, end, sparsity
        selection = select(unwrap(model), where)
        self._choice = Choice(unwrap(model), selection.targets, criterion, pattern, allocation, None, None)
        settings = {
            "sparsity": repr(sparsity),
            "penalty": f"grows by {increment!r} every {interval} steps up to {ceiling!r}, until {end}",
            "chosen at step": repr(pick),
        }
        super().__init__(model, selection, settings | self._choice.settings(where))
        self._choice(sparsity)  # what cannot be had fails before training
        self._doomed: dict[str, Tensor] = {}  # empty until they are chosen

    @property
    def end(self) -> int:
        return self.last

    @property
    def strength(self) -> float:
        """The penalty at the next step."""
        return min(self.ceiling, self.increment * (self.step // self.interval))

    def start(self) -> None:
        if self.step == self.pick and not self._doomed:
            self._choose()

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> bool:
        if self.step < self.last:
            for t in self.live.targets:
                if t.weight.grad is not None:
                    weight = t.weight.detach()
                    weight = weight * self._doomed[t.name] if self._doomed else weight
                    t.weight.grad.add_(weight, alpha=self.strength)
        return True

    def after_step(self, optimizer: Optimizer) -> None:
        self.step += 1
        if self.step == self.pick:
            self._choose()
        if self.step == self.last:
            self._change({name: ~doomed for name, doomed in self._doomed.items()}, self.sparsity)
        else:
            self.live.write()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"doomed": {k: v.clone() for k, v in self._doomed.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        doomed = state.get("doomed", {})
        shapes = {t.name: t.weight.shape for t in self.live.targets}
        if (doomed or self.step >= max(1, self.pick)) and {k: v.shape for k, v in doomed.items()} != shapes:
            raise MaskError("The state does not say what of these layers is to be removed.")
        devices = {t.name: t.weight.device for t in self.live.targets}
        self._doomed = {k: v.to(devices[k], copy=True) for k, v in doomed.items()}

    def _choose(self) -> None:
        keep, notes = self._choice(self.sparsity)
        self._notes.update(dict.fromkeys(notes))
        self._doomed = {name: ~kept for name, kept in self._agreed(keep).items()}
