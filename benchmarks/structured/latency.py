"""Is the shrunk model faster? Time against multiply-accumulates, dense and pruned in turn in one process."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import secateur as sc
from secateur import layers
from secateur.operators import operator_times, vector_width, why_not_faster

from . import cells
from .cells import Cell
from .language import PREFILL, SMOLLM2
from .ours import Secateur
from .sentences import STS
from .task import Task, Unsupported
from .vision import RESNET20


@dataclass(frozen=True)
class Case:
    """One model on one input: dense against pruned to each target, and with alternate blocks dropped."""

    name: str
    what: str
    task: Task
    inner: Callable[[nn.Module], Any]
    example: Callable[[], Any]
    rounds: int


METHODS = (
    Secateur("secateur", repair=None),
    Secateur("multiples of 8", repair=None, multiple_of=8),
    Secateur("multiples of 16", repair=None, multiple_of=16),
)


def _ids(batch: int, length: int) -> dict[str, Any]:
    ids = torch.randint(1000, 2000, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids}


CASES = (
    Case(
        "latency-resnet20",
        "ResNet-20, batch 128",
        RESNET20,
        lambda model: model,
        lambda: torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last),
        15,
    ),
    Case(
        "latency-minilm",
        "MiniLM-L6, batch 8, length 128",
        STS,
        lambda model: model.encoder,
        lambda: _ids(8, 128),
        15,
    ),
    Case(
        "latency-smollm2",
        f"SmolLM2-135M, prefill of {PREFILL} tokens",
        SMOLLM2,
        lambda model: model,
        lambda: _ids(1, PREFILL) | {"use_cache": False},
        7,
    ),
)


def paired(dense: nn.Module, pruned: nn.Module, example: Any, rounds: int) -> dict[str, float]:
    """The median over rounds of time pruned / time dense, each round one pass of both, in changing order."""
    ratios, seconds = [], []
    for i in range(rounds + 2):
        pair = {}
        for model in (dense, pruned) if i % 2 else (pruned, dense):
            started = time.perf_counter()
            with torch.no_grad():
                model(**example) if isinstance(example, dict) else model(example)
            pair[model is dense] = time.perf_counter() - started
        if i >= 2:  # the first rounds warm up
            ratios.append(pair[False] / pair[True])
            seconds.append(pair[True])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"time": middle, "low": low, "high": high, "dense_seconds": statistics.median(seconds)}


def run() -> None:
    """Every missing cell."""
    for case in CASES:
        dense = case.task.make()
        _cell(case, dense, "alternate blocks", "blocks", partial(_alternate, case=case))
        for target in case.task.targets:
            for method in METHODS:
                # Dropped layers are the alternate blocks above; heads have no number to align.
                if target.kind == "layers" or (target.kind == "heads" and method.multiple_of > 1):
                    continue
                variant = method.variants(case.task, target)[0]
                prune = partial(method.prune, task=case.task, target=target, variant=variant, seed=0)
                _cell(case, dense, target.label, method.name, prune)


def _cell(
    case: Case, dense: nn.Module, target: str, method: str, prune: Callable[[nn.Module], nn.Module]
) -> None:
    key = Cell(case.name, target, method, "", 0, "latency")
    if key in cells.read():
        return
    try:
        pruned = case.inner(prune(copy.deepcopy(dense)))
    except Unsupported as error:
        cells.write(key, {"note": str(error)})
        return
    example = case.example()
    models = case.inner(dense), pruned
    before, after = (sc.measure(m, example, runs=1) for m in models)
    assert before.macs and after.macs
    timed = paired(*models, example, case.rounds)
    left = after.macs / before.macs
    # Of what the multiply-accumulates fell, the share by which the time fell.
    share = (1 - timed["time"]) / (1 - left) if left < 1 else float("nan")
    why = why_not_faster(
        _timed(before, timed["dense_seconds"]),
        _timed(after, timed["dense_seconds"] * timed["time"]),
        *(operator_times(m, example) for m in models),
        max(vector_width(p) for p in dense.parameters()),
    )
    cells.write(key, {"macs": left, **timed, "share": share, "why": why or ""})


def _timed(cost: sc.Measurement, seconds: float) -> sc.Measurement:
    """The costs with the time that pairs of passes gave."""
    return replace(cost, latency=sc.Latency(seconds, seconds, seconds, 1, torch.get_num_threads()))


def _alternate(model: nn.Module, case: Case) -> nn.Module:
    """Every other droppable block of each stack dropped."""
    inner, example = case.inner(model), case.example()
    gone = [name for stack in layers.stacks(inner, example) for name in layers.every_other(stack)]
    layers.drop_layers_(inner, gone, example)
    return model
