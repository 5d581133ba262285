"""Scores from gates: what the loss does, to first order, when a unit is switched off.

A gate is a factor of 1 on a unit. Its gradient for one example is the sum, over all that belongs to the unit,
of value times gradient, with what cancels cancelled; the absolute value or the square is taken of that sum,
inside the mean over examples.
Shapes: N examples, I channels, U units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.collect import Loss
from secateur.collect.batches import Batch, example_losses, gradient
from secateur.core.errors import StatsError
from secateur.scoring.base import Group, Labels, Place, Scores, check_choice, finished, per_layer, places
from secateur.scoring.taps import Consumer, consumers, data, listening, measuring, tokens_NTI
from secateur.scoring.traffic import refuse_missing, unheard
from secateur.scoring.units import NORMS, add_units, count_units, index_rows
from secateur.scoring.weights import check_roles

Gates = dict[Any, Float[Tensor, "N U"]]  # gradient of each example's loss for each group's gates


@dataclass
class _Mean:
    """Mean over examples of the absolute gates to a power."""

    power: int
    totals: dict[Any, Tensor] = field(default_factory=dict)
    count: int = 0

    def add(self, gates: Gates) -> None:
        """Add some examples."""
        for g, gates_NU in gates.items():
            total = (gates_NU.abs() ** self.power).sum(dim=0)
            self.totals[g] = self.totals[g] + total if g in self.totals else total
        self.count += len(next(iter(gates.values())))

    def of(self, group: Any) -> Float[Tensor, "U"]:
        """The mean for one group."""
        return self.totals[group] / self.count


@dataclass(frozen=True)
class HeadImportance:
    r"""The gradient of a gate on a unit's activations, in absolute value, in the mean over examples.

    $$ s_u = \mathbb{E}_x \Big|\sum_{t,\, i \in u} a_{ti} \frac{\partial L_x}{\partial a_{ti}}\Big| $$

    over tokens or positions $t$ and channels $i$ of the unit, where its consumers take it in; for attention
    heads that is the input of the output projection. Works alike for key-value groups, neurons and filters.
    Needs batches and a loss. In the units of the loss before normalisation.

    One backward pass serves a batch where examples do not influence each other and lie along dimension 0 of a
    consumer's input, which is tested; else, with a note, one an example.

    Args:
        normalise: divide a group's scores by their L2 norm, `l2`, as the paper does for each layer; or by
            `mean`, `max`, `sum`, or None.

    Source: Michel et al. 2019, Are sixteen heads really better than one, equation 2. Differs from the
    authors' code, which takes the absolute value for each token and not, as the equation says, for each
    example.
    """

    normalise: str | None = "l2"

    def __post_init__(self) -> None:
        check_choice("HeadImportance", "normalise", self.normalise, NORMS)

    def __call__(
        self,
        model: nn.Module,
        groups: Sequence[Any],
        labels: Labels,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
    ) -> dict[Any, Scores]:
        found = {g: consumers(model, g, labels, self) for g in groups}
        if not groups:
            return {}
        taps = _Taps(model, {g: of_group for g, (of_group, _) in found.items()}, loss)
        mean, how = taps.mean(data(model, batches, self))
        out = {}
        for g, (of_group, notes) in found.items():
            heard = [c for c in of_group if id(c.weight) in taps.called]
            silent = unheard(self, g, of_group, heard)
            refuse_missing(self, g, [count_units(c.labels, g.size) for c in heard])
            score = mean.of(g)
            out[g] = finished(g, per_layer(score, self.normalise), (*notes, *silent, *how, *_idle(score)))
        return out


@dataclass
class _Taps:
    """The inputs of consumers, and their gradients.

    Each input goes through a variable of its own, so that its gradient is what flows back through this one
    consumer, and the gate of a unit is the sum over its consumers.
    """

    model: nn.Module
    groups: dict[Any, list[Consumer]]
    loss: Loss | None
    called: set[int] = field(default_factory=set)

    def mean(self, batches: Iterable[Batch]) -> tuple[_Mean, list[str]]:
        """The mean over all examples, and a note if some were taken one by one that came together."""
        mean, tried, reason = _Mean(1), False, None
        with measuring(self.model), torch.enable_grad():
            for batch in batches:
                if batch.size > 1 and not tried:
                    tried, reason = True, self._disagreement(batch)
                gates = self._batched(batch) if batch.size > 1 and reason is None else reason
                if isinstance(gates, dict):
                    mean.add(gates)
                    continue
                reason = gates
                for i in range(batch.size):
                    mean.add(self._alone(batch.part(i, i + 1)))
        return mean, [f"Gradients were taken one example at a time: {reason}."] if reason else []

    def _alone(self, example: Batch) -> Gates:
        """The definition: every row in one pass belongs to the one example."""
        calls, value = self._forward(example)
        return self._sum(calls, value, lambda x: x.sum(dim=(0, 1), dtype=torch.float64)[None], 1)

    def _batched(self, batch: Batch) -> Gates | str:
        """The same for all examples at once, or why the rows that reach a consumer are not the examples."""
        calls, value = self._forward(batch)
        for _, module, x in calls:
            if len(tokens_NTI(module, x)) != batch.size:
                return "the rows that reach a consumer are not the examples of the batch"
        return self._sum(calls, value, lambda x: x.sum(dim=1, dtype=torch.float64), batch.size)

    def _disagreement(self, batch: Batch) -> str | None:
        """None if the first two examples give the same together as one by one, else the reason."""
        if self.loss is None:
            return "the loss is computed inside the model"
        pair = batch.part(0, 2)
        alone = [self._alone(pair.part(i, i + 1)) for i in range(2)]
        try:
            fast = self._batched(pair)
        except Exception as error:  # the shortcut asks more of a model and a loss than the definition does
            return f"one backward pass over a batch failed ({error})"
        if isinstance(fast, str):
            return fast
        for g, of_group in self.groups.items():
            right = torch.cat([gates[g] for gates in alone])
            half = any(c.weight.element_size() < 4 for c in of_group)
            if not (fast[g] - right).norm() <= (5e-2 if half else 1e-3) * right.norm():
                return f"examples influence each other at {g.name}"
        return None

    def _forward(self, batch: Batch) -> tuple[list[tuple[int, nn.Module, Tensor]], Tensor]:
        """Every tapped input of one pass, and the sum of the examples' losses."""
        calls: list[tuple[int, nn.Module, Tensor]] = []

        def hear(weight: int, module: nn.Module, x: Tensor) -> Tensor | None:
            self.called.add(weight)
            if not torch.is_grad_enabled():  # the model itself switches gradients off
                return None
            # Nothing that comes before needs a gradient, in a frozen model or at its first layer.
            tap = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            calls.append((weight, module, tap))
            return tap

        weights = {id(c.weight): c.weight for of_group in self.groups.values() for c in of_group}
        with listening(self.model, weights.values(), hear):
            value = example_losses(batch.forward(self.model), batch, self.loss).sum()
        return calls, value

    def _sum(self, calls: list[tuple[int, nn.Module, Tensor]], value: Tensor, over: Any, n: int) -> Gates:
        """Value times gradient, summed over rows by `over`, over channels by labels, and over consumers."""
        gates = {g: torch.zeros(n, g.size, dtype=torch.float64, device=value.device) for g in self.groups}
        if not calls:
            return gates
        channels: dict[int, Tensor] = {}
        grads = gradient(value, [x for _, _, x in calls])
        for (weight, module, x), grad in zip(calls, grads, strict=True):
            product_NI = over(tokens_NTI(module, _wide(x) * _wide(grad)))
            channels[weight] = channels.get(weight, 0) + product_NI
        for g, of_group in self.groups.items():
            for c in of_group:
                if id(c.weight) in channels:
                    gates[g] += add_units(channels[id(c.weight)], c.labels, g.size)
        return gates


