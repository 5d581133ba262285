"""Soft threshold reparametrisation: every layer learns the threshold below which its weights are zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocation import global_
from secateur.core.errors import MaskError, ScheduleError, SecateurError, StatsError
from secateur.core.names import Target, Where, select, unwrap
from secateur.criteria import Magnitude
from secateur.schedules import When, every
from secateur.training.attach import Optimizer
from secateur.training.choice import Choice
from secateur.training.method import Method
from secateur.training.shadow import Shadow


class STR(Method):
    r"""Train through :math:`\mathrm{sign}(w) \max(0, |w| - \sigma(s_l))`, :math:`s_l` learned for each layer.

        method = sc.STR(model, 0.9, end=9000)
        with method.attach(optimizer):
            ...  # the loop, as it was

    Weight decay on :math:`s_l` raises the thresholds, the loss holds them down where weights matter; so each
    layer finds its own sparsity. How much is removed on the way is an outcome, which `history` shows; at
    `end` the weights that remain are ranked over all layers, and the masks have the asked sparsity. Larger
    `decay` and `initial` give more on the way. If the thresholds removed more than was asked, the last of
    their zeros are free to train again.

    Args:
        model: any module.
        sparsity: fraction of the selected layers' weights that is removed at the end.
        end: step from which on the masks stay.
        initial: :math:`s_l` at the beginning; the threshold is then :math:`\sigma(s_l)`.
        decay: L2 penalty on :math:`s_l`, which moves by the optimizer's learning rate.
        when: at which steps the sparsity is noted down.
        where: which layers; see `Where`.

    Raises:
        SecateurError: one of its subclasses, for anything wrong with the input.

    Reference: Kusupati et al. 2020, Soft threshold weight reparameterization for learnable sparsity, eq. 4-6.
    Differs from the paper: :math:`s_l` moves by plain gradient steps whatever the optimizer, and the last
    masks are exact.
    """

    reads_gradients = True

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        *,
        end: int,
        initial: float = -6.0,
        decay: float = 5e-3,
        when: When = every(100),  # noqa: B008, a frozen dataclass
        where: Where | None = None,
    ) -> None:
        if end < 1:
            raise ScheduleError(f"STR ends at a step of at least 1; got {end}.")
        if not decay >= 0:
            raise SecateurError(f"The decay of the thresholds is at least 0; got {decay}.")
        selection = select(unwrap(model), where)
        self._choice = Choice(unwrap(model), selection.targets, Magnitude(), None, global_, None, None)
        self._choice(sparsity)  # what cannot be had fails before training
        self.sparsity, self.last, self.decay, self.when = sparsity, end, decay, when
        settings = {
            "sparsity": repr(sparsity),
            "end": repr(end),
            "thresholds": f"from sigmoid({initial!r}), with decay {decay!r}",
            "when": repr(when),
            "where": repr(where or Where()),
        }
        super().__init__(model, selection, settings)
        self._shadow = Shadow(selection.targets)
        self._s = {t.name: torch.tensor(float(initial)) for t in selection.targets}
        self._pulls: dict[str, Tensor] = {}

    @property
    def end(self) -> int:
        return self.last

    def thresholds(self) -> dict[str, float]:
        """The present threshold of each layer, in the units of its weights."""
        return {name: float(s.sigmoid()) for name, s in self._s.items()}

    def start(self) -> None:
        self._shadow.begin()
        if self.step < self.last:
            self._show_thresholded()

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> bool:
        if self.step >= self.last:
            return True
        for t in self.live.targets:
            gradient = t.weight.grad
            if gradient is None:
                raise StatsError(f"{t.name} has no gradient: is it frozen, or out of use?")
            dense = self._shadow.dense[t.name]
            g = self._s[t.name].sigmoid()
            gradient.mul_(dense.abs() > g.to(dense.device))  # so that sums below are over what is left
            pull = -(gradient * dense.sign()).sum(dtype=torch.float64).cpu() * g * (1 - g)
            self._pulls[t.name] = pull + self.decay * self._s[t.name]
        self._shadow.show()
        return True

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        self.step += 1
        if self.step > self.last:
            self.live.write()
            return
        self._shadow.take()
        rate = float(optimizer.param_groups[0]["lr"])
        for name, pull in self._pulls.items():
            self._s[name] -= rate * pull
        self._show_thresholded()
        if self.step == self.last:
            # Of what the thresholds leave; the first zeros go first.
            self._change(self._choice(self.sparsity)[0], self.sparsity)
        elif self.when(self.step):
            self._change({t.name: self._above(t) for t in self.live.targets}, self.sparsity)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.step < self.last:
            state["dense"] = self._shadow.state_dict()
            state["thresholds"] = {name: s.clone() for name, s in self._s.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.step < self.last:
            if "dense" not in state or state.get("thresholds", {}).keys() != self._s.keys():
                raise MaskError("The state lacks the dense weights and thresholds of STR.")
            self._shadow.load(state["dense"])
            self._s = {name: s.clone() for name, s in state["thresholds"].items()}

    def _above(self, target: Target) -> Tensor:
        dense = self._shadow.dense[target.name]
        return dense.abs() > self._s[target.name].sigmoid().to(dense.device)

    @torch.no_grad()
    def _show_thresholded(self) -> None:
        for t in self.live.targets:
            threshold = float(self._s[t.name].sigmoid())
            t.weight.detach().copy_(nn.functional.softshrink(self._shadow.dense[t.name], threshold))
