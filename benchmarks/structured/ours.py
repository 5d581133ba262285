"""Secateur as a method, and random units by the same surgery."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import secateur as sc
from secateur import layers

from .task import Target, Task, Unsupported

SCORED = 8  # calibration batches by which layers are scored


SCOPES: dict[str, sc.Scope] = {
    "isomorphic": sc.Isomorphic(),
    "per cost": sc.Global(per_cost=True),
    "local": sc.Local(),
}
KINDS = {
    "macs": ("filters",),
    "heads": ("heads",),
    "ffn": ("neurons",),
    "width": ("neurons", "kv_groups"),
}


@dataclass(frozen=True)
class Secateur:
    """Gates as the criterion, on calibration data; the variants are the scope.

    Attributes:
        repair: how the weights that stay are fitted to the calibration data; None: not at all.
        multiple_of: what the kept numbers of units are multiples of.
        random: random units in place of the lowest scores, the same share everywhere.
    """

    name: str = "secateur"
    repair: str | None = "sequential"
    multiple_of: int = 1
    random: bool = False

    def variants(self, task: Task, target: Target) -> tuple[str, ...]:
        if self.random:
            return ("random",)
        if target.kind == "layers":  # dropping blocks knows no repair
            return ("block influence", "loss, greedy") if self.repair else ()
        # Of alike units, "per cost" and "isomorphic" rank the same way.
        if target.kind in ("heads", "ffn"):
            return ("isomorphic", "local")
        return ("isomorphic", "per cost", "local")

    def prune(self, model: nn.Module, task: Task, target: Target, variant: str, seed: int) -> nn.Module:
        if target.kind == "layers":
            return _drop(model, task, target, variant, seed)
        criterion: Any = sc.Random(seed) if self.random else sc.HeadImportance(normalise=None)
        try:
            sc.shrink_(
                model,
                task.example(),
                _budget(model, task, target),
                criterion=criterion,
                scope=SCOPES.get(variant, sc.Local()),
                kinds=KINDS[target.kind],
                batches=None if self.random else task.calibration(seed),
                loss=None if self.random else task.loss,
                multiple_of=self.multiple_of,
                repair=self.repair,  # type: ignore[arg-type]
            )
        except sc.SecateurError as error:
            raise Unsupported(f"{type(error).__name__}: {error}") from error
        return model


def _budget(model: nn.Module, task: Task, target: Target) -> sc.Budget:
    """The MACs of the target; for a share of like units, the parameters that are left without so many."""
    if target.kind in ("macs", "width"):
        return sc.Budget.macs(task.remains(target))
    graph = sc.Graph.trace(model, task.example())
    groups = [group for kind in KINDS[target.kind] for group in graph.groups(kind)]
    whole = graph.cost().params
    unit = whole - graph.cost({groups[0]: groups[0].size - 1}).params
    gone = math.ceil(target.removed * sum(group.size for group in groups))
    return sc.Budget.params(at_most=whole - gone * unit)


def _drop(model: nn.Module, task: Task, target: Target, variant: str, seed: int) -> nn.Module:
    """Whole blocks: by influence, by the loss after each of the ones dropped before, or at random."""
    example = task.example()
    names = [name for stack in layers.stacks(model, example) for name in stack.droppable]
    n = round(target.removed * len(names))
    batches = task.calibration(seed)[:SCORED]
    match variant:
        case "random":
            order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
            gone = [names[i] for i in order[:n].tolist()]
        case "block influence":
            gone = list(layers.lowest(layers.block_influence(model, batches), n))
        case _:
            return _greedy(model, task, n, batches)
    layers.drop_layers_(model, gone, example)
    return model


def _greedy(model: nn.Module, task: Task, n: int, batches: list[Any]) -> nn.Module:
    """The block whose loss grows least goes, n times; the rest are measured anew each time."""
    for _ in range(n):
        scores = layers.loss_increase(model, batches[:2], task.loss)
        layers.drop_layers_(model, layers.lowest(scores, 1), task.example())
    return model
