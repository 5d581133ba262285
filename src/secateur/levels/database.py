"""Every layer pruned at every level, each fitted to what the dense model passes on.

Shapes: O outputs, I inputs of a layer's matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.core.errors import SecateurError
from secateur.core.names import Expert, Target
from secateur.levels.grid import Grid
from secateur.levels.store import Store
from secateur.oneshot import Problem
from secateur.patterns import Pattern
from secateur.solvers import Quadratic, Solver
from secateur.stream import ranks
from secateur.stream.sequence import segments, solve_all_
from secateur.stream.solving import Done, Job
from secateur.stream.states import States
from secateur.stream.walk import Walk


@dataclass(frozen=True, eq=False)
class Database:
    """Layers at their levels.

    Attributes:
        grid: which levels there are.
        targets: the layers, in the order of the grid.
        store: where the weights are.
    """

    grid: Grid
    targets: tuple[Target, ...]
    store: Store

    def weight(self, i: int, level: int) -> Tensor:
        """Of layer `i`, not to be written to."""
        return self.store.weight(self.grid.names[i], self.grid.removed(i, level))

    def errors(self, i: int) -> list[float]:
        """Squared error of the output over its power at each of the levels of layer `i`."""
        found = [self.store.error(self.grid.names[i], self.grid.removed(i, k)) for k in self.grid.levels(i)]
        assert None not in found
        return [float(e) for e in found if e is not None]


@torch.no_grad()
def build(
    model: nn.Module, problem: Problem, grid: Grid, solver: Solver, pattern: Pattern, store: Store
) -> Database:
    """Solve the layers that are not in the store yet, in one walk of the dense model, which does not change.

    Layers that share an input share its Gram matrix, and all levels of them its factorisation.

    Memory: as one-shot pruning, and the levels of one block.

    Raises errors of the solver; `StatsError` for a layer that no batch reaches.
    """
    if ranks.several():
        raise SecateurError("Levels are measured by one process: call this without torchrun.")
    numbers = {name: i for i, name in enumerate(grid.names)}
    survey = _Survey(grid, numbers, solver, pattern, store)
    targets = {t.name: t for t in problem.selection.targets}
    missing = [c for c in problem.consumers if not survey.known(c.parameter)]
    if missing:
        route = problem.route
        shares = grid.shares([0] * len(grid.names))
        solve_all_(
            Job(solver, pattern, shares, each=survey),
            Walk(model, route.chain, problem.data, States()),
            None,
            segments(route.chain, route.limit, missing),
            targets,
            route.limit,
            finished=lambda block, done: survey.keep(targets),
        )
    return Database(grid, tuple(targets[name] for name in grid.names), store)


@dataclass(frozen=True)
class _Part:
    """A matrix at one level, as it is stored."""

    weight: Tensor
    error: float


class _Survey:
    """Solves each matrix that comes along at all levels of its layer."""

    def __init__(
        self, grid: Grid, numbers: Mapping[str, int], solver: Solver, pattern: Pattern, store: Store
    ) -> None:
        self._grid, self._numbers, self._store = grid, numbers, store
        self._solver, self._pattern = solver, pattern
        self._parts: dict[str, dict[int, list[_Part]]] = {}  # by name and number of the expert, by level

    def known(self, name: str) -> bool:
        """Whether the store has a layer at all levels."""
        i = self._numbers[name]
        counts = (self._grid.removed(i, k) for k in self._grid.levels(i))
        return all(self._store.error(name, n) is not None for n in counts)

    def __call__(self, target: Target, objective: Quadratic) -> Done:
        dense_OI = target.matrix.float().clone()
        name = target.name.rpartition("[")[0] if isinstance(target, Expert) else target.name
        experts = len(getattr(target.module, target.attribute)) if isinstance(target, Expert) else 1
        number = target.index if isinstance(target, Expert) else 0
        i = self._numbers[name]
        units = dense_OI.numel() // self._pattern.unit
        levels: list[_Part] = []
        for k in self._grid.levels(i):
            least, more = divmod(self._grid.removed(i, k), experts)
            solved = self._solver(dense_OI, objective, self._pattern, (least + (number < more)) / units)
            weight = target.layout.restore(solved.weight, target.weight.shape).to(target.weight.dtype)
            error = objective.error(target.layout.matrix(weight).float(), dense_OI)
            levels.append(_Part(weight.clone(memory_format=torch.contiguous_format), error))
        self._parts.setdefault(name, {})[number] = levels
        return Done(torch.ones_like(dense_OI, dtype=torch.bool), 0.0, ())

    def keep(self, targets: Mapping[str, Target]) -> None:
        """Put what is solved into the store."""
        for name, parts in self._parts.items():
            i = self._numbers[name]
            experts = [parts[e] for e in sorted(parts)]
            for n, k in enumerate(self._grid.levels(i)):
                at = [levels[n] for levels in experts]
                whole = at[0].weight if targets[name].weight.ndim == at[0].weight.ndim else _stacked(at)
                error = sum(p.error for p in at) / len(at)
                self._store.put(name, self._grid.removed(i, k), whole, error)
        self._parts.clear()


def _stacked(parts: Sequence[_Part]) -> Tensor:
    return torch.stack([p.weight for p in parts])
