"""What the layers of a block take in, in the pruned model and beside it in the dense one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from secateur.core.names import Target
from secateur.reconstruct.consumers import Consumer
from secateur.reconstruct.measure import Rows, Tokens
from secateur.reconstruct.order import Inputs, Order, Stage, check_shared, listening, measuring
from secateur.reconstruct.passes import Enough
from secateur.stream import ranks
from secateur.stream.stages import groups_of, stop_of
from secateur.stream.sums import Sums
from secateur.stream.walk import Walk


class Dense:
    """The dense model beside the pruned one: its walk, and the dense weights of the block at work."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self._saved: list[tuple[Tensor, Tensor]] = []

    def enter(self, targets: Sequence[Target]) -> None:
        """Take the weights of a block before they are pruned."""
        self._saved = [(t.weight, t.weight.detach().clone()) for t in targets]

    @contextmanager
    def weights(self) -> Iterator[None]:
        """While this holds, the block has its dense weights."""
        pruned = [w.data for w, _ in self._saved]
        for w, saved in self._saved:
            w.data = saved
        try:
            yield
        finally:
            for (w, _), data in zip(self._saved, pruned, strict=True):
                w.data = data


def sums_of(walk: Walk, stages: Sequence[Stage], order: Order, dense: Dense | None) -> dict[str, Sums]:
    """The sums of the first of each group, in one pass over the data."""
    groups = groups_of(stages)
    everyone = [c for group in groups for c in group]
    leaders = {group[0].name: Sums() for group in groups}
    inputs, rows = Inputs(), Rows(Tokens())
    waiting: dict[str, list[Tensor]] = {}
    unpaired: set[str] = set()
    left: Counter[str] = Counter()

    def heard(consumer: Consumer) -> None:
        left[consumer.name] -= 1
        if not any(n > 0 for n in left.values()):
            raise Enough

    def keep(consumer: Consumer, module: nn.Module, x: Tensor) -> None:
        if consumer.name in leaders:
            waiting.setdefault(consumer.name, []).append(x.clone())
        heard(consumer)

    def add(consumer: Consumer, module: nn.Module, z: Tensor) -> None:
        inputs.hear(consumer, z)
        if consumer.name in leaders:
            x = waiting[consumer.name].pop(0) if waiting.get(consumer.name) else None
            if x is None or x.shape != z.shape:
                unpaired.add(consumer.name)
                for (part,) in rows.blocks(module, z):
                    leaders[consumer.name].add(part)
            else:
                for part, dense_part in rows.blocks(module, z, x):
                    leaders[consumer.name].add(part, dense_part)
        heard(consumer)

    with measuring(walk.model):
        for i, batch in enumerate(walk.data):
            rows.enter(batch)
            calls = Counter({c.name: order.calls[i].get(c.name, 0) for c in everyone})
            if not any(calls.values()):
                continue
            waiting.clear()
            if dense is not None:
                left = calls.copy()
                with dense.weights(), listening(walk.model, everyone, keep):
                    dense.walk.run(i, stop_of(walk))
            left = calls.copy()
            with listening(walk.model, everyone, add):
                walk.run(i, stop_of(walk))
    check_shared(groups, inputs)
    for group in groups:
        sums = leaders[group[0].name]
        if ranks.any_(group[0].name in unpaired):
            sums.unpair()
        sums.all_reduce(group[0].inputs, walk.data_device)
    return leaders
