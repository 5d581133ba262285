"""What may be kept of a group: alignment, minimum, largest and fixed sparsities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from secateur.core.errors import BudgetError, SelectionError, SparsityError
from secateur.core.names import matches

# Kinds whose unit is a block of channels; aligning their number aligns nothing.
BLOCKS = frozenset({"heads", "kv_groups", "queries", "repeats", "groups", "experts"})


@runtime_checkable
class GroupLike(Protocol):
    """What selection knows of a group: a name, a kind, how many units it has, and where they live.

    Each of `members` has `tensor`, `dim` and `role`. Groups are keys of mappings, so they are hashable.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def members(self) -> tuple[Any, ...]: ...
    def __hash__(self) -> int: ...


G = TypeVar("G", bound=GroupLike)


@dataclass(frozen=True)
class Constraint:
    """What may be kept of one group.

    Args:
        multiple_of: kept counts are multiples of this; the group's full size is allowed as well.
        minimum: units that stay in any case, at least 1. A smaller group stays whole.
        maximum_sparsity: largest fraction of the units that may go, in [0, 1].
        sparsity: fixed fraction of the units that goes whatever the budget, in [0, 1); None to let the budget
            decide. The allowed count nearest to it is taken, of two as near the smaller.

    Raises `SparsityError` for a sparsity outside its range, `BudgetError` for other numbers.
    """

    multiple_of: int = 1
    minimum: int = 1
    maximum_sparsity: float = 1.0
    sparsity: float | None = None

    def __post_init__(self) -> None:
        if self.multiple_of < 1 or self.minimum < 1:
            raise BudgetError(
                f"multiple_of and minimum are at least 1, as no group loses all its units; got "
                f"multiple_of={self.multiple_of}, minimum={self.minimum}."
            )
        if not 0 <= self.maximum_sparsity <= 1:
            raise SparsityError(f"maximum_sparsity is between 0 and 1; got {self.maximum_sparsity}.")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise SparsityError(
                f"A group's fixed sparsity is at least 0 and below 1, as no group loses all its units; got "
                f"{self.sparsity}."
            )
        if self.sparsity is not None and self.sparsity > self.maximum_sparsity:
            raise SparsityError(
                f"The fixed sparsity {self.sparsity} is above maximum_sparsity={self.maximum_sparsity}."
            )

    def later(self, dense: int, size: int) -> Constraint:
        """The same constraint for a group of `dense` units of which `size` are left.

        Sparsities count from the dense group. In pruning by steps they would otherwise compound: half, and
        half of that.

        >>> Constraint(sparsity=0.5, maximum_sparsity=0.6).later(dense=10, size=8)
        Constraint(multiple_of=1, minimum=4, maximum_sparsity=1.0, sparsity=0.375)
        """
        sparsity = None if self.sparsity is None else max(0.0, 1 - (1 - self.sparsity) * dense / size)
        return Constraint(self.multiple_of, self.least(dense), sparsity=sparsity)

    def least(self, size: int) -> int:
        """Units of a group of `size` that stay whatever the budget."""
        # The fraction that may go is rounded down, but for the error of the product.
        return max(self.minimum, size - math.floor(self.maximum_sparsity * size + 1e-9))


def constraints(
    groups: Iterable[G],
    *,
    multiple_of: int | Mapping[str, int] = 1,
    minimum: int | Mapping[str, int] = 1,
    maximum_sparsity: float | Mapping[str, float] = 1.0,
    sparsity: Mapping[str, float] | None = None,
) -> dict[G, Constraint]:
    """The constraint of each group, from settings by name or kind.

    A mapping's keys are glob patterns over the names of groups, or kinds; the first that matches decides, and
    a group that none matches keeps the default. A number stands for all groups; as `multiple_of`, for all but
    heads, kv_groups, queries, repeats, groups and experts, whose units are blocks of channels already.

    Raises `SelectionError` if a key matches no group.
    """
    groups = list(groups)
    settings: dict[str, Mapping[str, Any]] = {}
    for setting, value in {
        "multiple_of": multiple_of,
        "minimum": minimum,
        "maximum_sparsity": maximum_sparsity,
        "sparsity": sparsity or {},
    }.items():
        settings[setting] = value if isinstance(value, Mapping) else {"*": value}
        for key in settings[setting]:
            if key != "*" and not any(_matches(group, key) for group in groups):
                raise SelectionError(f"{setting}: {key!r} matches the name or kind of no group.")
    aligns_all = isinstance(multiple_of, Mapping)
    found = {}
    for group in groups:
        values = {s: next((v for k, v in m.items() if _matches(group, k)), None) for s, m in settings.items()}
        if group.kind in BLOCKS and not aligns_all:
            values["multiple_of"] = None
        found[group] = Constraint(**{s: v for s, v in values.items() if v is not None})
    return found


def _matches(group: GroupLike, key: str) -> bool:
    return key == group.kind or matches(group.name, key)
