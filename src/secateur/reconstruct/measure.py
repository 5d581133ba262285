"""Moments of the inputs of consumers, in one model or in two side by side.

Shapes: N examples, T tokens or positions of an example, I inputs of a row of the layer's matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.collect import traffic
from secateur.collect.batches import Batch, as_batches
from secateur.collect.traffic import inputs_GNTI, with_examples
from secateur.core.errors import NonFiniteError, SecateurError
from secateur.core.names import unwrap
from secateur.progress import track
from secateur.reconstruct.consumers import Consumer
from secateur.reconstruct.moments import Covariance, CrossMoments, Halves, Joint, M, Moments, Splitting
from secateur.reconstruct.order import Inputs, Stage, check_shared, listening, measuring, order_of

T = TypeVar("T")

_UNCALLED = "its module was never called on this data"
_UNPAIRED = "it got inputs of other shapes in the pruned model than in the dense one"


@dataclass(frozen=True)
class Measured(Generic[M]):
    """Moments by the name of the consumer's weight, and reasons for those that could not be measured."""

    moments: dict[str, M]
    reasons: dict[str, str]


@dataclass(frozen=True)
class Tokens:
    """Which rows of a layer's input are counted.

    Args:
        positions: of a convolution, at most so many for each example, drawn anew for every call; None: all.
        seed: of the draw.
    """

    positions: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.positions is not None and self.positions < 1:
            raise SecateurError(f"positions=... is at least 1, or None for all; got {self.positions}.")


def moments(
    model: nn.Module, consumers: Sequence[Consumer], batches: Iterable[Any], tokens: Tokens | None = None
) -> Measured[Moments]:
    """Moments of the inputs of consumers over all calls of their modules, in two passes over the data.

    The model runs in evaluation mode and is left as it was. The first pass finds the consumers that share an
    input; they share one object. Tokens that the `attention_mask` `[N, T]` among a batch's keyword arguments
    marks with 0 are left out at linear layers whose input has its shape; elsewhere padding counts, as do the
    zeros around a convolution's input.

    Memory: 16 bytes times the square of the inputs (channels times taps) for each shared input.

    Raises:
        StatsError: no batches, or consumers that share their inputs in one pass but not in the next.
        NonFiniteError: NaN or infinite inputs.
    """
    model = unwrap(model)
    data = as_batches(batches, device_of(model), "Moments must be measured on data")
    order = order_of(model, consumers, data)
    halves = measure(model, order.stages, track(data, "measuring moments"), tokens or Tokens(), order.several)
    found = {name: both.whole for name, both in halves.items()}
    return Measured(found, {c.name: _UNCALLED for c in consumers if c.name not in found})


def cross_moments(
    dense: nn.Module,
    pruned: nn.Module,
    consumers: Sequence[Consumer],
    batches: Iterable[Any],
    tokens: Tokens | None = None,
) -> Measured[CrossMoments]:
    """Moments of the inputs of consumers in the dense and the pruned model, run side by side on each batch.

    Rows are paired by their position in the calls of a consumer, so both models must send it the same tokens:
    one that gets other shapes in the pruned model (an expert, when routing changes) is left out with that
    reason. Otherwise as `moments`.

    Args:
        dense: the original model.
        pruned: of the same architecture, removed slices zeroed: see `masked_twin`.
        consumers: of the dense model; the pruned one has the same names.
        batches: see `moments`.
        tokens: see `moments`.

    Memory: three times that of `moments`, and the inputs of the consumers on one batch.
    """
    dense, pruned = unwrap(dense), unwrap(pruned)
    data = as_batches(batches, device_of(dense), "Moments must be measured on data")
    order, how = order_of(dense, consumers, data), tokens or Tokens()
    shown = track(data, "measuring moments")
    halves = measure_both(dense, pruned, order.stages, shown, how, order.several)
    found = {name: both.whole for name, both in halves.items()}
    heard = {c.name for stage in order.stages for c in stage}
    missing = {c.name: _UNPAIRED if c.name in heard else _UNCALLED for c in consumers if c.name not in found}
    return Measured(found, missing)


Run = Callable[[int, Batch], object]
"""One pass of a model over a batch, which has a number."""


def measure(
    model: nn.Module,
    stages: Sequence[Stage],
    data: Iterable[Batch],
    tokens: Tokens,
    several: bool,
    run: Run | None = None,
) -> dict[str, Halves[Moments]]:
    """One pass over the data for all stages; `several` says whether it is more than one batch.

    `run` says how the model goes over a batch; by default it goes from the beginning to the end.
    """
    groups = groups_of(stages)
    leaders = {group[0].name for group in groups}
    sums = {name: Splitting(Covariance, several) for name in leaders}
    inputs, rows = Inputs(), Rows(tokens)
    number = 0

    def hear(consumer: Consumer, module: nn.Module, x: Tensor) -> None:
        inputs.hear(consumer, x)
        if consumer.name in leaders:
            for (part,) in rows.blocks(module, x):
                sums[consumer.name].add(number, part, part)

    with measuring(model), listening(model, (c for g in groups for c in g), hear):
        for number, batch in enumerate(data):
            rows.enter(batch)
            if run is None:
                batch.forward(model)
            else:
                run(number, batch)
    check_shared(groups, inputs)
    found = {n: s.moments() for n, s in sums.items() if s.count}
    for name, halves in found.items():
        _finite(name, halves.whole)
    return _spread(groups, found)


