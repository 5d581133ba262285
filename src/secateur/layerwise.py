"""How much a model suffers when one layer at a time is pruned, and allocations that follow from it."""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from glob import escape as as_glob
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool
from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from secateur.allocation import Custom, Layer, custom
from secateur.collect import Loss, collect
from secateur.collect.batches import Batches, as_batches, mean_loss
from secateur.core.bulk import zero_
from secateur.core.errors import BudgetError, NonFiniteError, PatternError, SecateurError, SparsityError
from secateur.core.files import write_text
from secateur.core.modes import evaluation
from secateur.core.names import Target, Where, select
from secateur.core.topk import count
from secateur.criteria import Criterion
from secateur.patterns import Pattern, Unstructured
from secateur.printing import printed
from secateur.progress import track
from secateur.prune import as_layer, check_targets, refuse_class
from secateur.record import versions

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class LayerSensitivity:
    """What became of the metric when this layer alone was pruned.

    Attributes:
        name: of the parameter.
        shape: of the parameter as stored.
        units: what the pattern can remove: weights, or blocks.
        removed: units removed at each tested sparsity.
        values: the metric at each tested sparsity.
        gap: the pattern cannot have all sparsities between 0 and the first tested one (`NM`); none is used.
    """

    name: str
    shape: tuple[int, ...]
    units: int
    removed: tuple[int, ...]
    values: tuple[float, ...]
    gap: bool


