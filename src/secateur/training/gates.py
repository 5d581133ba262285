"""Gates on units that are trained to close: L0 regularisation with a Lagrangian to a target."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import MaskError, ScheduleError, SecateurError
from secateur.graph import Graph
from secateur.shrink.entry import DEFAULT_KINDS
from secateur.training.attach import Optimizer
from secateur.training.draws import generator_at
from secateur.training.shadow import Scores as Parameters
from secateur.training.units import UnitMethod, along

_BETA, _LOW, _HIGH = 2 / 3, -0.1, 1.1  # temperature and stretch of Louizos et al.
_SHIFT = _BETA * math.log(-_LOW / _HIGH)
_CLAMP = math.log(100)  # of CoFi: gates further away hardly move any more


class L0(UnitMethod):
    r"""Close the gates of units, heads and neurons say, until a share of the parameters is gone.

        graph = sc.Graph.trace(model, x)
        l0 = sc.L0(model, graph, 0.5, begin=200, end=2000)
        with l0.attach(optimizer):
            ...  # the loop, as it was
        end = {"criterion": l0, "kinds": l0.kinds, "sparsity": l0.closed()}
        sc.shrink_(model, x, sc.Budget.params(1.0), **end)

    Each unit has a gate on what it passes on, a stretched concrete variable: with u uniform and
    :math:`\bar s = \sigma((\log u - \log(1-u) + \alpha)/\beta)(\zeta - \gamma) + \gamma`, the gate is
    :math:`z = \min(1, \max(0, \bar s))`, drawn anew for every step. It is open with probability
    :math:`\sigma(\alpha - \beta \log(-\gamma/\zeta))`. The expected share of parameters that is closed,
    :math:`\hat s`, is led to its target t, which rises linearly from `begin` to `end`, by
    :math:`\lambda_1 (\hat s - t) + \lambda_2 (\hat s - t)^2` with multipliers that ascend.

    At `end` gates stop to be random: those most likely closed are closed, as many as the target needs, and
    the others are folded into the weights at their expected value,
    :math:`\min(1, \max(0, \sigma(\alpha)(\zeta - \gamma) + \gamma))`. Training goes on with the closed units
    at zero, and `shrink_` removes them.

    Between steps the model holds the gates drawn for the next one; `settled()` is a context in which it holds
    the final ones, for evaluation on the way.

    Args:
        model: any module.
        graph: its trace, whose groups are gated.
        sparsity: fraction of the groups' parameters to remove.
        begin: step at which the target begins to rise.
        end: step from which on the gates stay.
        kinds: of groups; units inside blocks by default.
        rate: learning rate of gates and multipliers, which follows the schedule of the optimizer's.
        initial: :math:`\alpha` at the beginning.
        seed: of the gates' draws; the same on all ranks.

    Raises:
        SelectionError: no group whose units are passed on to weights.
        SecateurError: another of its subclasses, for anything else wrong with the input.

    Reference: Louizos et al. 2018, Learning sparse neural networks through L0 regularization, eq. 10-13; Xia
    et al. 2022, Structured pruning learns compact and accurate models (CoFi), section 3.
    """

    reads_gradients = True

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        sparsity: float,
        *,
        begin: int,
        end: int,
        kinds: Collection[str] = DEFAULT_KINDS,
        rate: float = 0.1,
        initial: float = 2.2,
        seed: int = 0,
    ) -> None:
        if not 0 <= begin < end:
            raise ScheduleError(f"L0 needs 0 <= begin < end; got begin={begin}, end={end}.")
        if not rate > 0:
            raise SecateurError(f"The learning rate of the gates is above 0; got {rate}.")
        self.sparsity, self.begin, self.last, self.seed = sparsity, begin, end, seed
        settings = {
            "sparsity": repr(sparsity),
            "begin": repr(begin),
            "end": repr(end),
            "rate": repr(rate),
            "seed": repr(seed),
        }
        super().__init__(model, graph, kinds, settings)
        device = self.live.targets[0].weight.device
        gates = {g.name: torch.full((g.size,), float(initial), device=device) for g, _ in self.units.groups}
        self._alpha = Parameters(gates, rate)
        self._multipliers = Parameters({"linear": torch.zeros(1), "square": torch.zeros(1)}, rate, True)
        self._gradients: dict[str, Tensor] = {}
        self._drawn: dict[str, Tensor] = {}
        self.units.check(self._values(), sparsity)  # what cannot be had fails before training

    @property
    def end(self) -> int:
        return self.last

    @property
    def expected(self) -> float:
        """Share of the groups' parameters that is expected to be closed."""
        open_ = sum(float((_open(self._alpha[n]).cpu() * c).sum()) for n, c in self.units.costs.items())
        return 1 - open_ / self.units.total

    @property
    def target(self) -> float:
        """What `expected` is led to at the present step."""
        share = (self.step - self.begin) / (self.last - self.begin)
        return self.sparsity * min(1.0, max(0.0, share))

    def start(self) -> None:
        self._shadow.begin()
        if self.step < self.last:
            self._draw()

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> bool:
        if self.step >= self.last:
            return True
        ahead = self.expected - self.target
        linear, square = (float(self._multipliers[k]) for k in ("linear", "square"))
        for name, flow in self.units.flow(self._shadow.dense).items():
            alpha, drawn = self._alpha[name], self._drawn[name]
            inside = (drawn > 0) & (drawn < 1)
            concrete = (drawn - _LOW) / (_HIGH - _LOW)
            slope = torch.where(inside, (_HIGH - _LOW) * concrete * (1 - concrete) / _BETA, 0.0)
            p_open = _open(alpha)
            closing = -self.units.costs[name].to(alpha.device) * p_open * (1 - p_open) / self.units.total
            self._gradients[name] = flow * slope + (linear + 2 * square * ahead) * closing
        for group, users in self.units.groups:
            for p in users:
                if p.weight.grad is not None:
                    p.weight.grad.mul_(along(p, self._drawn[group.name]))
        self._multipliers.step(
            {"linear": torch.tensor([ahead]), "square": torch.tensor([ahead**2])}, optimizer
        )
        self._shadow.show()
        return True

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        self.step += 1
        if self.step > self.last:
            self.live.write()
            return
        self._shadow.take()
        self._alpha.step(self._gradients, optimizer)
        for alpha in self._alpha.values.values():
            alpha.clamp_(-_CLAMP, _CLAMP)
        if self.step < self.last:
            self._draw()
        else:
            self._settle()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {"gates": self._alpha.state_dict()}
        if self.step < self.last:
            state["dense"] = self._shadow.state_dict()
            state["multipliers"] = self._multipliers.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if "gates" not in state or (self.step < self.last and "dense" not in state):
            raise MaskError("The state lacks the gates and dense weights of L0.")
        self._alpha.load_state_dict(state["gates"])
        if self.step < self.last:
            self._shadow.load(state["dense"])
            self._multipliers.load_state_dict(state["multipliers"])

    @contextmanager
    def settled(self) -> Iterator[None]:
        """The model with the gates that it would have if they stayed now, for an evaluation on the way."""
        if self.step >= self.last:
            yield
            return
        self._show({name: self._final(name, keep) for name, keep in self._kept().items()})
        try:
            yield
        finally:
            self._show(self._drawn)

    def _values(self) -> Mapping[str, Tensor]:
        """The log odds of gates."""
        return {g.name: self._alpha[g.name] for g, _ in self.units.groups}

    def _kept(self) -> dict[str, Tensor]:
        return self.units.kept(self._values(), self.target * self.units.total)

    def _draw(self) -> None:
        for group, _ in self.units.groups:
            alpha = self._alpha[group.name]
            generator = generator_at(self.seed, group.name, self.step)
            u = torch.rand(group.size, generator=generator).clamp(1e-6, 1 - 1e-6).to(alpha.device)
            concrete = ((u.log() - (1 - u).log() + alpha) / _BETA).sigmoid()
            self._drawn[group.name] = (concrete * (_HIGH - _LOW) + _LOW).clamp(0, 1)
        self._show(self._drawn)

    def _final(self, name: str, keep: Tensor) -> Tensor:
        expected = (self._alpha[name].sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)
        return expected * keep.to(expected.device)

    @torch.no_grad()
    def _show(self, gates: Mapping[str, Tensor]) -> None:
        for group, users in self.units.groups:
            for p in users:
                dense = self._shadow.dense[p.tensor]
                p.weight.detach().copy_(dense * along(p, gates[group.name]))

    def _settle(self) -> None:
        kept = self._kept()
        self._show({name: self._final(name, keep) for name, keep in kept.items()})
        self._change(self.units.masks(kept), self.sparsity)


def _open(alpha: Tensor) -> Tensor:
    """Probability that a gate is not zero."""
    return (alpha.double() - _SHIFT).sigmoid()