def measure_both(
    dense: nn.Module,
    pruned: nn.Module,
    stages: Sequence[Stage],
    data: Iterable[Batch],
    tokens: Tokens,
    several: bool,
    run: tuple[Run, Run] | None = None,
) -> dict[str, Halves[CrossMoments]]:
    """One pass over the data for all stages, of both models; without the consumers that do not pair.

    `run` says how each of the models goes over a batch; by default it goes from the beginning to the end.
    """
    run_dense, run_pruned = run or (lambda i, b: b.forward(dense), lambda i, b: b.forward(pruned))
    groups = groups_of(stages)
    leaders = [group[0] for group in groups]
    sums = {c.name: Splitting(Joint, several) for c in leaders}
    number = 0
    waiting: dict[str, list[Tensor]] = {c.name: [] for c in leaders}
    inputs, rows = Inputs(), Rows(tokens)
    unpaired: set[str] = set()

    def keep(consumer: Consumer, module: nn.Module, x: Tensor) -> None:
        inputs.hear(consumer, x)
        if consumer.name in waiting:
            waiting[consumer.name].append(x.clone())  # the model may write to it later

    def pair(consumer: Consumer, module: nn.Module, z: Tensor) -> None:
        name = consumer.name
        x = waiting[name].pop(0) if waiting[name] else z[:0]
        if x.shape != z.shape:
            unpaired.add(name)
        if name not in unpaired:
            for part_x, part_z in rows.blocks(module, x, z):
                sums[name].add(number, part_x, part_z)

    everyone = [c for group in groups for c in group]
    with measuring(dense, pruned), listening(dense, everyone, keep), listening(pruned, leaders, pair):
        for number, batch in enumerate(data):
            rows.enter(batch)
            run_dense(number, batch)
            run_pruned(number, batch)
            unpaired.update(name for name, left in waiting.items() if left)
            for left in waiting.values():
                left.clear()
    check_shared(groups, inputs)
    good = {n: s.moments() for n, s in sums.items() if n not in unpaired and s.count}
    for name, both in good.items():
        _finite(name, both.whole.dense)
        _finite(name, both.whole.pruned)
    return _spread(groups, good)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def groups_of(stages: Iterable[Stage]) -> list[list[Consumer]]:
    """Consumers whose inputs are the same, and unfolded alike."""
    groups: list[list[Consumer]] = []
    for stage in stages:
        by_geometry: dict[tuple[Any, ...], list[Consumer]] = {}
        for c in stage:
            by_geometry.setdefault(c.geometry, []).append(c)
        groups.extend(by_geometry.values())
    return groups


def _spread(groups: Iterable[Sequence[Consumer]], found: dict[str, T]) -> dict[str, T]:
    """The moments of the first of each group for all of it."""
    return {c.name: found[group[0].name] for group in groups if group[0].name in found for c in group}


def _finite(name: str, found: Moments) -> None:
    if not bool(torch.isfinite(found.covariance).all() & torch.isfinite(found.mean).all()):
        raise NonFiniteError(f"The inputs of {name} are not finite: look for NaN or overflow in the data.")


class Rows:
    """Inputs of calls as blocks of rows, those that `Tokens` counts."""

    def __init__(self, tokens: Tokens) -> None:
        self._positions = tokens.positions
        self._generator = torch.Generator().manual_seed(tokens.seed)
        self._real: Tensor | None = None

    def enter(self, batch: Batch) -> None:
        """Take the attention mask of the batch that comes."""
        mask = batch.kwargs.get("attention_mask")
        self._real = mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def blocks(self, module: nn.Module, *inputs: Tensor) -> Iterable[tuple[Float[Tensor, "T I"], ...]]:
        """The same rows of each input, few enough at a time to fit into a cache."""
        if inputs[0].numel() == 0:
            return
        kernel = getattr(module, "kernel_size", ())
        if not kernel:
            inputs = tuple(self._without_padding(x) for x in inputs)
        inputs = tuple(with_examples(module, x) for x in inputs)
        size = max(1, traffic.BLOCK // max(1, inputs[0][:1].numel() * math.prod(kernel)))
        for parts in zip(*(x.split(size) for x in inputs), strict=True):
            if parts[0].numel() == 0:
                continue
            unfolded = [inputs_GNTI(module, part)[0] for part in parts]
            chosen = self._choose(unfolded[0]) if kernel else None
            yield tuple((x.flatten(0, 1) if chosen is None else x.flatten(0, 1)[chosen]) for x in unfolded)

    def _without_padding(self, x: Tensor) -> Tensor:
        real = self._real
        if real is None or x.shape[:-1] not in (real.shape, (real.numel(),)):
            return x
        return x.flatten(0, -2)[real.flatten().to(x.device)]

    def _choose(self, x_NTI: Tensor) -> Tensor | None:
        n, t = x_NTI.shape[:2]
        if self._positions is None or t <= self._positions:
            return None
        drawn = torch.rand(n, t, generator=self._generator).topk(self._positions, dim=1).indices
        return (drawn + torch.arange(n)[:, None] * t).flatten().to(x_NTI.device)