@dataclass(frozen=True)
class JointTaylor:
    r"""First-order effect of a unit's weights taken together, in the mean over examples.

    $$ s_u = \mathbb{E}_x \Big|\sum_{e \in u} w_e \frac{\partial L_x}{\partial w_e}\Big|^p $$

    over the entries of all members: the joint form, in which opposite effects cancel. `GroupScore(Taylor())`
    and `GroupScore(TaylorSquared())` are the independent ones. With `members=("out", "along")` of a filter
    and its batch norm it adds the gates after the convolution and after the norm; with `members="in"` it is
    `HeadImportance(normalise=None)`, which is faster. Needs batches and a loss. One backward pass an example.

    An entry of a tensor that is a member in two dimensions counts in both.

    Args:
        power: p, 1 or 2.
        members: `all`, or the roles to count: `out`, `in`, `along`, or a tuple of these.
        normalise: None, or divide by the `mean`, `max`, `sum` or `l2` norm of the group's scores.

    Source: Molchanov et al. 2019, Importance estimation for neural network pruning, equation 9. Differs from
    the authors' code, which squares the gradient of a batch: here each example has its own.
    """

    power: int = 1
    members: str | tuple[str, ...] = "all"
    normalise: str | None = None

    def __post_init__(self) -> None:
        check_choice("JointTaylor", "power", self.power, (1, 2))
        check_choice("JointTaylor", "normalise", self.normalise, NORMS)
        check_roles("JointTaylor", self.members)

    def __call__(
        self,
        model: nn.Module,
        groups: Sequence[Any],
        labels: Labels,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
    ) -> dict[Any, Scores]:
        found = {g: _floats(places(model, g, labels, self.members)) for g in groups}
        for g, of_group in found.items():
            if not of_group:
                raise StatsError(f"{self} finds no weights in {g.name}: use members='all', or exclude it.")
            refuse_missing(self, g, [count_units(p.labels, g.size) for p in of_group])
        if not groups:
            return {}
        mean = _weight_gates(model, found, data(model, batches, self), loss, self.power)
        return {g: finished(g, per_layer(mean.of(g), self.normalise), _idle(mean.of(g))) for g in groups}


