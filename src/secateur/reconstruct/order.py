"""Which consumers take in the same tensor, and in which order they are executed."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.collect.batches import Batch
from secateur.core.errors import StatsError
from secateur.core.modes import eager_experts, evaluation, unfused
from secateur.reconstruct.consumers import Consumer
from secateur.reconstruct.stacks import hearing_experts

Stage = tuple[Consumer, ...]
"""Consumers that take in the same tensors, in the order of their first calls."""

Hear = Callable[[Consumer, nn.Module, Tensor], None]


@contextmanager
def listening(model: nn.Module, consumers: Iterable[Consumer], hear: Hear) -> Iterator[None]:
    """While this holds, `hear` gets the input of every call of these layers, just before the call."""
    handles = []
    consumers = list(consumers)
    try:
        for consumer in consumers:
            if consumer.stack is not None:
                continue
            for path in consumer.holders:
                hook = partial(_heard, consumer, hear)
                module = model.get_submodule(path)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        with hearing_experts(model, consumers, hear):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _heard(consumer: Consumer, hear: Hear, module: nn.Module, args: Any, kwargs: Any) -> None:
    # The tensor itself, not a detached view of it: which consumers share it is told by its identity.
    hear(consumer, module, args[0] if args else next(iter(kwargs.values())))


@contextmanager
def measuring(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, kernels that hooks see into; torch's random state is put back."""
    devices = {p.device for m in models for p in m.parameters() if p.is_cuda}
    with torch.random.fork_rng([*devices]), torch.no_grad(), unfused():
        if len(models) == 1:
            with evaluation(models[0]), eager_experts(models[0]):
                yield
        else:
            with evaluation(models[0]), eager_experts(models[0]), measuring(*models[1:]):
                yield


class Inputs:
    """Numbers tensors: the same one, not written to in between, has the same number.

    Holds no tensor alive. After the memory of a dead one is used again, the number is a new one.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._next = 0
        self.heard: dict[str, list[int]] = {}  # by consumer, one for each call

    def hear(self, consumer: Consumer, original: Tensor) -> None:
        """Note one call."""
        self.heard.setdefault(consumer.name, []).append(self._number(original))

    def _number(self, x: Tensor) -> int:
        version = -1 if x.is_inference() else x._version
        known = self._seen.get(id(x))
        if known is not None and known[0]() is x and known[1] == version:
            return known[2]
        self._next += 1
        self._seen[id(x)] = (weakref.ref(x), version, self._next)
        return self._next


@dataclass(frozen=True)
class Order:
    """What one pass over the data shows.

    Attributes:
        stages: in the order of execution; consumers that are never called are in none.
        calls: for each batch, how often a consumer was called.
    """

    stages: tuple[Stage, ...]
    calls: tuple[Mapping[str, int], ...]

    @property
    def several(self) -> bool:
        """Whether the data is more than one batch."""
        return len(self.calls) > 1


def order_of(
    model: nn.Module,
    consumers: Sequence[Consumer],
    data: Iterable[Batch],
    run: Callable[[int, Batch], object] | None = None,
) -> Order:
    """Consumers grouped by the tensors that they take in; one pass over the data.

    `run` says how the model goes over a batch; by default it goes from the beginning to the end.
    """
    inputs = Inputs()
    order: list[str] = []
    calls: list[str] = []
    times: list[Mapping[str, int]] = []

    def hear(consumer: Consumer, module: nn.Module, x: Tensor) -> None:
        inputs.hear(consumer, x)
        calls.append(consumer.name)

    with measuring(model), listening(model, consumers, hear):
        for i, batch in enumerate(data):
            if run is None:
                batch.forward(model)
            else:
                run(i, batch)
            merge(order, calls)
            times.append(Counter(calls))
            calls.clear()
    by_name = {c.name: c for c in consumers}
    stages: dict[tuple[int, ...], list[Consumer]] = {}
    for name in order:
        stages.setdefault(tuple(inputs.heard[name]), []).append(by_name[name])
    return Order(tuple(tuple(stage) for stage in stages.values()), tuple(times))


def merge(order: list[str], calls: Sequence[str]) -> None:
    """Enter layers that a batch called for the first time (experts) behind what it called before them."""
    at = -1
    for name in dict.fromkeys(calls):
        if name in order:
            at = max(at, order.index(name))
        else:
            at += 1
            order.insert(at, name)


def check_shared(groups: Iterable[Sequence[Consumer]], inputs: Inputs) -> None:
    """Raise `StatsError` unless in this pass, too, all consumers of a group took in the same tensors."""
    for first, *others in groups:
        for other in others:
            if inputs.heard.get(first.name) != inputs.heard.get(other.name):
                raise StatsError(
                    f"{first.name} and {other.name} had the same inputs in one pass over the data, but not "
                    "in the next: pass batches as a list, and a model that does the same with the same batch."
                )
