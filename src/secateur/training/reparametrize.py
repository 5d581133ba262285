"""Soft threshold reparametrisation: every layer learns the threshold below which its weights are zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocation import global_
from secateur.core.errors import MaskError, SecateurError, StatsError
from secateur.core.names import Target, Where, select, unwrap
from secateur.core.topk import count, find_cut
from secateur.criteria import Magnitude
from secateur.prune import refuse_class
from secateur.schedules import Schedule, When, check_schedule, every, is_due
from secateur.training.attach import Optimizer
from secateur.training.choice import Choice
from secateur.training.method import Method
from secateur.training.shadow import Shadow


class STR(Method):
    r"""Train through :math:`\mathrm{sign}(w) \max(0, |w| - \sigma(s_l + b_t))`, :math:`s_l` learned by layer.

        method = sc.STR(model, sc.cubic(0, 0.9, begin=1000, end=9000))
        with method.attach(optimizer):
            ...  # the loop, as it was

    The loss lowers the thresholds of layers whose weights matter; so each layer finds its own sparsity. At
    every change :math:`b_t` is such that over all layers the share of the schedule lies below the thresholds;
    :math:`s_l` starts at 0. Weights that are zero may come back until the end of the schedule, where those
    that are left are ranked over all layers, and the masks have exactly the asked sparsity.

    With `initial` it is the method of the paper: :math:`s_l` starts there, :math:`b_t` is 0, and only the
    `decay`, an L2 penalty on :math:`s_l`, raises the thresholds, against the loss. How much that removes is
    an outcome of all settings. What it lacks at the end of the schedule goes at once, which costs accuracy;
    if it was too much, the last of the zeros are free to train again. The report says how much it was.

    Args:
        model: any module.
        schedule: step -> fraction of the selected layers' weights that is removed.
        initial: :math:`s_l` at the beginning, as in the paper; None to follow the schedule.
        decay: L2 penalty on :math:`s_l`, which moves by the optimizer's learning rate.
        when: steps since `schedule.begin` -> whether :math:`b_t` changes, and the sparsity is noted down.
        where: which layers; see `Where`.

    Raises:
        SecateurError: one of its subclasses, for anything wrong with the input.

    Reference: Kusupati et al. 2020, Soft threshold weight reparameterization for learnable sparsity, eq. 4-6.
    Differs from the paper: :math:`b_t`, unless `initial` is given; :math:`s_l` moves by plain gradient steps
    whatever the optimizer; the last masks are exact.
    """

    reads_gradients = True

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        initial: float | None = None,
        decay: float = 5e-3,
        when: When = every(10),  # noqa: B008, a frozen dataclass
        where: Where | None = None,
    ) -> None:
        refuse_class(schedule)
        refuse_class(when)
        check_schedule(schedule)
        if not 0 <= decay < math.inf:
            raise SecateurError(f"The decay of the thresholds is finite and at least 0; got {decay}.")
        if initial is not None and not math.isfinite(initial):
            raise SecateurError(f"Thresholds begin at a finite number; got initial={initial}.")
        self.schedule, self.decay, self.when = schedule, decay, when
        self._follows = initial is None
        selection = select(unwrap(model), where)
        self._choice = Choice(unwrap(model), selection.targets, Magnitude(), None, global_, None, None)
        self._choice(schedule(schedule.end))  # what cannot be had fails before training
        follows = "by the schedule" if initial is None else f"from sigmoid({initial!r})"
        settings = {
            "schedule": repr(schedule),
            "thresholds": f"{follows}, with decay {decay!r}",
            "when": repr(when),
            "where": repr(where or Where()),
        }
        super().__init__(model, selection, settings)
        self._shadow = Shadow(selection.targets)
        self._s = {t.name: torch.tensor(float(initial or 0)) for t in selection.targets}
        self._b = torch.tensor(-math.inf if initial is None else 0.0, dtype=torch.float64)
        self._pulls: dict[str, Tensor] = {}

    @property
    def end(self) -> int:
        return self.schedule.end

    def thresholds(self) -> dict[str, float]:
        """The threshold of each layer, in the units of its weights: the last one, once the masks stay."""
        return {t.name: float(self._threshold(t)) for t in self.live.targets}

    def start(self) -> None:
        self._shadow.begin()
        if self.step == 0 and not self.history and is_due(self.schedule, self.when, 0):
            self._update()
        elif self.step < self.end:
            self._show_thresholded()

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> bool:
        if self.step >= self.end:
            return True
        for t in self.live.targets:
            gradient = t.weight.grad
            if gradient is None:
                raise StatsError(f"{t.name} has no gradient: is it frozen, or out of use?")
            dense, g = self._shadow.dense[t.name], self._threshold(t)
            gradient.mul_(dense.abs() > g.to(dense.device))  # so that sums below are over what is left
            pull = -(gradient * dense.sign()).sum(dtype=torch.float64).cpu() * g * (1 - g)
            self._pulls[t.name] = pull + self.decay * self._s[t.name]
        self._shadow.show()
        return True

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        self.step += 1
        if self.step > self.end:
            self.live.write()
            return
        self._shadow.take()
        rate = float(optimizer.param_groups[0]["lr"])
        for name, pull in self._pulls.items():
            self._s[name] -= rate * pull
        if is_due(self.schedule, self.when, self.step):
            self._update()
        else:
            self._show_thresholded()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["thresholds"] = {name: s.clone() for name, s in self._s.items()}
        state["level"] = {"b": self._b.clone()}
        if self.step < self.end:
            state["dense"] = self._shadow.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        known = state.get("thresholds", {}).keys() == self._s.keys() and "level" in state
        if not known or (self.step < self.end and "dense" not in state):
            raise MaskError("The state lacks the dense weights and thresholds of STR.")
        self._s = {name: s.clone() for name, s in state["thresholds"].items()}
        self._b = state["level"]["b"].clone()
        if self.step < self.end:
            self._shadow.load(state["dense"])

    @torch.no_grad()
    def _update(self) -> None:
        asked = self.schedule(self.step)
        if self._follows:
            self._follow(asked)
        self._show_thresholded()
        above = {t.name: self._above(t) for t in self.live.targets}
        if self.step < self.end:
            self._change(above, asked)
            return
        if not self._follows:
            kept = sum(int(keep.count_nonzero()) for keep in above.values())
            had = 1 - kept / sum(keep.numel() for keep in above.values())
            note = f"The thresholds had removed {had:.2%}; the weights were ranked for {asked:.2%}."
            self._notes[note] = None
        self._change(self._choice(asked)[0], asked)  # of what the thresholds leave; the first zeros go first

    def _follow(self, asked: float) -> None:
        """Set the level at which so many weights lie below their thresholds."""
        sizes = [t.weight.numel() for t in self.live.targets]
        scores = [lambda t=t: self._level(t) for t in self.live.targets]
        cut, _ = find_cut(scores, sizes, count(asked, sum(sizes)))
        higher = 1e-6 * (1 + abs(cut.value))  # so that rounding spares no weight at the cut
        self._b.fill_(cut.value + higher if math.isfinite(cut.value) else cut.value)  # -inf: nothing goes

    def _level(self, target: Target) -> Tensor:
        """The level from which on each weight is below its threshold."""
        size = self._shadow.dense[target.name].abs().float().clamp_(max=1)
        return size.logit_() - self._s[target.name].to(size.device)

    def _threshold(self, target: Target) -> Tensor:
        return (self._s[target.name] + self._b).sigmoid().float()

    def _above(self, target: Target) -> Tensor:
        dense = self._shadow.dense[target.name]
        return dense.abs() > self._threshold(target).to(dense.device)

    def _show_thresholded(self) -> None:
        with torch.no_grad():
            for t in self.live.targets:
                threshold = float(self._threshold(t))
                t.weight.detach().copy_(nn.functional.softshrink(self._shadow.dense[t.name], threshold))
