"""Units of a graph's groups while a model trains: what they cost, what passes them on, which of them stay."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.collect import Loss
from secateur.core.errors import BudgetError, SelectionError, SparsityError, StatsError
from secateur.core.names import Selection, Target
from secateur.graph import Graph, Group
from secateur.scoring.base import Labels, Place, Scores, finished, places
from secateur.scoring.units import add_units, count_units, index_rows
from secateur.training.method import Method
from secateur.training.shadow import Shadow


class Units:
    """The units of a model's groups, and the weights that take in what they pass on.

    A weight that takes in units of two groups belongs to the first of them.

    Attributes:
        groups: with the places of each that take its units in.
        of_tensor: the same by the names of tensors.
        costs: of each group, the parameters of each unit in all tensors that depend on it, `[size]`.
        total: of all units.

    Raises:
        SelectionError: no group whose units are passed on to weights.
    """

    def __init__(self, model: nn.Module, graph: Graph, kinds: Collection[str]) -> None:
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        self.groups: list[tuple[Group, list[Place]]] = []
        taken: set[int] = set()
        for group in graph.groups():
            users = places(model, group, graph.labels, "in") if group.kind in kinds else []
            if users and not any(id(p.weight) in taken for p in users):
                taken |= {id(p.weight) for p in users}
                self.groups.append((group, users))
        if not self.groups:
            raise SelectionError(f"No group of {', '.join(kinds)} can be cut and is passed on to a weight.")
        self.of_tensor: dict[str, list[tuple[Group, Place]]] = {}
        for group, users in self.groups:
            for p in users:
                self.of_tensor.setdefault(p.tensor, []).append((group, p))
        self.costs = {g.name: _costs(model, g, graph.labels) for g, _ in self.groups}
        self.total = sum(float(c.sum()) for c in self.costs.values())

    @property
    def targets(self) -> tuple[Target, ...]:
        """The weights that take units in."""
        return tuple({id(p.weight): p.target for _, users in self.groups for p in users}.values())

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the groups."""
        return tuple(dict.fromkeys(g.kind for g, _ in self.groups))

    @torch.no_grad()
    def flow(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r"""For each group the gradients of gates on its units, float64 `[size]`.

        That is :math:`\sum w\, \partial L/\partial w` over the weights w, dense, that take the unit in.
        """
        flows = {}
        for group, users in self.groups:
            flow = torch.zeros(group.size, dtype=torch.float64, device=users[0].weight.device)
            for p in users:
                if p.weight.grad is None:
                    raise StatsError(f"{p.tensor} has no gradient: is it frozen, or out of use?")
                product = index_rows(p.weight.grad.float() * dense[p.tensor], p.dim)
                flow += add_units(product.sum(dim=1, dtype=torch.float64), p.labels, group.size)
            flows[group.name] = flow
        return flows

    def kept(
        self, values: Mapping[str, Tensor], removed: float, closed: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """Units that stay when those of the lowest values go until at least so many parameters are gone.

        The highest unit of each group stays in any case, but for the groups in `closed`: they go as a whole.
        """
        flat = self._ranked(values, closed)
        costs = torch.cat([self.costs[g.name] for g, _ in self.groups])
        order = flat.argsort(stable=True)
        free = order[flat[order] < torch.inf]
        before = costs[free].cumsum(0) - costs[free]
        keep = torch.ones(len(costs), dtype=torch.bool)
        keep[free[before < removed]] = False
        keep[flat == -torch.inf] = False
        parts = keep.split([g.size for g, _ in self.groups])
        return {g.name: part for (g, _), part in zip(self.groups, parts, strict=True)}

    def most(self, values: Mapping[str, Tensor], closed: Collection[str] = ()) -> float:
        """Parameters that can go when the groups in `closed` go as a whole."""
        costs = torch.cat([self.costs[g.name] for g, _ in self.groups])
        return float(costs[self._ranked(values, closed) < torch.inf].sum())

    def check(self, values: Mapping[str, Tensor], sparsity: float, closed: Collection[str] = ()) -> None:
        """`BudgetError` if that share of the parameters cannot go; see `most`."""
        if not 0 <= sparsity < 1:
            raise SparsityError(f"Of units' parameters a fraction below 1 is removed; got {sparsity}.")
        most = self.most(values, closed)
        if sparsity * self.total > most:
            blocks = "one block of each stack and " if closed else ""
            raise BudgetError(
                f"With {blocks}one unit of each group kept, {most / self.total:.2%} of the groups' "
                f"parameters can go, not {sparsity:.2%}."
            )

    def masks(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What stays of the weights that take units in, by name, in the shapes of the parameters."""
        masks = {}
        for group, users in self.groups:
            for p in users:
                keep = along(p, kept[group.name].to(p.labels.device).float()) > 0
                masks[p.tensor] = keep.expand_as(p.weight).clone()
        return masks

    def _ranked(self, values: Mapping[str, Tensor], closed: Collection[str]) -> Tensor:
        """All values in one row, infinite for the highest of each group; -inf for those of `closed`."""
        flat = [values[g.name].double().cpu().clone() for g, _ in self.groups]
        for (group, _), part in zip(self.groups, flat, strict=True):
            if group.name in closed:
                part.fill_(-torch.inf)
            else:
                part[part.argmax()] = torch.inf
        return torch.cat(flat)


class UnitMethod(Method):
    """A method that closes units: a criterion for `shrink_` at its end, which removes what it closed."""

    def __init__(
        self,
        model: nn.Module,
        units: Units,
        settings: Mapping[str, str],
        others: Sequence[Target] = (),
    ) -> None:
        self.units = units
        groups = ", ".join(g.name for g, _ in units.groups)
        known = {id(t.weight) for t in units.targets}
        targets = (*units.targets, *(t for t in others if id(t.weight) not in known))
        super().__init__(model, Selection(targets, ()), {**settings, "groups": groups})
        self._shadow = Shadow(self.live.targets)

    def __repr__(self) -> str:
        """As reports of `shrink_` name the criterion."""
        settings = {k: v for k, v in self.settings.items() if k != "groups"}
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in settings.items())})"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the groups whose units may close: `kinds` of `shrink_`."""
        return self.units.kinds

    def closed(self) -> dict[str, float]:
        """For each group the fraction of its units that is closed now: `sparsity` of `shrink_`."""
        return {name: float((~keep).double().mean()) for name, keep in self._kept().items()}

    def __call__(
        self,
        model: nn.Module,
        groups: Sequence[Any],
        labels: Labels,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
    ) -> dict[Any, Scores]:
        """As a criterion of groups: the units' values, with those of closed units below those of open ones.

        Among equal values, as at the bounds of L0's log odds, a ranking of its own would choose others.
        """
        values, kept = self._values(), self._kept()
        unknown = [g.name for g in groups if g.name not in values]
        if unknown:
            raise StatsError(
                f"{unknown[0]} was not pruned in training: pass kinds= of what was, or exclude it."
            )
        return {g: finished(g, _parted(values[g.name], kept[g.name])) for g in groups}

    def _change(self, keep: Mapping[str, Tensor], asked: float, step: int | None = None) -> None:
        """As any method; noted down is the share of the groups' parameters, which is what is asked."""
        super()._change(keep, asked, step)
        gone = sum(float(self.units.costs[n][~kept.cpu()].sum()) for n, kept in self._kept().items())
        change = replace(self.history[-1], sparsity=gone / self.units.total)
        self.history = (*self.history[:-1], change)

    def _values(self) -> Mapping[str, Tensor]:
        """What units are worth, by group."""
        raise NotImplementedError

    def _kept(self) -> dict[str, Tensor]:
        """Which units stay now, by group."""
        raise NotImplementedError


def _parted(values: Tensor, kept: Tensor) -> Tensor:
    """Values of a group's units, lowered where they are closed, until they lie below all of the others."""
    span = values.max() - values.min() + 1
    return torch.where(kept.to(values.device), values, values - span)


def along(place: Place, values: Tensor) -> Tensor:
    """One value for each unit, on the place's weight; 1 for indices that belong to no unit."""
    inside = torch.where(place.labels >= 0, values[place.labels.clamp(min=0)], 1.0)
    shape = [-1 if i == place.dim else 1 for i in range(place.weight.dim())]
    return inside.view(shape).to(place.weight.dtype)


def _costs(model: nn.Module, group: Group, labels: Labels) -> Tensor:
    costs = torch.zeros(group.size, dtype=torch.float64)
    for p in places(model, group, labels):
        beside = p.weight.numel() // max(1, p.weight.shape[p.dim])
        costs += count_units(p.labels, group.size).cpu() * beside
    return costs
