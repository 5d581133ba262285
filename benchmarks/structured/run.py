"""Runs what is missing of one task: all variants on validation data, then the chosen ones on test data."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

import secateur as sc

from . import cells
from .cells import Cell
from .task import Method, Target, Task, Unsupported, macs, parameters

BATCHNORM_BATCHES = 8
CONTENDERS = 3  # variants that a few steps of fine-tuning compare


def run(task: Task, methods: list[Method], seeds: int, tuned_seeds: int) -> None:
    """Every missing cell of the task: all targets as pruned, then fine-tuning, which takes longest.

    Random units are drawn `seeds` times. Other methods prune once, and what they give is fine-tuned
    `tuned_seeds` times, with the data in another order.
    """
    dense = task.make()
    cost = macs(dense, task)
    whole = Cell(task.name, "dense", "dense", "", 0, "test")
    if whole not in cells.read():
        values = {s: task.metric(dense, s) for s in ("valid", "test")}
        cells.write(whole, {"valid_raw": values["valid"], "raw": values["test"], "macs": cost})
    runs = [
        Run(task, target, method, seed, dense, cost)
        for target in task.targets
        for method in methods
        for seed in range(seeds if method.name.startswith("random") else 1)
        if method.variants(task, target)
    ]
    for one in runs:
        one.before()
    for one in runs:
        if task.tune and one.target.kind in task.tuned:
            one.after(tuned_seeds)


@dataclass(frozen=True)
class Run:
    """A method at a target with a seed."""

    task: Task
    target: Target
    method: Method
    seed: int
    dense: nn.Module
    cost: int

    def key(self, variant: str, stage: str, seed: int | None = None) -> Cell:
        """The cell of a variant at a stage."""
        seed = self.seed if seed is None else seed
        return Cell(self.task.name, self.target.label, self.method.name, variant, seed, stage)

    def pruned(self, variant: str) -> nn.Module:
        """A pruned copy of the dense model."""
        return self.method.prune(copy.deepcopy(self.dense), self.task, self.target, variant, self.seed)

    def before(self) -> None:
        """All variants on validation data, and those that are best there on test data."""
        for variant in self.method.variants(self.task, self.target):
            self._once(variant, "pruned", self._validate)
        rows = self._rows("pruned")
        for metric in ("valid_raw", "valid_bn") if self.task.batchnorm else ("valid_raw",):
            for variant in ranked(self.task, rows, metric)[:1]:
                self._once(variant, "test", self._test)

    def after(self, seeds: int) -> None:
        """The best variants by a few steps of fine-tuning, and the best of these by the whole recipe."""
        if self.method.name.startswith("random"):
            if self.seed >= seeds:
                return
            seeds = 1
        metric = "valid_bn" if self.task.batchnorm else "valid_raw"
        contenders = ranked(self.task, self._rows("pruned"), metric)[:CONTENDERS]
        if len(contenders) > 1:
            for variant in contenders:
                self._once(variant, "probe", partial(self._tune, probe=True))
            rows = {v: row for v, row in self._rows("probe").items() if v in contenders}
            contenders = ranked(self.task, rows, "valid_tuned")
        for variant in contenders[:1]:
            for i in range(seeds):
                seed = self.seed + i
                self._once(variant, "tuned", partial(self._tune, seed=seed), seed)

    def _once(
        self, variant: str, stage: str, work: Callable[[str], dict[str, Any]], seed: int | None = None
    ) -> None:
        key = self.key(variant, stage, seed)
        if key in cells.read():
            return
        started = time.perf_counter()
        try:
            values = work(variant)
        except Unsupported as error:
            values = {"note": str(error)}
        cells.write(key, values | {"seconds": round(time.perf_counter() - started, 1)})

    def _rows(self, stage: str) -> dict[str, dict[str, Any]]:
        done = cells.read()
        keys = {v: self.key(v, stage) for v in self.method.variants(self.task, self.target)}
        return {v: done[key] for v, key in keys.items() if key in done and "note" not in done[key]}

    def _validate(self, variant: str) -> dict[str, Any]:
        model = self.pruned(variant)
        values: dict[str, Any] = {
            "macs": macs(model, self.task) / self.cost,
            "parameters": parameters(model) / parameters(self.dense),
            "removed": removed(self.dense, model),
            "valid_raw": self.task.metric(model, "valid"),
        }
        if self.task.batchnorm:
            values["valid_bn"] = self.task.metric(repaired(model, self.task), "valid")
        return values

    def _test(self, variant: str) -> dict[str, Any]:
        model = self.pruned(variant)
        values = {"raw": self.task.metric(model, "test")}
        if self.task.batchnorm:
            values["bn"] = self.task.metric(repaired(model, self.task), "test")
        return values

    def _tune(self, variant: str, probe: bool = False, seed: int | None = None) -> dict[str, Any]:
        assert self.task.tune is not None
        model = self.pruned(variant)
        self.task.tune(model, self.task.probe if probe else None, self.seed if seed is None else seed)
        if probe:
            return {"valid_tuned": self.task.metric(model, "valid")}
        return {"tuned": self.task.metric(model, "test")}


def ranked(task: Task, rows: dict[str, dict[str, Any]], metric: str) -> list[str]:
    """The variants, best on validation data first."""
    return sorted(rows, key=lambda v: rows[v][metric], reverse=task.higher)


def repaired(model: nn.Module, task: Task) -> nn.Module:
    """A copy with the statistics of batch normalisation measured on the calibration data."""
    twin = copy.deepcopy(model)
    sc.reestimate_batchnorm_(twin, task.calibration(0)[:BATCHNORM_BATCHES])
    return twin


def removed(dense: nn.Module, pruned: nn.Module) -> dict[str, int]:
    """Rows taken out of linear layers and convolutions, summed over layers of the same last name."""
    before, after = dict(dense.named_parameters()), dict(pruned.named_parameters())
    total: dict[str, int] = {}
    for name, p in before.items():
        if p.ndim < 2:
            continue
        rows = p.shape[0] - (after[name].shape[0] if name in after else 0)
        if rows:
            kind = name.split(".")[-2]
            total[kind] = total.get(kind, 0) + rows
    return total
