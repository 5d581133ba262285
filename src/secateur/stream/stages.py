"""In which order the layers of a block are solved, and which of them are measured in one pass."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import StatsError
from secateur.reconstruct.consumers import Consumer
from secateur.reconstruct.measure import Rows, Tokens
from secateur.reconstruct.order import Order, Stage, listening, measuring, merge, order_of
from secateur.solvers import Solver
from secateur.stream import ranks
from secateur.stream.sums import Sums
from secateur.stream.walk import Walk


def stop_of(walk: Walk) -> int | None:
    """Passes end with the next block, if there is one."""
    return walk.done + 1 if walk.done < len(walk.chain.blocks) else None


def known_order(walk: Walk, consumers: Sequence[Consumer]) -> Order | None:
    """The order as the first example showed it, if each layer was called once and none has siblings."""
    heard = walk.chain.heard
    kinds = Counter(kind_of(c.name) for c in consumers)
    if any(len(heard.get(c.name, ())) != 1 or kinds[kind_of(c.name)] > 1 for c in consumers):
        return None
    by_name = {c.name: c for c in consumers}
    stages: dict[int, list[Consumer]] = {}
    for name, numbers in heard.items():  # in the order of first calls
        if name in by_name:
            stages.setdefault(numbers[0], []).append(by_name[name])
    once = dict.fromkeys(by_name, 1)
    return Order(tuple(tuple(stage) for stage in stages.values()), (once,) * len(walk.data))


@contextmanager
def called_once(walk: Walk, consumers: Sequence[Consumer]) -> Iterator[None]:
    """Raise `StatsError` if in what follows a layer is not called once for each batch, as it was at first."""
    calls: Counter[str] = Counter()

    def hear(consumer: Consumer, module: nn.Module, x: Tensor) -> None:
        calls[consumer.name] += 1

    with listening(walk.model, consumers, hear):
        yield
    for c in consumers:
        if calls[c.name] != len(walk.data):
            raise StatsError(
                f"{c.name} is called once for the first example, but {calls[c.name]} times for "
                f"{len(walk.data)} batches, so it is not known what it takes in: exclude it with "
                "where=Where(exclude=...), or prune by a criterion."
            )


def order_behind(walk: Walk, consumers: Sequence[Consumer]) -> tuple[Order, tuple[str, Sums] | None]:
    """The order of layers, and what the first of them takes in, which no other has an influence on."""
    rows, sums = Rows(Tokens()), Sums()
    first: list[str] = []
    stop = stop_of(walk)

    def hear(consumer: Consumer, module: nn.Module, x: Tensor) -> None:
        if not first:
            first.append(consumer.name)
        if consumer.name == first[0]:
            for (z,) in rows.blocks(module, x):
                sums.add(z)

    def run(i: int, batch: Any) -> None:
        rows.enter(batch)
        walk.run(i, stop)

    with listening(walk.model, consumers, hear):
        order = _agreed(order_of(walk.model, consumers, walk.data, run), consumers)
    if len(set(ranks.gather(first[0] if first else ""))) > 1 or not first:
        return order, None
    by_name = {c.name: c for c in consumers}
    sums.all_reduce(by_name[first[0]].inputs, walk.data_device)
    return order, (first[0], sums)


def _agreed(order: Order, consumers: Sequence[Consumer]) -> Order:
    """The same stages in all processes: layers share their inputs if they do in each that has seen them."""
    if not ranks.several():
        return order
    by_name = {c.name: c for c in consumers}
    seen = ranks.gather(_names(order))
    at = [{c: k for k, names in enumerate(stages) for c in names} for stages in seen]
    everywhere: list[str] = []
    for stages in seen:  # experts that only some have seen stand behind what was called before them
        merge(everywhere, [name for names in stages for name in names])
    agreed: dict[tuple[int | None, ...], list[Consumer]] = {}
    for name in everywhere:
        agreed.setdefault(tuple(a.get(name) for a in at), []).append(by_name[name])
    return Order(tuple(tuple(stage) for stage in agreed.values()), order.calls)


def _names(order: Order) -> list[list[str]]:
    return [[c.name for c in stage] for stage in order.stages]


def unseen_of(order: Order, consumers: Sequence[Consumer], solver: Solver) -> list[Consumer]:
    """Experts that no token reaches; raise `StatsError` for any other layer that is not called."""
    reached = {c.name for stage in order.stages for c in stage}
    kinds = {kind_of(name) for name in reached}
    missing = [c for c in consumers if c.name not in reached]
    for c in missing:
        if kind_of(c.name) == c.name or kind_of(c.name) not in kinds:
            raise StatsError(
                f"No batch reaches {c.name}, so {solver} cannot fit it to anything: exclude it with "
                "where=Where(exclude=...), or prune by a criterion"
                "."
            )
    return missing


def kind_of(name: str) -> str:
    """A name without the last of its numbers: that of an expert among its siblings."""
    if name.endswith("]"):
        return name[: name.rindex("[")] + "[*]"
    return re.sub(r"\.\d+\.(?!.*\.\d+\.)", ".*.", name)


def together(order: Order, walk: Walk) -> list[list[Stage]]:
    """Stages to measure in one pass: one by one, but experts all at once."""
    kinds: dict[tuple[str, ...], list[Stage]] = {}
    for stage in order.stages:
        kinds.setdefault(tuple(kind_of(c.name) for c in stage), []).append(stage)
    found: list[list[Stage]] = []
    for stages in kinds.values():
        if len(stages) > 1 and _independent(walk, stages):
            found.append(stages)
        else:
            found.extend([stage] for stage in stages)
    position = {c.name: k for k, stage in enumerate(order.stages) for c in stage}
    return sorted(found, key=lambda stages: position[stages[0][0].name])


def _independent(walk: Walk, stages: Sequence[Stage]) -> bool:
    """Whether the second of alike stages does not depend on the first: told by gradients of one pass."""
    a, b = stages[0][0], stages[1][0]
    if a.stack is not None and b.stack is not None:
        return True
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []

    def hear(consumer: Consumer, module: nn.Module, x: Tensor) -> None:
        if consumer is b:
            inputs.append(x)

    holder = walk.model.get_submodule(a.holders[0])
    weight = holder.get_parameter(a.name.rpartition(".")[2])
    wanted = weight.requires_grad
    handle = holder.register_forward_hook(lambda m, args, out: outputs.append(out))
    try:
        weight.requires_grad_(True)
        for i in range(len(walk.data)):
            with measuring(walk.model), listening(walk.model, [b], hear), torch.enable_grad():
                walk.run(i, stop_of(walk))
            if inputs and outputs:
                break
            inputs.clear()
            outputs.clear()
    finally:
        handle.remove()
        weight.requires_grad_(wanted)
    reached = [x for x in inputs if x.requires_grad]
    depends = False
    if reached and outputs:
        with torch.enable_grad():
            gradients = torch.autograd.grad([x.sum() for x in reached], outputs, allow_unused=True)
        depends = any(g is not None for g in gradients)
    return not ranks.any_(depends)


def groups_of(stages: Sequence[Stage]) -> list[list[Consumer]]:
    """Layers whose inputs are the same and unfolded alike."""
    found: list[list[Consumer]] = []
    for stage in stages:
        by_geometry: dict[tuple[Any, ...], list[Consumer]] = {}
        for c in stage:
            by_geometry.setdefault(c.geometry, []).append(c)
        found.extend(by_geometry.values())
    return found
