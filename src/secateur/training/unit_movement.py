"""Movement pruning of units: heads, neurons, filters that training does not want are closed, then removed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import MaskError, SecateurError
from secateur.core.names import unwrap
from secateur.graph import Graph
from secateur.prune import refuse_class
from secateur.schedules import Schedule, When, check_schedule, every, is_due
from secateur.shrink.entry import DEFAULT_KINDS
from secateur.training.attach import Optimizer
from secateur.training.shadow import Scores as Parameters
from secateur.training.units import UnitMethod, Units


class UnitMovement(UnitMethod):
    r"""Learn which units to keep, by scores that follow :math:`-\sum_t \partial L/\partial z`.

        graph = sc.Graph.trace(model, x)
        movement = sc.UnitMovement(model, graph, sc.cubic(0, 0.5, begin=200, end=2000))
        with movement.attach(optimizer):
            ...  # the loop, as it was
        end = {"criterion": movement, "kinds": movement.kinds, "sparsity": movement.closed()}
        sc.shrink_(model, x, sc.Budget.params(1.0), **end)

    Each unit has one score for all weights that take in what it passes on: a head for its columns of the
    output projection, a neuron for its column of the next layer. With a gate z = 1 on what the unit passes
    on, its score moves against :math:`\partial L/\partial z = \sum w\, \partial L/\partial w` over these
    weights, closed units too, as the gradient goes straight through the choice. Those of the lowest scores
    over all groups are closed, as many as the schedule's share of the groups' parameters needs; one of each
    group stays. Closed units may come back until the end of the schedule.

    Args:
        model: any module, usually pretrained.
        graph: its trace, whose groups have scores.
        schedule: step -> share of the groups' parameters that is closed.
        when: steps since `schedule.begin` -> whether units close and open.
        kinds: of groups; units inside blocks by default.
        rate: learning rate of the scores, which follows the schedule of the optimizer's.

    Raises:
        SelectionError: no group whose units are passed on to weights.
        SecateurError: another of its subclasses, for anything else wrong with the input.

    Reference: Sanh et al. 2020, Movement pruning; Lagunas et al. 2021, Block pruning for faster transformers,
    section 3. Differs from the latter: one score for a whole unit as the typed graph has it, biases and norms
    included when it is removed, and exactly the share that is asked.
    """

    reads_gradients = True

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        schedule: Schedule,
        *,
        when: When = every(10),  # noqa: B008, a frozen dataclass
        kinds: Collection[str] = DEFAULT_KINDS,
        rate: float = 1e-2,
    ) -> None:
        for setting in (schedule, when):
            refuse_class(setting)
        check_schedule(schedule)
        if not rate > 0:
            raise SecateurError(f"The learning rate of the scores is above 0; got {rate}.")
        self.schedule, self.when = schedule, when
        settings = {"schedule": repr(schedule), "when": repr(when), "rate": repr(rate)}
        super().__init__(model, Units(unwrap(model), graph, kinds), settings)
        device = self.live.targets[0].weight.device
        self._scores = Parameters(
            {g.name: torch.zeros(g.size, device=device) for g, _ in self.units.groups}, rate
        )
        self._keep = {g.name: torch.ones(g.size, dtype=torch.bool) for g, _ in self.units.groups}
        self._gradients: dict[str, Tensor] = {}
        self.units.check(self._values(), schedule(schedule.end))  # fails before training

    @property
    def end(self) -> int:
        return self.schedule.end

    def start(self) -> None:
        self._shadow.begin()
        if self.step == 0 and not self.history and is_due(self.schedule, self.when, 0):
            self._update()

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> bool:
        if self.step < self.end:
            self._gradients = self.units.flow(self._shadow.dense)
            self.live.write_gradients()
            self._shadow.show()
        return True

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        self.step += 1
        if self.step > self.end:
            self.live.write()
            return
        self._shadow.take()
        self._scores.step(self._gradients, optimizer)
        if is_due(self.schedule, self.when, self.step):
            self._update()
        else:
            self.live.write()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {"scores": self._scores.state_dict()}
        state["kept"] = {name: keep.clone() for name, keep in self._keep.items()}
        if self.step < self.end:
            state["dense"] = self._shadow.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        kept = state.get("kept", {})
        if "scores" not in state or (self.step < self.end and "dense" not in state):
            raise MaskError("The state lacks the dense weights and scores of movement pruning.")
        if {n: k.shape for n, k in kept.items()} != {n: k.shape for n, k in self._keep.items()}:
            raise MaskError("The state does not say which of these units are closed.")
        self._scores.load_state_dict(state["scores"])
        self._keep = {name: keep.clone().cpu() for name, keep in kept.items()}
        if self.step < self.end:
            self._shadow.load(state["dense"])

    def scores(self) -> dict[str, Tensor]:
        """The score of each unit, by group."""
        return {name: value.clone() for name, value in self._values().items()}

    def _values(self) -> Mapping[str, Tensor]:
        return {g.name: self._scores[g.name] for g, _ in self.units.groups}

    def _kept(self) -> dict[str, Tensor]:
        return self._keep

    def _update(self) -> None:
        asked = self.schedule(self.step)
        self._keep = self.units.kept(self._values(), asked * self.units.total)
        self._change(self.units.masks(self._keep), asked)
