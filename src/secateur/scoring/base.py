"""What a score of a structured group is, and where the group's weights are found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.collect import Loss
from secateur.core.errors import NonFiniteError, SecateurError, SelectionError, StatsError
from secateur.core.layout import layout_of
from secateur.core.names import Target


@runtime_checkable
class Member(Protocol):
    """One place where the axis of a group lives: see `secateur.graph`."""

    @property
    def tensor(self) -> str:
        """State-dict name of a parameter or buffer."""

    @property
    def dim(self) -> int:
        """Dimension of that tensor."""

    @property
    def role(self) -> str:
        """`out`: the tensor produces the axis; `in`: it consumes it; `along`: a bias, norm or buffer."""


@runtime_checkable
class Group(Protocol):
    """An axis that is cut in step everywhere; compared and hashed by identity."""

    @property
    def name(self) -> str:
        """What it is called in messages."""

    @property
    def size(self) -> int:
        """Units along the axis."""

    @property
    def members(self) -> Sequence[Any]:
        """Where it lives; each a `Member`."""


Labels = Callable[[Any, str, int], Tensor]
"""`(group, tensor, dim)` -> int64 `[tensor.shape[dim]]`: the unit that each index belongs to, -1 for none."""


@dataclass(frozen=True)
class Scores:
    """Scores of a group's units.

    Attributes:
        values: float64 `[size]` on the CPU, finite; larger means keep.
        notes: what a reader must know: members left out, a slower way taken, units that saw no data.
    """

    values: Tensor
    notes: tuple[str, ...] = ()


@runtime_checkable
class GroupCriterion(Protocol):
    """Turns groups into one score for each unit; larger means keep."""

    def __call__(
        self,
        model: nn.Module,
        groups: Sequence[Any],
        labels: Labels,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
    ) -> dict[Any, Scores]:
        """Scores of each group, all measured in the same passes over the data."""


@dataclass(frozen=True)
class Place:
    """A member that is a parameter: how it is seen as a matrix, and to which unit each index belongs."""

    tensor: str
    dim: int
    role: str
    target: Target
    labels: Tensor

    @property
    def weight(self) -> Tensor:
        """The live parameter."""
        return self.target.weight


def places(
    model: nn.Module, group: Group, labels: Labels, roles: str | tuple[str, ...] = "all"
) -> list[Place]:
    """The parameters among a group's members, in order of names; a tied one once for each dimension.

    Buffers are left out: the statistics of a norm are not weights. `roles` keeps members of these roles.
    """
    wanted = (roles,) if isinstance(roles, str) else roles
    found: dict[tuple[int, int], Place] = {}
    for member in sorted(group.members, key=lambda m: (m.tensor, m.dim, m.role)):
        target = target_of(model, member.tensor, group)
        if target is None or not ("all" in wanted or member.role in wanted):
            continue
        units = labels(group, member.tensor, member.dim)
        if units.shape != target.weight.shape[member.dim : member.dim + 1] or int(units.max()) >= group.size:
            raise SecateurError(
                f"The labels of {group.name} for dimension {member.dim} of {member.tensor} do not fit: one "
                f"unit below {group.size} for each of {target.weight.shape[member.dim]} indices is needed."
            )
        place = Place(member.tensor, member.dim, member.role, target, units.to(target.weight.device))
        found.setdefault((id(target.weight), member.dim), place)
    return list(found.values())


def target_of(model: nn.Module, name: str, group: Group) -> Target | None:
    """A parameter by its name, None for a buffer; `SelectionError` if the model has neither, or no values."""
    prefix, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(prefix)
    except AttributeError:
        module = nn.Module()
    parameter = module._parameters.get(attribute)
    if parameter is not None:
        if parameter.is_meta:
            raise SelectionError(
                f"{name} has no values yet (it is on the meta device): load the weights first."
            )
        return Target(name, module, attribute, layout_of(module, attribute))
    if module._buffers.get(attribute) is None:
        raise SelectionError(
            f"{group.name} has {name} as a member, which the model does not have: trace the model anew."
        )
    return None


def finished(group: Group, values: Tensor, notes: Iterable[str] = ()) -> Scores:
    """Scores in their final form; `NonFiniteError` if one is NaN or infinite."""
    values = values.detach().double().cpu()
    if values.shape != (group.size,):
        raise StatsError(
            f"{group.name} has {group.size} units but got scores of shape {tuple(values.shape)}."
        )
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            f"The scores of {group.name} are not finite: look for NaN or overflow in its weights or the data."
        )
    return Scores(values, tuple(dict.fromkeys(notes)))


def per_layer(values: Tensor, how: str | None) -> Tensor:
    """Scores of a group divided by the mean, max, sum or L2 norm of their sizes; all-zero ones stay."""
    if how is None:
        return values
    size = values.abs()
    by = {"mean": size.mean(), "max": size.max(), "sum": size.sum(), "l2": size.square().sum().sqrt()}[how]
    return values / by if bool(by > 0) else values


def check_choice(owner: str, setting: str, value: object, choices: Sequence[object]) -> None:
    """Raise `SecateurError` unless a setting has one of its values."""
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise SecateurError(f"{owner}({setting}=...) is one of {listed}; got {value!r}.")
