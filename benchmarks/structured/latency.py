"""Is the shrunk model faster? Time against multiply-accumulates, dense and pruned in turn in one process."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import secateur as sc
from secateur import layers

from . import cells
from .cells import Cell
from .language import PREFILL, SMOLLM2
from .sentences import STS
from .task import Method, Task, Unsupported
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


def run(methods: list[Method]) -> None:
    """Every missing cell."""
    for case in CASES:
        dense = case.task.make()
        _cell(case, dense, "alternate blocks", "blocks", partial(_alternate, case=case))
        for target in case.task.targets:
            for method in methods:
                if target.kind == "layers" or method.name.startswith("random"):
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
    before, after = (sc.measure(m, example, runs=1).macs for m in (case.inner(dense), pruned))
    assert before and after
    timed = paired(case.inner(dense), pruned, example, case.rounds)
    # Of what the multiply-accumulates fell, the share by which the time fell.
    share = (1 - timed["time"]) / (1 - after / before) if after < before else float("nan")
    cells.write(key, {"macs": after / before, **timed, "share": share})


def _alternate(model: nn.Module, case: Case) -> nn.Module:
    """Every other droppable block of each stack dropped."""
    inner, example = case.inner(model), case.example()
    gone = [name for stack in layers.stacks(inner, example) for name in layers.every_other(stack)]
    layers.drop_layers_(inner, gone, example)
    return model
