"""One-shot pruning by a solver, layer after layer, each fitted to what the pruned ones before it pass on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.collect.batches import Batch, as_batches
from secateur.core.errors import NonFiniteError, StatsError
from secateur.core.names import Target
from secateur.patterns import Pattern
from secateur.progress import track
from secateur.reconstruct.consumers import Consumer, consumers_of
from secateur.reconstruct.measure import Tokens, measure
from secateur.reconstruct.order import order_of
from secateur.reconstruct.passes import Passes, chain_of
from secateur.solvers import Quadratic, Solver

_WAYS_OUT = "exclude it with where=Where(exclude=...), or prune by a criterion"


@dataclass(frozen=True, eq=False)
class Done:
    """What is known of a layer once its weights are in the model.

    Attributes:
        keep: mask `[out, in]`.
        error: squared error of its output over its power, with the weights as they are stored.
        notes: of the solver.
    """

    keep: Tensor
    error: float
    notes: tuple[str, ...]


@torch.no_grad()
def solve_(
    model: nn.Module,
    targets: Sequence[Target],
    solver: Solver,
    pattern: Pattern,
    shares: Mapping[str, float],
    batches: Iterable[Any] | None,
) -> dict[str, Done]:
    """Prune the targets in the order in which the model runs them, in place; not undone on errors.

    Layers that take in the same tensor share their Gram matrix and what is derived from it. Each pass over
    the data begins at the block where the layer stands and ends at its inputs, where the model can be entered
    there; see `secateur.reconstruct.passes`.

    Memory: the calibration batches, the hidden states between two blocks on all of them, the Gram matrix of
    one input, and the masks.

    Raises:
        StatsError: no batches, or a layer whose inputs cannot be seen or that no batch reaches.
        NonFiniteError: NaN or infinite inputs.
    """
    data = list(as_batches(batches, targets[0].weight.device, f"{solver} fits weights to data"))
    consumers, reasons = consumers_of(model, [t.name for t in targets])
    for name, reason in reasons.items():
        raise StatsError(f"{solver} cannot see the inputs of {name}, {reason}: {_WAYS_OUT}.")
    order = order_of(model, consumers, data)
    reached = {c.name for stage in order.stages for c in stage}
    for t in targets:
        if t.name not in reached:
            raise StatsError(
                f"No batch reaches {t.name}, so {solver} cannot fit it to anything: {_WAYS_OUT}."
            )
    by_name = {t.name: t for t in targets}
    passes = Passes(model, chain_of(model, consumers, data[0]))
    done: dict[str, Done] = {}
    for stage in track(order.stages, "solving"):
        if passes.enter(stage) and not passes.agree(data[0], order.calls[0]):
            passes.whole()
        for objective, layers in _objectives(model, stage, data, passes, order.calls, solver):
            for c in layers:
                done[c.name] = _solve_one_(by_name[c.name], objective, solver, pattern, shares[c.name])
    return done


def _objectives(
    model: nn.Module,
    stage: Sequence[Consumer],
    data: Sequence[Batch],
    passes: Passes,
    calls: Sequence[Mapping[str, int]],
    solver: Solver,
) -> list[tuple[Quadratic, list[Consumer]]]:
    """The objective of each input of a stage, with the layers that take it in."""
    several = len(data) > 1
    found = measure(
        model, [tuple(stage)], data, Tokens(), several, lambda i, batch: passes.run(i, batch, calls[i])
    )
    by_input: dict[int, list[Consumer]] = {}
    for c in stage:
        by_input.setdefault(id(found[c.name]), []).append(c)
    objectives = []
    for layers in by_input.values():
        try:
            objectives.append((Quadratic(found[layers[0].name].whole.gram, solver.damping), layers))
        except (NonFiniteError, StatsError) as error:
            raise type(error)(f"{layers[0].name}: {error}") from None
    return objectives


def _solve_one_(
    target: Target, objective: Quadratic, solver: Solver, pattern: Pattern, sparsity: float
) -> Done:
    dense = target.matrix.float().clone()
    solved = solver(dense, objective, pattern, sparsity)
    target.weight.copy_(target.layout.restore(solved.weight, target.weight.shape))
    return Done(solved.keep, objective.error(target.matrix.float(), dense), solved.notes)
