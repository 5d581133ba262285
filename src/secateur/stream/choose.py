"""Which of the selected weights a solver can fit, and how the model is walked to do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from secateur.collect.batches import Batch
from secateur.core.errors import SecateurError, SelectionError, StatsError
from secateur.core.layout import is_stack
from secateur.core.names import Selection, Where
from secateur.reconstruct.consumers import Consumer, consumers_of
from secateur.reconstruct.passes import Chain
from secateur.reconstruct.stacks import experts_of
from secateur.solvers import Solver
from secateur.stream.stages import kind_of
from secateur.stream.walk import Weights, enterable, first_line

_UNHEARD = "its module is not called with the first example"


@dataclass(frozen=True)
class Route:
    """The way through a model.

    Attributes:
        chain: of its blocks.
        limit: behind so many of them it can be entered.
        why: not behind more.
    """

    chain: Chain
    limit: int
    why: str | None


def example_of(data: Sequence[Batch]) -> Batch:
    """The first example, if the first batch can be cut."""
    try:
        return data[0].part(0, 1) if data[0].size > 1 else data[0]
    except StatsError:
        return data[0]


def route_of(
    model: nn.Module, consumers: Sequence[Consumer], data: Sequence[Batch], weights: Weights | None = None
) -> Route:
    """The way, as the first example shows it.

    Raises `StatsError` if the model cannot take it.
    """
    try:
        return Route(*enterable(model, consumers, example_of(data), weights))
    except SecateurError:
        raise
    except Exception as error:  # a forward pass can fail in as many ways as there are models
        raise StatsError(
            f"{type(model).__name__} fails on the first example: {first_line(error)} Batches hold the "
            "arguments of the model."
        ) from error


def visible(
    model: nn.Module, selection: Selection, solver: Solver, where: Where | None
) -> tuple[Selection, tuple[Consumer, ...]]:
    """The selection without weights whose inputs no hook sees; these are left alone, with the reason.

    Raises `StatsError` if they were asked for, by a `where`, and `SelectionError` if none is left.
    """
    stacks = {t.name for t in selection.targets if is_stack(t.module, t.attribute)}
    consumers, reasons = consumers_of(model, [t.name for t in selection.targets if t.name not in stacks])
    for t in selection.targets:
        if t.name in stacks:
            consumers += experts_of(t.name, t.name.rpartition(".")[0], t.module, t.attribute)
    return _without(selection, reasons, solver, where), consumers


def called(
    selection: Selection,
    consumers: Sequence[Consumer],
    chain: Chain,
    solver: Solver,
    where: Where | None,
) -> tuple[Selection, tuple[Consumer, ...]]:
    """The selection without layers that are never called, such as one whose weight is multiplied elsewhere.

    One of several experts counts as called if another is. Errors as `visible`.
    """
    kinds = {kind_of(name) for name in chain.before if kind_of(name) != name}
    reasons = {
        c.parameter: _UNHEARD
        for c in consumers
        if c.name not in chain.before and kind_of(c.name) not in kinds
    }
    chosen = _without(selection, reasons, solver, where)
    return chosen, tuple(c for c in consumers if c.parameter not in reasons)


def _without(selection: Selection, reasons: dict[str, str], solver: Solver, where: Where | None) -> Selection:
    if where is not None:
        for name, reason in reasons.items():
            raise StatsError(
                f"{solver} cannot see the inputs of {name}, {reason}: exclude it with "
                "where=Where(exclude=...), or prune by a criterion."
            )
    left = tuple(t for t in selection.targets if t.name not in reasons)
    if not left:
        name, reason = next(iter(reasons.items()))
        raise SelectionError(f"{solver} can fit none of the selected weights, {name} for one: {reason}.")
    unseen = tuple((name, f"a solver cannot see its inputs: {reason}") for name, reason in reasons.items())
    return Selection(left, (*selection.skipped, *unseen))
