"""What all measured allocations begin with: data parted, layers solved at all levels, dense outputs noted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.allocation import Layer
from secateur.collect.batches import Batch, as_batches
from secateur.core.digest import take, take_state
from secateur.core.errors import SecateurError, SparsityError
from secateur.core.names import Target, Where, select, unwrap
from secateur.levels.database import Database, build
from secateur.levels.distance import Distance
from secateur.levels.grid import check_pattern, grid_of
from secateur.levels.measured import Tried
from secateur.levels.stitch import Stitched
from secateur.levels.store import Folder, Memory, Store
from secateur.oneshot import problem_of
from secateur.patterns import Pattern
from secateur.prune import check_targets, refuse_class
from secateur.reconstruct.order import measuring
from secateur.record import versions
from secateur.solvers import Solver

Levels = tuple[int | None, ...]
"""Of each layer; None is the dense one."""


@dataclass(frozen=True)
class Data:
    """What to measure on, and with what.

    Attributes:
        batches: all of them.
        solver: prunes the layers.
        pattern: which weights may survive.
        where: which layers; None for the usual.
        step: between the levels of a layer, about, as a sparsity.
        reach: how far a layer may be from the uniform sparsity.
        held_out: share of the batches that play no part and are measured beside.
        folder: for the levels' weights; None for memory.
    """

    batches: Iterable[Any]
    solver: Solver
    pattern: Pattern
    where: Where | None
    step: float
    reach: float
    held_out: float
    folder: str | os.PathLike[str] | None

    def settings(self) -> dict[str, str]:
        """As text, for reports; what is the same for all allocations."""
        parts = ("solver", "pattern", "where", "step", "reach", "held_out")
        return {name: repr(getattr(self, name)) for name in parts if getattr(self, name) is not None}


@dataclass(frozen=True, eq=False)
class Case:
    """A model at work: layers at any levels, and how far its outputs are from the dense ones.

    Attributes:
        database: layers at their levels.
        stitched: the model.
        fitting: on the data that decides.
        held_out: on data that does not; None if there is none.
        folder: for files of this model, data and settings; None without files.
        key: digest of model, data and settings.
    """

    database: Database
    stitched: Stitched
    fitting: Distance
    held_out: Distance | None
    folder: Path | None
    key: str
    known: dict[tuple[Levels, bool], float] = field(default_factory=dict)

    def distance(self, levels: Levels, batches: Sequence[int] | None = None) -> float:
        """Of the model at these levels, on some of the batches that decide, or on all."""
        if batches is None or len(batches) == len(self.fitting):
            return self._whole(levels, self.fitting, True)
        self.stitched.set(levels)
        return self.fitting(batches)

    def tried(self, what: str, levels: Levels) -> Tried:
        """The record of an allocation."""
        beside = None if self.held_out is None else self._whole(levels, self.held_out, False)
        return Tried(what, self.distance(levels), beside)

    def _whole(self, levels: Levels, distance: Distance, decides: bool) -> float:
        if (levels, decides) not in self.known:
            self.stitched.set(levels)
            self.known[levels, decides] = distance(range(len(distance)))
        return self.known[levels, decides]


@contextmanager
def opened(model: nn.Module, sparsity: float, data: Data) -> Iterator[Case]:
    """The case; the model is as before when this ends, by an error too.

    Raises `SecateurError` of some kind for anything wrong with the input.
    """
    refuse_class(data.solver)
    refuse_class(data.pattern)
    if not isinstance(data.solver, Solver):
        raise SecateurError(f"Levels are made by a solver, such as SparseGPT(); got {data.solver!r}.")
    if sparsity is None or not 0 <= sparsity <= 1:
        raise SparsityError(f"Sparsity is the fraction removed, between 0 and 1; got {sparsity}.")
    check_pattern(data.pattern)
    model = unwrap(model)
    selection = select(model, data.where, experts=True)
    check_targets(selection.targets, data.pattern)
    device = selection.targets[0].weight.device
    raw = list(as_batches(data.batches, device, f"{data.solver} fits weights to data").raw)
    mine, beside = parted(raw, data.held_out)
    problem = problem_of(model, selection, data.solver, data.where, mine)
    others = list(as_batches(beside, device, "")) if beside else []
    layers = [_layer(t, data.pattern) for t in problem.selection.targets]
    grid = grid_of(layers, sparsity, data.step, data.reach)
    key, folder, store = "", None, cast(Store, Memory())
    if data.folder is not None:
        key = _digest(model, [*problem.data, *others], data.settings())
        folder = Path(data.folder) / key[:16]
        store = Folder(folder)
    database = build(model, problem, grid, data.solver, data.pattern, store)
    with measuring(model):
        distances = Distance(model, problem.data), Distance(model, others) if others else None
        with Stitched(model, database) as stitched:
            yield Case(database, stitched, *distances, folder, key)


def parted(batches: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Batches that decide, and those held out: evenly spread, and none if there is but one."""
    if not 0 <= share < 1:
        raise SecateurError(f"held_out is a share of the batches, at least 0 and below 1; got {share}.")
    out = min(len(batches) - 1, max(1, round(share * len(batches)))) if share else 0
    chosen = {(2 * i + 1) * len(batches) // (2 * out) for i in range(out)}
    return (
        [b for i, b in enumerate(batches) if i not in chosen],
        [b for i, b in enumerate(batches) if i in chosen],
    )


def _layer(target: Target, pattern: Pattern) -> Layer:
    def weight() -> Tensor:
        return target.matrix

    return Layer(target.name, target.shape, target.weight.shape, pattern, weight, weight)


def _digest(model: nn.Module, data: Sequence[Batch], settings: Mapping[str, str]) -> str:
    """Of all that decides the weights at a level."""
    # The step and reach only choose among levels, so that other ones find those that are there.
    said = {k: v for k, v in settings.items() if k not in ("step", "reach")} | versions()
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    take_state(found, model.state_dict())
    for batch in data:
        for leaf in tree_leaves((batch.args, batch.kwargs)):
            if isinstance(leaf, Tensor):
                take(found, leaf)
            else:
                found.update(repr(leaf).encode())
    return found.hexdigest()
