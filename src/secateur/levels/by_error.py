"""Levels by the errors of the layers: the least sum that meets the total."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from secateur.core.names import Where
from secateur.levels.case import Case, Data, opened
from secateur.levels.cheapest import cheapest
from secateur.levels.measured import Measured
from secateur.patterns import Pattern, Unstructured
from secateur.progress import track
from secateur.solvers import Solver, SparseGPT


@torch.no_grad()
def by_error(
    model: nn.Module,
    sparsity: float,
    *,
    batches: Iterable[Any],
    solver: Solver | None = None,
    pattern: Pattern | None = None,
    where: Where | None = None,
    step: float = 0.05,
    reach: float = 0.25,
    probe: bool = True,
    held_out: float = 0.125,
    folder: str | os.PathLike[str] | None = None,
) -> Measured:
    r"""Sparsities with the least sum of weighted errors of the layers, at exactly the asked total.

    In one walk of the dense model every layer is pruned at levels about `step` apart, each fitted to what the
    dense model passes on. With $e_i(k)$ the squared error of layer $i$'s output over its power at level $k$,
    the levels are those that solve

    $$ \min_k \sum_i w_i\, e_i(k_i) \quad \text{at the asked total} $$

    by dynamic programming, exactly. $w_i$ is what the error of a layer does to the model's outputs: the
    distance from the dense outputs (per token $\mathrm{KL}(p_\mathrm{dense} \,\|\, p)$ of logits, else the
    squared difference over the power) with this layer alone pruned, at the uniform sparsity, over its error
    there. The model is not pruned.

    Args:
        model: any module; as before at the end, by an error too.
        sparsity: fraction of the selected weights to remove.
        batches: calibration data, arguments of the model.
        solver: prunes the layers; `SparseGPT()` if None.
        pattern: which entries may survive, `Unstructured()` if None; none that fixes the sparsity, as `NM`.
        where: which layers; pass the same to `prune_`.
        step: between the levels of a layer, as a sparsity, about.
        reach: how far a layer's sparsity may be from `sparsity`.
        probe: measure the weights, which takes a pass over the data for each layer; False for ones.
        held_out: share of the batches that play no part; the history has the distance on them, too.
        folder: for the weights at all levels, a file each; a later call with the same model, data and
            settings finds them there. None keeps them in memory, one copy of the layers for each level.

    Returns:
        The allocation, for `prune_` and `prune_checkpoint`; its history compares it with `uniform`.

    Raises:
        SecateurError: one of its subclasses, for anything wrong with the input.

    Reference: Frantar and Alistarh 2022, SPDY, section 3.1, for errors of layers in a knapsack. Differs from
    the paper: the total is of weights, not of time, and is met exactly; weights are measured one by one.
    """
    data = Data(
        batches, solver or SparseGPT(), pattern or Unstructured(), where, step, reach, held_out, folder
    )
    with opened(model, sparsity, data) as case:
        grid = case.database.grid
        levels = least_error(case, probe)
        history = (
            case.tried("uniform", (0,) * len(grid.names)),
            case.tried("by error", levels),
        )
        settings = data.settings() | {"probe": repr(probe)}
        return Measured("by_error", sparsity, grid.shares(levels), history, settings)


def least_error(case: Case, probe: bool = True) -> tuple[int, ...]:
    """Levels with the least sum of weighted errors."""
    errors = [case.database.errors(i) for i in range(len(case.database.grid.names))]
    weights = probed(case) if probe else [1.0] * len(errors)
    costs = [[w * e for e in of_layer] for w, of_layer in zip(weights, errors, strict=True)]
    return cheapest(case.database.grid, costs)


def probed(case: Case) -> list[float]:
    """What an error of each layer costs: the distance with it alone pruned, at level 0, over its error."""
    grid = case.database.grid
    weights = []
    for i in track(range(len(grid.names)), "probing layers"):
        alone: list[int | None] = [None] * len(grid.names)
        alone[i] = 0  # a level, not None
        error = case.database.errors(i)[-grid.low[i]]
        weights.append(case.distance(tuple(alone)) / error if error > 0 else 0.0)
    return weights
