"""Penalties that train weights towards zero, so that removing them afterwards costs little or nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.errors import SecateurError, SelectionError
from secateur.core.names import Selection, Target, Where, select, unwrap
from secateur.graph import Graph, Group
from secateur.prune import refuse_class
from secateur.scoring.base import Place, places
from secateur.scoring.units import add_units, count_units, index_rows
from secateur.shrink.entry import DEFAULT_KINDS
from secateur.training.attach import Optimizer
from secateur.training.method import Method


@runtime_checkable
class Penalty(Protocol):
    """A term of the loss on single weights, by its gradient, its proximal step, or both."""

    def pull(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"] | None:
        """What is added to the gradient; None for nothing."""

    def settle_(self, weight: Float[Tensor, "*shape"], rate: float) -> None:
        """The proximal step after an optimizer step with this learning rate, in place."""


@dataclass(frozen=True)
class L1:
    r"""The lasso, :math:`\lambda \sum |w|`.

    Proximal, each step moves weights by :math:`\eta \lambda` towards zero and stops there, which gives exact
    zeros: :math:`w \leftarrow \mathrm{sign}(w) \max(0, |w| - \eta\lambda)`, with the learning rate
    :math:`\eta`. Else :math:`\lambda\,\mathrm{sign}(w)` is added to the gradient, as network slimming does;
    weights then only come near zero.

    Reference: Tibshirani 1996; Parikh & Boyd 2014, Proximal algorithms, section 6.5.2; Liu et al. 2017.
    """

    strength: float
    proximal: bool = True

    def __post_init__(self) -> None:
        check_strength(self, self.strength)

    def pull(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"] | None:
        return None if self.proximal else weight.sign().mul_(self.strength)

    def settle_(self, weight: Float[Tensor, "*shape"], rate: float) -> None:
        if self.proximal:
            weight.copy_(nn.functional.softshrink(weight, rate * self.strength))


@dataclass(frozen=True)
class L2:
    r"""The ridge, :math:`\frac{\lambda}{2} \sum w^2`: :math:`\lambda w` is added to the gradient.

    Weights that the loss does not need decay, none becomes exactly zero.
    """

    strength: float

    def __post_init__(self) -> None:
        check_strength(self, self.strength)

    def pull(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"] | None:
        return weight * self.strength

    def settle_(self, weight: Float[Tensor, "*shape"], rate: float) -> None:
        return


class Regularize(Method):
    """Train under a penalty on single weights.

        with sc.Regularize(model, sc.L1(1e-4)).attach(optimizer):
            ...  # the loop, as it was
        report = sc.prune_(model, sc.Magnitude(), 0.9, allocation=sc.global_)

    Removes nothing itself: `Masks.of(model)` are the zeros that a proximal penalty made, and `prune_` with
    `global_` or `Threshold` takes what is near zero. `batch_norm_scales(model)` selects what network slimming
    penalises, before `shrink_` with `BNScale()`.

    The penalty comes after the gradients are accumulated, reduced, unscaled and clipped. A proximal step
    takes the learning rate of the weight's group; with Adam, whose steps differ from weight to weight, it is
    not the exact minimiser, but gives zeros all the same.
    """

    reads_gradients = True

    def __init__(self, model: nn.Module, penalty: Penalty, *, where: Where | None = None) -> None:
        refuse_class(penalty)
        self.penalty = penalty
        settings = {"penalty": repr(penalty), "where": repr(where or Where())}
        super().__init__(model, select(unwrap(model), where), settings)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> bool:
        for t in self.live.targets:
            grad = t.weight.grad
            pull = None if grad is None else self.penalty.pull(t.weight.detach())
            if grad is not None and pull is not None:
                grad.add_(pull)
        return True

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        self.step += 1
        rates = learning_rates(optimizer)
        for t in self.live.targets:
            if id(t.weight) in rates:  # not those that another optimizer trains
                self.penalty.settle_(t.weight.detach(), rates[id(t.weight)])


class GroupLasso(Method):
    r"""Train whole units to zero: :math:`\lambda \sum_u \sqrt{n_u}\,\lVert w_u \rVert_2`.

        graph = sc.Graph.trace(model, x)
        lasso = sc.GroupLasso(model, graph, 1e-3)
        with lasso.attach(optimizer):
            ...  # the loop, as it was
        sc.shrink_(model, x, sc.Budget.params(1.0), sparsity=lasso.zero_units())

    A unit's weights :math:`w_u` are all that produce it: its rows, bias and norm, :math:`n_u` of them. With
    all of these at zero, consumers see zeros, and `shrink_` removes the unit without a change of the
    function. After each step:

    :math:`w_u \leftarrow w_u \max(0, 1 - \eta\lambda\sqrt{n_u} / \lVert w_u \rVert)`.

    Args:
        model: any module.
        graph: its trace, whose groups are penalised.
        strength: :math:`\lambda`.
        kinds: of groups; units inside blocks by default. A weight that two groups produce counts with the
            first of them.

    Raises:
        SelectionError: no such group, or none that is produced by a weight.

    Reference: Yuan & Lin 2006, Model selection and estimation in regression with grouped variables; Wen et
    al. 2016, Learning structured sparsity in deep neural networks. Differs from the latter: the root of the
    group's size, without which large groups are hardly penalised, and the proximal step, without which none
    becomes zero.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        strength: float,
        *,
        kinds: Collection[str] = DEFAULT_KINDS,
    ) -> None:
        check_strength("GroupLasso", strength)
        self.strength = strength
        plain = unwrap(model)
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        self._groups: list[tuple[Group, list[Place], Tensor]] = []
        taken: set[int] = set()
        for group in graph.groups():
            if group.kind not in kinds:
                continue
            made_by = [
                p
                for p in places(plain, group, graph.labels, ("out", "along"))
                if id(p.weight) not in taken and p.weight.is_floating_point()
            ]
            if any(p.role == "out" for p in made_by):
                taken |= {id(p.weight) for p in made_by}
                sizes = [
                    count_units(p.labels, group.size) * (p.weight.numel() // p.weight.shape[p.dim])
                    for p in made_by
                ]
                self._groups.append((group, made_by, torch.stack(sizes).sum(0)))
        if not self._groups:
            raise SelectionError(f"No group of {', '.join(kinds)} can be cut and is produced by a weight.")
        targets: dict[int, Target] = {id(p.weight): p.target for _, ps, _ in self._groups for p in ps}
        settings = {"group lasso": repr(strength), "groups": ", ".join(g.name for g, _, _ in self._groups)}
        super().__init__(model, Selection(tuple(targets.values()), ()), settings)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        self.step += 1
        rates = learning_rates(optimizer)
        for group, made_by, sizes in self._groups:
            rate = next((rates[id(p.weight)] for p in made_by if id(p.weight) in rates), 0.0)
            norms = _norms(made_by, group.size)
            factors = (1 - rate * self.strength * sizes.sqrt() / norms).clamp(min=0)
            for p in made_by:
                inside = torch.where(p.labels >= 0, factors[p.labels.clamp(min=0)], 1.0)
                shape = [-1 if i == p.dim else 1 for i in range(p.weight.dim())]
                p.weight.mul_(inside.to(p.weight.dtype).view(shape))

    def penalty(self) -> float:
        """The value of the term now."""
        terms = [(sizes.sqrt() * _norms(made_by, group.size)).sum() for group, made_by, sizes in self._groups]
        return self.strength * float(torch.stack(terms).sum())

    def zero_units(self) -> dict[str, float]:
        """For each group the fraction of its units that are zero: as `sparsity`, `shrink_` takes them."""
        return {
            group.name: int((_norms(made_by, group.size) == 0).count_nonzero()) / group.size
            for group, made_by, _ in self._groups
        }


def batch_norm_scales(model: nn.Module) -> Where:
    """The scales of all batch norms, for `Regularize`: what network slimming penalises.

    Raises `SelectionError` if there are none.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    modules = unwrap(model).named_modules()
    names = tuple(f"{name}.weight" for name, m in modules if isinstance(m, kinds) and m.affine)
    if not names:
        raise SelectionError("The model has no batch norm with scales.")
    return Where(include=names, also=names)


def learning_rates(optimizer: Optimizer) -> dict[int, float]:
    """Learning rate of each parameter now, by identity."""
    return {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def _norms(made_by: Sequence[Place], size: int) -> Tensor:
    """L2 norms of units over all places, in float64."""
    squares = torch.zeros(size, dtype=torch.float64, device=made_by[0].weight.device)
    for p in made_by:
        rows = torch.linalg.vector_norm(index_rows(p.weight.detach(), p.dim), dim=1, dtype=torch.float64)
        squares += add_units(rows.square(), p.labels, size)
    return squares.sqrt()


def check_strength(owner: object, strength: float) -> None:
    """`SecateurError` unless a penalty is finite and not negative."""
    if not 0 <= strength < float("inf"):
        raise SecateurError(f"{owner}: a penalty is finite and at least 0.")
