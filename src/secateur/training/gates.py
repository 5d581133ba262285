"""Gates on units that are trained to close: L0 regularisation with a Lagrangian to a target."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import MaskError, ScheduleError, SecateurError, StatsError
from secateur.core.names import unwrap
from secateur.graph import Graph
from secateur.prune import refuse_class
from secateur.record import Change
from secateur.schedules import When, every
from secateur.shrink.entry import DEFAULT_KINDS
from secateur.training.attach import Optimizer
from secateur.training.blocks import Gated, gated_blocks
from secateur.training.draws import generator_at
from secateur.training.shadow import Scores as Parameters
from secateur.training.units import UnitMethod, Units, along

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

    Blocks named in `blocks` have a gate each besides, on all that they add to the hidden state: a unit in
    such a block is open with the product of both probabilities. At `end` those blocks close that are more
    likely closed than open, the most certain first, as far as the target goes, and further ones only where
    units alone would not reach it; one of each stack stays. What else a block holds goes with it, uncounted.
    They are the ones to drop::

        l0 = sc.L0(model, graph, 0.5, begin=200, end=2000, blocks="*.layers.*")
        ...  # train and `shrink_`, as above
        sc.drop_layers_(model, l0.closed_blocks(), x)

    Between steps the model holds the gates drawn for the next one; `settled()` is a context in which it holds
    the final ones, for evaluation on the way.

    Args:
        model: any module.
        graph: its trace, whose groups are gated.
        sparsity: fraction of the groups' parameters to remove.
        begin: step at which the target begins to rise.
        end: step from which on the gates stay.
        kinds: of groups; units inside blocks by default.
        blocks: names of blocks that may close as a whole, as from `stacks`, or patterns (`"*.layers.*"`);
            none by default. Blocks that normalise the sum of their input and what they add (BERT) cannot.
        rate: learning rate of gates and multipliers, which follows the schedule of the optimizer's.
        initial: :math:`\alpha` at the beginning.
        when: at which steps the target and the expected share are noted down in `history`.
        seed: of the gates' draws; the same on all ranks.

    Raises:
        SelectionError: no group whose units are passed on to weights; or a block that gates cannot close.
        SecateurError: another of its subclasses, for anything else wrong with the input.

    Reference: Louizos et al. 2018, Learning sparse neural networks through L0 regularization, eq. 10-13; Xia
    et al. 2022, Structured pruning learns compact and accurate models (CoFi), section 3; Xia et al. 2024,
    Sheared LLaMA, section 2.1, for blocks. Differs from CoFi: one gate for a whole block, not one each for
    its attention and its MLP.
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
        blocks: Iterable[str] = (),
        rate: float = 0.1,
        initial: float = 2.2,
        when: When = every(100),  # noqa: B008, a frozen dataclass
        seed: int = 0,
    ) -> None:
        refuse_class(when)
        if not 0 <= begin < end:
            raise ScheduleError(f"L0 needs 0 <= begin < end; got begin={begin}, end={end}.")
        if not rate > 0:
            raise SecateurError(f"The learning rate of the gates is above 0; got {rate}.")
        self.sparsity, self.begin, self.last = sparsity, begin, end
        self.when, self.seed = when, seed
        settings = {
            "sparsity": repr(sparsity),
            "begin": repr(begin),
            "end": repr(end),
            "rate": repr(rate),
            "when": repr(when),
            "seed": repr(seed),
        }
        units = Units(unwrap(model), graph, kinds)
        self.blocks = gated_blocks(unwrap(model), graph, blocks, units.groups)
        if self.blocks:
            settings["blocks"] = ", ".join(b.name for b in self.blocks)
        super().__init__(model, units, settings, [t for b in self.blocks for t in b.writers])
        device = self.live.targets[0].weight.device
        sizes = {g.name: g.size for g, _ in units.groups} | {b.name: 1 for b in self.blocks}
        gates = {name: torch.full((n,), float(initial), device=device) for name, n in sizes.items()}
        self._alpha = Parameters(gates, rate)
        self._multipliers = Parameters({"linear": torch.zeros(1), "square": torch.zeros(1)}, rate, True)
        self._gradients: dict[str, Tensor] = {}
        self._drawn: dict[str, Tensor] = {}
        closable = [name for b in self._order() for name in b.groups]
        self.units.check(self._values(), sparsity, closable)  # what cannot be had fails before training

    @property
    def end(self) -> int:
        return self.last

    @property
    def expected(self) -> float:
        """Share of the groups' parameters that is expected to be closed."""
        open_, within = self._open_parameters()
        return 1 - sum(n * within.get(name, 1.0) for name, n in open_.items()) / self.units.total

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
        pull = (linear + 2 * square * ahead) / self.units.total  # on a parameter that is expected to be open
        open_, within = self._open_parameters()
        for block in self.blocks:
            flow = self._flow(block)
            for t in block.writers:
                assert t.weight.grad is not None
                t.weight.grad.mul_(self._drawn[block.name].to(t.weight.dtype))
            inside = sum(open_[name] for name in block.groups)
            self._gradients[block.name] = self._gradient(block.name, flow, pull * inside)
        for name, flow in self.units.flow(self._shadow.dense).items():
            costs = self.units.costs[name].to(flow.device)
            self._gradients[name] = self._gradient(name, flow, pull * within.get(name, 1.0) * costs)
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
        if self.step == self.last:
            self._settle()
            return
        if self.step >= self.begin and self.when(self.step - self.begin):
            self._note()
        self._draw()

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
        self._show(self._final())
        try:
            yield
        finally:
            self._show(self._drawn)

    def closed(self) -> dict[str, float]:
        """For each group the fraction of its units that is closed now; 0 in blocks that go as a whole."""
        whole = {name for block in self._closed() for name in block.groups}
        return {name: 0.0 if name in whole else share for name, share in super().closed().items()}

    def closed_blocks(self) -> tuple[str, ...]:
        """Names of the blocks that are closed now, for `drop_layers_`."""
        closed = self._closed()
        return tuple(block.name for block in self.blocks if block in closed)

    def _look_for_collapse(self, removed: Mapping[str, int], sizes: Mapping[str, int]) -> None:
        meant = {t.name for block in self._closed() for t in block.writers}
        super()._look_for_collapse({k: n for k, n in removed.items() if k not in meant}, sizes)

    def _values(self) -> Mapping[str, Tensor]:
        """The log odds of gates."""
        return {g.name: self._alpha[g.name] for g, _ in self.units.groups}

    def _order(self) -> list[Gated]:
        """Blocks that may close, those most likely closed first; not the most open one of each stack."""
        alpha = {b.name: float(self._alpha[b.name]) for b in self.blocks}
        stays = {b.stack: b for b in sorted(self.blocks, key=lambda b: alpha[b.name])}  # the last of each
        return sorted((b for b in self.blocks if stays[b.stack] != b), key=lambda b: alpha[b.name])

    def _closed(self) -> list[Gated]:
        """Blocks that go at the present target."""
        wanted, gone = self.target * self.units.total, 0.0
        closed: list[Gated] = []
        for block in self._order():
            groups = [name for b in closed for name in b.groups]
            enough = self.units.most(self._values(), groups) >= wanted
            parameters = sum(float(self.units.costs[name].sum()) for name in block.groups)
            likely = float(_open(self._alpha[block.name])) < 0.5
            if enough and not (likely and gone + parameters <= wanted):
                break
            closed.append(block)
            gone += parameters
        return closed

    def _kept(self) -> dict[str, Tensor]:
        whole = [name for block in self._closed() for name in block.groups]
        return self.units.kept(self._values(), self.target * self.units.total, whole)

    def _open_parameters(self) -> tuple[dict[str, float], dict[str, float]]:
        """Of each group, parameters expected to be open by its units' gates; the odds of its block's gate."""
        open_ = {n: float((_open(self._alpha[n]).cpu() * c).sum()) for n, c in self.units.costs.items()}
        within = {name: float(_open(self._alpha[b.name])) for b in self.blocks for name in b.groups}
        return open_, within

    def _flow(self, block: Gated) -> Tensor:
        """The gradient of a block's gate: of what it writes, with its units' gates, float64 `[1]`."""
        flow = torch.zeros(1, dtype=torch.float64, device=block.writers[0].weight.device)
        for t in block.writers:
            if t.weight.grad is None:
                raise StatsError(f"{t.name} has no gradient: is it frozen, or out of use?")
            gated = self._by_units(t.name, self._drawn)
            flow += (t.weight.grad.float() * gated.float()).sum(dtype=torch.float64)
        return flow

    def _gradient(self, name: str, flow: Tensor, closing: Tensor | float) -> Tensor:
        """Of log odds: `flow` through the gates that were drawn, and what closing them is worth."""
        drawn, p_open = self._drawn[name], _open(self._alpha[name])
        inside = (drawn > 0) & (drawn < 1)
        concrete = (drawn - _LOW) / (_HIGH - _LOW)
        slope = torch.where(inside, (_HIGH - _LOW) * concrete * (1 - concrete) / _BETA, 0.0)
        return flow * slope - closing * p_open * (1 - p_open)

    def _draw(self) -> None:
        for name, alpha in self._alpha.values.items():
            generator = generator_at(self.seed, name, self.step)
            u = torch.rand(len(alpha), generator=generator).clamp(1e-6, 1 - 1e-6).to(alpha.device)
            concrete = ((u.log() - (1 - u).log() + alpha.detach()) / _BETA).sigmoid()
            self._drawn[name] = (concrete * (_HIGH - _LOW) + _LOW).clamp(0, 1)
        self._show(self._drawn)

    def _final(self) -> dict[str, Tensor]:
        """Gates as they stay: none for what is closed, their expected value for the others."""
        closed = self.closed_blocks()
        kept = self._kept() | {b.name: torch.tensor([b.name not in closed]) for b in self.blocks}
        expected = {
            n: (a.detach().sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)
            for n, a in self._alpha.values.items()
        }
        return {name: gate * kept[name].to(gate.device) for name, gate in expected.items()}

    def _note(self) -> None:
        """What is expected to be closed now, in all and of each tensor."""
        odds = {name: float(_open(alpha).mean()) for name, alpha in self._alpha.values.items()}
        layers = {t.name: 1.0 for t in self.live.targets}
        for name, uses in self.units.of_tensor.items():
            layers[name] *= math.prod(odds[group.name] for group, _ in uses)
        for block in self.blocks:
            layers |= {t.name: layers[t.name] * odds[block.name] for t in block.writers}
        closed = {name: 1 - share for name, share in layers.items()}
        self.history += (Change(self.step, self.target, self.expected, closed, 0),)

    def _by_units(self, name: str, gates: Mapping[str, Tensor]) -> Tensor:
        """A dense weight times the gates of the units that it takes in."""
        weight = self._shadow.dense[name]
        for group, place in self.units.of_tensor.get(name, ()):
            weight = weight * along(place, gates[group.name])
        return weight

    @torch.no_grad()
    def _show(self, gates: Mapping[str, Tensor]) -> None:
        for t in self.live.targets:
            t.weight.detach().copy_(self._by_units(t.name, gates))
        for block in self.blocks:
            for t in block.writers:
                t.weight.detach().mul_(gates[block.name].to(t.weight.dtype))

    def _settle(self) -> None:
        self._show(self._final())
        masks = {t.name: torch.ones_like(t.weight, dtype=torch.bool) for t in self.live.targets}
        masks |= self.units.masks(self._kept())
        for block in self._closed():
            masks |= {t.name: torch.zeros_like(t.weight, dtype=torch.bool) for t in block.writers}
        self._change(masks, self.sparsity)


def _open(alpha: Tensor) -> Tensor:
    """Probability that a gate is not zero."""
    return (alpha.double() - _SHIFT).sigmoid()
