"""Levels by evolution: switches between layers, kept where the whole model's outputs get nearer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.core.errors import ArtifactError, SecateurError
from secateur.core.files import write_text
from secateur.core.names import Where
from secateur.levels.by_error import least_error
from secateur.levels.case import Case, Data, opened
from secateur.levels.evolve import Evolution, Levels, generation
from secateur.levels.grid import Grid
from secateur.levels.measured import Measured, Tried, history_of
from secateur.patterns import Pattern, Unstructured
from secateur.progress import track
from secateur.solvers import Solver, SparseGPT


@torch.no_grad()
def by_search(
    model: nn.Module,
    sparsity: float,
    *,
    batches: Iterable[Any],
    solver: Solver | None = None,
    pattern: Pattern | None = None,
    where: Where | None = None,
    generations: int = 50,
    offspring: int = 32,
    seed: int = 0,
    step: float = 0.05,
    reach: float = 0.25,
    held_out: float = 0.125,
    folder: str | os.PathLike[str] | None = None,
) -> Measured:
    r"""Sparsities by evolution on the whole model's outputs, at exactly the asked total. No layer is pruned.

    Every layer is solved at several levels, as in `by_error`. Then each generation makes `offspring` from the
    best so far by one to three switches, of as many weights from one layer to another, and keeps the one
    with the least

    $$ \mathbb{E}\,\mathrm{KL}(p_\mathrm{dense} \,\|\, p_\mathrm{pruned}) $$

    per token (for a model without logits, the squared difference of outputs over their power), sieved on a
    16th of the batches (8 survive), a quarter (2) and all; on these, no generation is worse than the one
    before. It starts from the best of `uniform` and `by_error`.

    Args:
        model: any module; as before at the end, by an error too.
        sparsity: fraction of the selected weights to remove.
        batches: calibration data, arguments of the model.
        solver: prunes the layers; `SparseGPT()` if None.
        pattern: which entries may survive, `Unstructured()` if None; none that fixes the sparsity, as `NM`.
        where: which layers; pass the same to `prune_`.
        generations: to run. More of them go on from a folder.
        offspring: in each.
        seed: of all that is drawn.
        step: between the levels of a layer, as a sparsity, about.
        reach: how far a layer's sparsity may be from `sparsity`.
        held_out: share of the batches that play no part; the history has the distance on them beside that on
            the others, so that too much fitting shows.
        folder: for the weights at all levels, a file each, and the state after each generation: a later call
            with the same model, data and settings goes on there, with the same result to the bit. None keeps
            the weights in memory, one copy of the layers for each level.

    Returns:
        The allocation, for `prune_` and `prune_checkpoint`, with its history.

    Raises:
        SecateurError: one of its subclasses, for anything wrong with the input.

    Reference: Sieberling et al. 2024, EvoPress, algorithm 1. Differs from the paper: layers of unlike size
    trade, in units of a power of two; the last stage takes all batches, so that the best never gets worse.
    """
    if generations < 0:
        raise SecateurError(f"generations is at least 0; got {generations}.")
    how = Evolution(offspring=offspring, seed=seed)
    data = Data(
        batches, solver or SparseGPT(), pattern or Unstructured(), where, step, reach, held_out, folder
    )
    with opened(model, sparsity, data) as case:
        grid = case.database.grid
        path = None if case.folder is None else case.folder / f"search-{_key(grid, how)}.json"
        trail = _begun(case, path)
        for number in track(range(len(trail) - 1, generations + 1), "searching"):
            parent, before = _best(trail)
            levels, _ = generation(
                how, grid, parent, before.distance, number, len(case.fitting), case.distance
            )
            trail.append((levels, case.tried(f"generation {number}", levels)))
            _write(path, trail)
        trail = trail[: generations + 2]  # a folder may know of more
        settings = data.settings() | {"generations": repr(generations), "evolution": repr(how)}
        levels = _best(trail)[0]
        return Measured("by_search", sparsity, grid.shares(levels), tuple(t for _, t in trail), settings)


_Trail = list[tuple[Levels, Tried]]
"""What was tried: two starts, then each generation."""


def _best(trail: _Trail) -> tuple[Levels, Tried]:
    return min(trail, key=lambda one: one[1].distance)


def _begun(case: Case, path: Path | None) -> _Trail:
    """From the file, or both starts."""
    grid = case.database.grid
    if path is not None and path.is_file():
        return _read(path, grid)
    starts = {"uniform": (0,) * len(grid.names), "by error": least_error(case)}
    trail = [(levels, case.tried(what, levels)) for what, levels in starts.items()]
    _write(path, trail)
    return trail


def _key(grid: Grid, how: Evolution) -> str:
    """Of what decides a search, beside what decides the folder."""
    return hashlib.sha256(f"{grid} {how}".encode()).hexdigest()[:16]


def _write(path: Path | None, trail: _Trail) -> None:
    """Into the file, whole or not at all."""
    if path is not None:
        data = [[list(levels), one.what, one.distance, one.held_out] for levels, one in trail]
        write_text(path, json.dumps(data) + "\n")


def _read(path: Path, grid: Grid) -> _Trail:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        history = history_of([one[1:] for one in data])
        trail = [(tuple(int(k) for k in one[0]), tried) for one, tried in zip(data, history, strict=True)]
    except (OSError, KeyError, TypeError, ValueError):
        trail = []
    if len(trail) < 2 or not all(grid.holds(levels) for levels, _ in trail):
        raise ArtifactError(f"{path} is damaged: remove it to begin the search anew.")
    return trail