def _floats(of_group: list[Place]) -> list[Place]:
    return [p for p in of_group if p.weight.is_floating_point()]


def _weight_gates(
    model: nn.Module, found: dict[Any, list[Place]], batches: Iterable[Batch], loss: Loss | None, power: int
) -> _Mean:
    """Sums of weight times gradient over each unit, one backward pass an example."""
    by_id = {id(p.weight): p.weight for of_group in found.values() for p in of_group}
    weights, mean = list(by_id.values()), _Mean(power)
    with measuring(model), _differentiable(weights), torch.enable_grad():
        for batch in batches:
            for i in range(batch.size):
                example = batch.part(i, i + 1)
                value = example_losses(example.forward(model), example, loss)[0]
                grads = dict(zip(by_id, gradient(value, weights), strict=True))
                mean.add({g: _units(g, of_group, grads)[None] for g, of_group in found.items()})
    return mean


def _units(group: Group, of_group: Sequence[Place], grads: dict[int, Tensor]) -> Float[Tensor, "U"]:
    """Weight times gradient of one example, summed over the entries of each unit."""
    total = torch.zeros(group.size, dtype=torch.float64, device=of_group[0].weight.device)
    for place in of_group:
        product = _wide(place.weight) * _wide(grads[id(place.weight)])
        rows = index_rows(product, place.dim).sum(dim=1, dtype=torch.float64)
        total += add_units(rows, place.labels, group.size)
    return total


@contextmanager
def _differentiable(weights: Sequence[Tensor]) -> Iterator[None]:
    """Frozen weights take gradients for the while; nothing is written to `.grad`."""
    frozen = [w for w in weights if not w.requires_grad]
    for w in frozen:
        w.requires_grad_(True)
    try:
        yield
    finally:
        for w in frozen:
            w.requires_grad_(False)


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32."""
    return x.detach() if x.element_size() >= 4 else x.detach().float()


def _idle(scores: Tensor) -> list[str]:
    return [] if bool(scores.any()) else ["All scores are 0: on this data nothing tells the units apart."]