@dataclass(frozen=True)
class Sensitivity:
    """The metric of a model with one layer pruned, for each layer and each of `sparsities` (ascending).

    `baseline` is the metric of the model as it was; a *drop* is how much worse than that a value is,
    whichever direction is better.
    """

    settings: Mapping[str, str]
    sparsities: tuple[float, ...]
    baseline: float
    higher_is_better: bool
    layers: tuple[LayerSensitivity, ...]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str] = field(default_factory=versions)

    def drops(self) -> dict[str, tuple[float, ...]]:
        """For each layer, how much worse the metric is at each sparsity; negative where it is better."""
        sign = 1 if self.higher_is_better else -1
        return {x.name: tuple(sign * (self.baseline - v) for v in x.values) for x in self.layers}

    def allocation(self, tolerance: float) -> Custom:
        """For each layer the largest tested sparsity whose drop is at most `tolerance`; 0 if there is none.

        The layers were tried one at a time: pruned together, they cost more than `tolerance`. Pass no
        sparsity to `prune_` with it.

        Raises `SecateurError` if the tolerance is negative or NaN.
        """
        if not tolerance >= 0:
            raise SecateurError(f"A tolerance is at least 0, in the units of the metric; got {tolerance}.")

        def largest(drops: Sequence[float]) -> float:
            # 0.911 - 0.901 is a little above 0.01.
            fine = [d <= tolerance or math.isclose(d, tolerance) for d in drops]
            return max((s for s, ok in zip(self.sparsities, fine, strict=True) if ok), default=0.0)

        return custom({as_glob(name): largest(drops) for name, drops in self.drops().items()})

    def allocation_for(self, sparsity: float) -> Custom:
        """The allocation of one tolerance for all layers, chosen such that the total is `sparsity`.

        A layer's sparsity grows with the tolerance: linearly between the tested points, from 0 on, passing
        over sparsities that drop more than a larger one. It meets the total to the unit,
        `count(sparsity, units)`, whole units going by largest remainder.

        Raises:
            SparsityError: `sparsity` is not in [0, 1].
            BudgetError: the total lies above the largest tested sparsity, or where a layer would need a
                sparsity that its pattern cannot have.
        """
        units = sum(x.units for x in self.layers)
        target = count(sparsity, units)
        most = sum(x.removed[-1] for x in self.layers)
        if target > most:
            raise BudgetError(
                f"With at most {self.sparsities[-1]:g} of each layer, {most / units:.4f} can be removed in "
                f"all, not {sparsity:g}: test larger sparsities."
            )
        drops = self.drops()
        removed = _fill([_curve(x, drops[x.name]) for x in self.layers], target)
        for x, n in zip(self.layers, removed, strict=True):
            if x.gap and 0 < n < x.removed[0]:
                raise BudgetError(
                    f"A total of {sparsity:g} takes {n / x.units:.4f} of {x.name}, which its pattern may not "
                    "have: use allocation(tolerance), ask for another total, or test smaller sparsities."
                )
        return custom({as_glob(x.name): n / x.units for x, n in zip(self.layers, removed, strict=True)})

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        drops = self.drops()
        return {
            "settings": dict(self.settings),
            "sparsities": list(self.sparsities),
            "baseline": self.baseline,
            "higher_is_better": self.higher_is_better,
            "layers": [asdict(x) | {"drops": drops[x.name]} for x in self.layers],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "notes": list(self.notes),
            "versions": dict(self.versions),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON, atomically."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def __rich__(self) -> RenderableType:
        better = "higher" if self.higher_is_better else "lower"
        settings = ", ".join(f"{k} {v}" for k, v in self.settings.items())
        caption = (
            f"The metric with one layer pruned; {self.baseline:.5g} with none, {better} is better. {settings}"
        )
        table = Table(box=box.SIMPLE_HEAD, caption=escape(caption), caption_justify="left")
        table.add_column("layer", overflow="fold")
        for sparsity in self.sparsities:
            table.add_column(f"{sparsity:.4g}", justify="right")
        for x in self.layers:
            table.add_row(escape(x.name), *(f"{value:.5g}" for value in x.values))
        return table

    def __str__(self) -> str:
        return printed(self)


def sensitivity(
    model: nn.Module,
    criterion: Criterion,
    metric: Metric | None = None,
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    *,
    higher_is_better: bool | None = None,
    pattern: Pattern | None = None,
    where: Where | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Sensitivity:
    """Prune one layer at a time to each sparsity, take the metric, and put the layer back bit for bit.

    That is `1 + layers * sparsities` evaluations of the metric. Statistics are measured once, on the model as
    it is, and each layer is scored once, also by a criterion that prunes in several rounds.

    Args:
        model: any module; its weights and modes are the same afterwards, and after an exception.
        criterion: what a weight is worth; `secateur.criteria`.
        metric: `metric(model)` -> a finite number; called in evaluation mode and without gradients, and
            changes nothing itself. None: the mean loss over the examples of `batches`.
        sparsities: of each layer, each above 0 and at most 1.
        higher_is_better: True for an accuracy, False for a perplexity; needed with a metric.
        pattern: which entries may survive; `Unstructured()` if None.
        where: which layers; see `Where`.
        batches: data for criteria that need statistics, and for the loss; see `collect`.
        loss: `loss(output, target)`, mean over the batch; None if the model returns its loss.

    Raises:
        SparsityError: no sparsities, or one that is not above 0 and at most 1.
        NonFiniteError: NaN or infinite weights, statistics, scores or metric.
        SecateurError: another of its subclasses, for anything else wrong with the input.

    Reference: Han et al. 2015, Learning both weights and connections, figure 6.

    >>> model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 1))
    >>> _ = model[0].weight.data.fill_(1.0), model[1].weight.data.fill_(2.0)
    >>> def total(model):
    ...     return float(model[0].weight.sum() + model[1].weight.sum())
    >>> result = sensitivity(model, sc.Magnitude(), total, (0.5, 0.75), higher_is_better=True)
    >>> result.baseline, result.drops()
    (48.0, {'0.weight': (8.0, 12.0), '1.weight': (16.0, 24.0)})
    >>> result.allocation(tolerance=16.0).sparsities
    (('0.weight', 0.75), ('1.weight', 0.5))
    """
    refuse_class(criterion)
    refuse_class(pattern)
    grid = _ascending(sparsities)
    pattern = pattern or Unstructured()
    selection = select(model, where)
    check_targets(selection.targets, pattern)
    for t in selection.targets:
        for s in grid:
            pattern.reachable(t.shape, s)
    if isinstance(batches, Iterator):
        batches = list(batches)  # for the statistics and for every evaluation
    settings = {
        "criterion": repr(criterion),
        "pattern": repr(pattern),
        "where": repr(where or Where()),
        "metric": "mean loss" if metric is None else getattr(metric, "__name__", repr(metric)),
    }
    higher = _direction(metric, higher_is_better)
    if metric is None:
        device = selection.targets[0].weight.device
        metric = partial(
            _mean_loss, as_batches(batches, device, "Without a metric the loss is measured"), loss
        )
    collected = collect(model, criterion.needs, batches, loss, selection.targets)
    measured = partial(_measured, model, metric)
    baseline = measured("for the model as it is")
    layers = []
    for t in track(selection.targets, "pruning one layer at a time"):
        layer = as_layer(t, criterion, collected.stats[t.name], pattern)
        layers.append(_one_layer(t, layer, grid, measured))
    return Sensitivity(settings, grid, baseline, higher, tuple(layers), selection.skipped, collected.notes)


def _ascending(sparsities: Sequence[float]) -> tuple[float, ...]:
    grid = tuple(sorted(set(sparsities)))
    if not grid or not all(0 < s <= 1 for s in grid):
        raise SparsityError(f"sparsities are fractions removed, above 0 and at most 1; got {sparsities}.")
    return grid


def _direction(metric: Metric | None, higher_is_better: bool | None) -> bool:
    if metric is None and higher_is_better:
        raise SecateurError("Without a metric the loss is measured, of which lower is better.")
    if metric is not None and higher_is_better is None:
        raise SecateurError(
            "Say which direction of the metric is better: higher_is_better=True for an accuracy, say, or "
            "higher_is_better=False for an error or a perplexity."
        )
    return bool(higher_is_better)


def _mean_loss(batches: Batches, loss: Loss | None, model: nn.Module) -> float:
    total, examples = 0.0, 0
    for batch in batches:
        total += float(mean_loss(batch.forward(model), batch, loss)) * batch.size
        examples += batch.size
    return total / examples


def _measured(model: nn.Module, metric: Metric, what: str) -> float:
    with evaluation(model), torch.no_grad():
        value = float(metric(model))
    if not math.isfinite(value):
        raise NonFiniteError(f"The metric is {value} {what}: use one that stays finite, such as a mean loss.")
    return value


def _one_layer(
    target: Target, layer: Layer, grid: Sequence[float], measured: Callable[[str], float]
) -> LayerSensitivity:
    scores = layer.scores()
    values = []
    for s in grid:
        keep = layer.pattern.keep(scores, s)
        with _pruned(target, target.layout.restore(keep, target.weight.shape)):
            values.append(measured(f"with {s:g} of {target.name} removed"))
    removed = tuple(count(s, layer.units) for s in grid)
    return LayerSensitivity(
        layer.name, tuple(target.weight.shape), layer.units, removed, tuple(values), _has_gap(layer)
    )


@contextmanager
def _pruned(target: Target, keep: Bool[Tensor, "..."]) -> Iterator[None]:
    saved = target.weight.detach().clone()
    try:
        zero_(target.weight, keep)
        yield
    finally:
        with torch.no_grad():
            target.weight.copy_(saved)


def _has_gap(layer: Layer) -> bool:
    try:
        layer.pattern.reachable(layer.shape, 1 / layer.units)
    except PatternError:
        return True
    return False


@dataclass(frozen=True)
class _Curve:
    """Units removed from a layer at a tolerance: straight lines between points, upright where drops tie."""

    drops: tuple[float, ...]  # ascending
    removed: tuple[int, ...]  # ascending, from 0

    def at(self, tolerance: float, after: bool) -> float:
        """The highest value at `tolerance`, or with `after` False the lowest."""
        i = (bisect_right if after else bisect_left)(self.drops, tolerance)
        if i == 0 or i == len(self.drops):
            return self.removed[max(0, i - 1)]
        (d0, d1), (n0, n1) = self.drops[i - 1 : i + 1], self.removed[i - 1 : i + 1]
        return n0 + (n1 - n0) * (tolerance - d0) / (d1 - d0)


def _curve(layer: LayerSensitivity, drops: Sequence[float]) -> _Curve:
    points = [(0.0, 0), *zip(drops, layer.removed, strict=True)]
    if layer.gap:
        points.insert(1, (drops[0], 0))  # nothing until the first tested sparsity is within tolerance
    # The least drop from here on: one that a larger sparsity undercuts is never a reason to stop.
    least = list(accumulate((d for d, _ in reversed(points)), min))[::-1]
    return _Curve(tuple(least), tuple(n for _, n in points))


def _fill(curves: Sequence[_Curve], target: int) -> list[int]:
    """Units removed from each layer at the tolerance where they are `target` in all.

    With a growing tolerance the layers move along their curves: all of them straight between neighbouring
    points of any, while at a point those whose curve is upright jump, which they are made to do in step.
    """
    levels = sorted({d for curve in curves for d in curve.drops})

    def state(i: int) -> list[float]:
        return [curve.at(levels[i // 2], after=i % 2 == 1) for curve in curves]

    def total(i: int) -> float:
        return sum(state(i))

    i = max(1, bisect_left(range(2 * len(levels)), float(target), key=total))
    start, end = state(i - 1), state(i)
    rise = total(i) - total(i - 1)
    share = (target - total(i - 1)) / rise if rise else 0.0
    exact = [a + share * (b - a) for a, b in zip(start, end, strict=True)]
    removed = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: removed[i] - exact[i])
    for i in by_remainder[: target - sum(removed)]:
        removed[i] += 1
    return removed
