"""One-shot pruning by a solver, layer after layer, each fitted to what the pruned ones before it pass on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.collect.batches import Batch, as_batches
from secateur.core.names import Selection, Where
from secateur.patterns import Pattern
from secateur.reconstruct.consumers import Consumer
from secateur.solvers import Solver
from secateur.stream.choose import Route, called, route_of, visible
from secateur.stream.sequence import segments, solve_all_
from secateur.stream.solving import Done, Job
from secateur.stream.states import States
from secateur.stream.tuning import Reconstruct
from secateur.stream.walk import Walk


@dataclass(frozen=True)
class Problem:
    """What a solver can prune of a model, and the way there.

    Attributes:
        selection: of weights that it can fit.
        consumers: the layers that they belong to.
        data: the batches.
        route: through the model.
    """

    selection: Selection
    consumers: tuple[Consumer, ...]
    data: list[Batch]
    route: Route


@torch.no_grad()
def problem_of(
    model: nn.Module, selection: Selection, solver: Solver, where: Where | None, batches: Iterable[Any] | None
) -> Problem:
    """What can be solved, as the first example shows it.

    The model is walked block by block (see `secateur.stream.walk`): a block that is done is not run again.
    Where that would not be the same as the model's own pass, the passes from there on are whole ones.

    Raises:
        StatsError: no batches, or a layer that `where` asks for whose inputs cannot be seen.
        SelectionError: nothing is left.
    """
    data = list(as_batches(batches, selection.targets[0].weight.device, f"{solver} fits weights to data"))
    selection, consumers = visible(model, selection, solver, where)
    route = route_of(model, consumers, data)
    selection, consumers = called(selection, consumers, route.chain, solver, where)
    return Problem(selection, consumers, data, route)


@torch.no_grad()
def solve_(
    model: nn.Module,
    problem: Problem,
    solver: Solver,
    pattern: Pattern,
    shares: Mapping[str, float],
    correction: float | None = None,
    reconstruct: Reconstruct | None = None,
) -> tuple[dict[str, Done], tuple[str, ...]]:
    """Prune the targets in the order in which the model runs them, in place; not undone on errors.

    Memory: the calibration batches, the hidden states between two blocks on all of them, the Gram matrix of
    one input, and the masks.

    Returns what is known of each layer, and notes.

    Raises:
        StatsError: a layer that no batch reaches.
        NonFiniteError: NaN or infinite inputs.
    """
    route, data = problem.route, problem.data
    groups = segments(route.chain, route.limit, problem.consumers)
    twin = correction is not None or reconstruct is not None
    done = solve_all_(
        Job(solver, pattern, shares, correction),
        Walk(model, route.chain, data, States()),
        Walk(model, route.chain, data, States()) if twin else None,
        groups,
        {t.name: t for t in problem.selection.targets},
        route.limit,
        reconstruct,
    )
    if max(groups) <= route.limit:
        return done, ()
    return done, (f"Behind {route.limit} blocks the model is run as a whole for every layer: {route.why}",)
