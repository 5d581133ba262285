"""Gradual pruning: the weights that matter least go a few at a time, while the rest goes on learning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from secateur.allocation import Allocation, uniform
from secateur.collect import Loss
from secateur.core.errors import ScheduleError
from secateur.core.names import Where, select, unwrap
from secateur.criteria import Criterion
from secateur.patterns import Pattern, on_the_way
from secateur.prune import refuse_class
from secateur.schedules import Schedule, When, check_schedule, every, is_due
from secateur.training.attach import Optimizer
from secateur.training.choice import Choice
from secateur.training.method import Method


class Gradual(Method):
    r"""Prune along a schedule while any loop trains the model.

        gmp = sc.Gradual(model, sc.Magnitude(), sc.cubic(0, 0.9, begin=1000, end=9000), when=sc.every(100))
        with gmp.attach(optimizer):
            ...  # the loop, as it was

    At every step that is due, and always at the last of the schedule, the lowest-scored weights go until the
    sparsity is the schedule's, exactly `floor(sparsity * weights + 1/2)` of them. Weights that went stay
    away. Between changes the zeros are held after each optimizer step; gradients stay dense, but for
    optimizers that mix the entries of a parameter (Muon, Adafactor), which get gradients with zeros at the
    weights that are gone.

    Below the sparsity that an N:M pattern forces, the weights that go are the lowest among those that the
    pattern would remove.

    In data-parallel training, give the wrapped model: all ranks then use the masks of the first.

    Args:
        model: any module. Wrappers of `torch.compile` and data parallelism are looked through.
        criterion: what a weight is worth; `secateur.criteria`.
        schedule: step -> sparsity, `cubic(...)` or another of `secateur.schedules`.
        when: steps since `schedule.begin` -> whether masks change.
        pattern: which entries may survive; `Unstructured()` if None.
        allocation: how much from each layer, at every change.
        where: which layers; see `Where`.
        batches: data for criteria that need statistics, read at every change; see `collect`.
        loss: `loss(output, target)`, mean over the batch; None if the model returns its loss.

    Raises:
        SecateurError: one of its subclasses, for anything wrong with the input. The masks of the final
            sparsity are chosen once on the model as it is, so that what cannot be had fails before training.

    Reference: Zhu & Gupta 2017, To prune, or not to prune.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        schedule: Schedule,
        *,
        when: When = every(100),  # noqa: B008, a frozen dataclass
        pattern: Pattern | None = None,
        allocation: Allocation = uniform,
        where: Where | None = None,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
    ) -> None:
        refuse_class(schedule)
        refuse_class(when)
        check_schedule(schedule)
        self.schedule, self.when = schedule, when
        selection = select(unwrap(model), where)
        self._choice = Choice(unwrap(model), selection.targets, criterion, pattern, allocation, batches, loss)
        settings = {"schedule": repr(schedule), "when": repr(when)} | self._choice.settings(where)
        super().__init__(model, selection, settings)
        self._choice(schedule(schedule.end))

    @property
    def end(self) -> int:
        return self.schedule.end

    def start(self) -> None:
        if self.step == 0 and not self.history and is_due(self.schedule, self.when, 0):
            self._update()

    def after_step(self, optimizer: Optimizer) -> None:
        self.step += 1
        if is_due(self.schedule, self.when, self.step):
            self._update()
        else:
            self.live.write()

    def _update(self) -> None:
        last = self.step >= self.schedule.end
        asked = self.schedule(self.step)
        had = self.history[-1].asked if self.history else 0.0
        if asked < had:
            raise ScheduleError(
                f"The schedule falls from {had:.4g} to {asked:.4g} at step {self.step}, but what was pruned "
                "stays away: use a schedule that rises."
            )
        pattern = self._choice.pattern
        keep, notes = self._choice(asked, on_the_way(pattern, last))
        self._notes.update(dict.fromkeys(notes))
        self._change(keep, asked)
