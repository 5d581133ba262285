"""Statistics of the inputs of layers, from forward passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.collect import traffic
from secateur.collect.batches import Batch
from secateur.collect.traffic import input_of, inputs_GNTI, understood, with_examples
from secateur.core.errors import StatsError
from secateur.core.modes import unfused
from secateur.core.names import Target
from secateur.stats import ActivationStat, Running

Sums = dict[tuple[str, ActivationStat], Running]

_WAYS_OUT = "exclude it with where=Where(exclude=...), or use another criterion"


def measure_inputs(
    model: nn.Module, targets: Sequence[Target], stats: Sequence[ActivationStat], batches: Iterable[Batch]
) -> dict[str, dict[ActivationStat, Tensor]]:
    """Values for each layer, over all calls of its module."""
    for t in targets:
        if not understood(t.module, t.attribute):
            raise StatsError(
                f"{stats[0]} is measured on the inputs of linear and convolution layers, but {t.name} is "
                f"part of a {type(t.module).__name__}: {_WAYS_OUT}."
            )
    sums: Sums = {}
    with torch.no_grad(), unfused(), _listening(model, targets, stats, sums):
        for batch in batches:
            batch.forward(model)
    return {t.name: {stat: _value(t, stat, sums) for stat in stats} for t in targets}


def _value(target: Target, stat: ActivationStat, sums: Sums) -> Tensor:
    if (target.name, stat) not in sums:
        raise StatsError(
            f"{target.name} received no input while measuring {stat}, because its module was never called: "
            f"{_WAYS_OUT}."
        )
    value = stat.value(sums[target.name, stat])
    rows = 1 if value.shape[0] == 1 else target.shape[0] // value.shape[0]
    return value.repeat_interleave(rows, dim=0)


@contextmanager
def _listening(
    model: nn.Module, targets: Sequence[Target], stats: Sequence[ActivationStat], into: Sums
) -> Iterator[None]:
    """While this holds, every forward pass adds to the sums."""
    by_weight = {id(t.weight): t for t in targets}
    handles = []
    try:
        for module in model.modules():
            target = by_weight.get(id(module._parameters.get("weight")))
            if target is not None and understood(module, "weight"):
                hook = partial(_hear, target.name, stats, into)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hear(
    name: str, stats: Sequence[ActivationStat], into: Sums, module: nn.Module, args: Any, kwargs: Any
) -> None:
    x = with_examples(module, input_of(args, kwargs))
    taps = math.prod(getattr(module, "kernel_size", ()))
    rows = max(1, traffic.BLOCK // max(1, x[:1].numel() * taps))
    for part in x.split(rows):
        tokens = inputs_GNTI(module, part).flatten(1, 2)
        for stat in stats:
            reduced = stat.reduce(tokens)
            running = into.setdefault((name, stat), Running(torch.zeros_like(reduced)))
            running.add(reduced, tokens.shape[1])
