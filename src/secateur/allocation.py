"""How much to remove from each layer.

An allocation is a function `(layers, sparsity) -> {layer name: sparsity}`. The total it hands out equals
the total asked, to the unit: `count(sparsity, all units)`. Global pruning is an allocation like any other.

Rounding: shares are rounded down to units and what is left goes to the largest remainders, earlier layers
first (Hamilton's method), so each layer is within one unit of its exact share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from secateur.core.errors import BudgetError, SecateurError, SelectionError, SparsityError
from secateur.core.topk import count, find_cut
from secateur.patterns import Pattern


@dataclass(frozen=True)
class Layer:
    """What an allocation may know of a layer.

    `weight()` and `scores()` give `[out, in]` matrices, made when asked for and not kept.
    `kernel_shape` is the shape of the stored weight, kernel dimensions included.
    """

    name: str
    shape: torch.Size
    kernel_shape: torch.Size
    pattern: Pattern
    weight: Callable[[], Tensor]
    scores: Callable[[], Tensor]

    @property
    def units(self) -> int:
        """Number of entries or blocks that the pattern can remove."""
        return self.shape.numel() // self.pattern.unit


Allocation = Callable[[Sequence[Layer], float | None], dict[str, float]]


def uniform(layers: Sequence[Layer], sparsity: float | None) -> dict[str, float]:
    """The same sparsity in every layer."""
    total = _asked(layers, sparsity, "uniform")
    return rounded(layers, [_given(sparsity) * layer.units for layer in layers], total)


def global_(layers: Sequence[Layer], sparsity: float | None) -> dict[str, float]:
    """One ranking of the criterion's scores over all layers."""
    total = _asked(layers, sparsity, "global_")
    return _ranked(layers, [_unit_scores(layer) for layer in layers], total)


def erk(layers: Sequence[Layer], sparsity: float | None) -> dict[str, float]:
    r"""Erdős-Rényi with kernel dimensions: density proportional to (sum of dimensions) / (product).

    :math:`d_l = \epsilon\,(n_{in} + n_{out} + k_w + k_h) / (n_{in} n_{out} k_w k_h)`, with epsilon solved so
    that the total is met; a layer that would exceed density 1 is kept whole and epsilon solved again.

    Reference: Evci et al. 2020, Rigging the Lottery, section 3; Mocanu et al. 2018 for linear layers.
    """
    total = _asked(layers, sparsity, "erk")
    kept_total = sum(layer.units for layer in layers) - total
    raw = [sum(layer.kernel_shape) / layer.pattern.unit for layer in layers]  # units kept, over epsilon
    whole: set[int] = set()
    while True:
        free = [i for i in range(len(layers)) if i not in whole]
        left = kept_total - sum(layers[i].units for i in whole)
        scale = left / sum(raw[i] for i in free) if free else 0.0
        over = {i for i in free if scale * raw[i] > layers[i].units}
        if not over:
            break
        whole |= over  # epsilon only grows by this, so none of them would have come back under 1
    removed = [0.0 if i in whole else layers[i].units - scale * raw[i] for i in range(len(layers))]
    return rounded(layers, removed, total)


def lamp(layers: Sequence[Layer], sparsity: float | None) -> dict[str, float]:
    r"""Layer-adaptive magnitude: one ranking of :math:`w_u^2 / \sum_{v \ge u} w_v^2`.

    The sum runs over the weight itself and all larger ones of its layer, so the score does not change when
    a layer is rescaled, and the largest weight of every layer scores 1: no layer empties before all others
    hold one weight. Blocks take the sum of squares of their entries.

    Reference: Lee et al. 2021, Layer-adaptive sparsity for the magnitude-based pruning, eq. 3.
    """
    total = _asked(layers, sparsity, "lamp")

    def scores(layer: Layer) -> Tensor:
        square = layer.pattern.units(layer.weight().double().square()).sort().values
        # A reverse cumulative sum: "total minus cumulative sum" cancels, and fails in float32 altogether.
        tail = square.flip(0).cumsum(0).flip(0)
        return torch.where(tail > 0, square / tail, torch.zeros_like(tail))

    return _ranked(layers, [_bind(scores, layer) for layer in layers], total)


def standard_deviation(weight: Tensor) -> float:
    """Standard deviation of a layer's weights, the scale of Han et al. 2015."""
    return weight.double().std(correction=0).item()


def laplace_scale(weight: Tensor) -> float:
    """Maximum-likelihood scale of a Laplace distribution: the mean distance from the median."""
    weight = weight.double()
    return (weight - weight.median()).abs().mean().item()


@dataclass(frozen=True, repr=False)
class Threshold:
    r"""Remove :math:`|w| < q\,\sigma_l`, with the same quality parameter `q` in every layer.

    With `quality` given, the sparsity is what comes out: pass no sparsity. Without it, the `q` that meets
    the asked total is found, which is a global ranking of :math:`|w| / \sigma_l`. A block counts with the
    root mean square of its entries. Layers whose weights are all alike (scale 0) are kept.

    For Laplace-distributed weights the sparsity of a layer is :math:`1 - e^{-q\sqrt 2}` with the standard
    deviation as scale, and :math:`1 - e^{-q}` with `laplace_scale`.

    Args:
        quality: q, in units of the scale; None to meet a total.
        scale: what a layer's spread is: `standard_deviation` or `laplace_scale`, or any such function.

    Reference: Han et al. 2015, Learning both weights and connections, section 3 ("quality parameter
    multiplied by the standard deviation of a layer's weights").
    """

    quality: float | None = None
    scale: Callable[[Tensor], float] = standard_deviation

    def __repr__(self) -> str:
        # A function's own repr holds its address, which would make reports differ from run to run.
        scale = getattr(self.scale, "__qualname__", repr(self.scale))
        return f"Threshold(quality={self.quality}, scale={scale})"

    def __post_init__(self) -> None:
        if self.quality is not None and not self.quality >= 0:
            raise SecateurError(f"Threshold(quality=...) is not negative; got {self.quality}.")

    def __call__(self, layers: Sequence[Layer], sparsity: float | None) -> dict[str, float]:
        scores = [_bind(self._relative, layer) for layer in layers]
        if self.quality is None:
            return _ranked(layers, scores, _asked(layers, sparsity, "threshold"))
        if sparsity is not None:
            raise BudgetError(
                f"Threshold(quality={self.quality}) decides the sparsity itself: pass sparsity=None, or "
                "leave quality out."
            )
        gone = [int((s() < self.quality).count_nonzero()) for s in scores]
        return {layer.name: n / max(1, layer.units) for layer, n in zip(layers, gone, strict=True)}

    def _relative(self, layer: Layer) -> Tensor:
        weight = layer.weight()
        size = (layer.pattern.units(weight.double().square()) / layer.pattern.unit).sqrt()
        scale = self.scale(weight)
        return size / scale if scale > 0 else torch.full_like(size, torch.inf)


threshold = Threshold()


@dataclass(frozen=True)
class OWL:
    r"""More weights for blocks with more outliers: density :math:`d_b = D_b - \bar D + (1 - s)`.

    :math:`D_b` is the share of a block's scores above `outlier` times their mean, stretched so that the
    largest and the smallest lie `2 * width` apart. Layers of a block, those whose names agree up to the first
    number, get the same sparsity. Densities are kept within [0, 1], and all that are not at a bound moved
    alike until the total is met. Meant for the scores of `Wanda`.

    Reference: Yin et al. 2023, Outlier weighed layerwise sparsity, section 3. Differs from the authors' code:
    blocks of unlike size meet the total too.
    """

    outlier: float = 5.0
    width: float = 0.08

    def __post_init__(self) -> None:
        if not (self.outlier > 0 and self.width >= 0):
            raise SecateurError(f"{self}: outlier is above 0 and width at least 0.")

    def __call__(self, layers: Sequence[Layer], sparsity: float | None) -> dict[str, float]:
        total = _asked(layers, sparsity, "owl")
        blocks: dict[str, list[int]] = {}
        for i, layer in enumerate(layers):
            blocks.setdefault(_block(layer.name), []).append(i)
        shares = [self._outliers([layers[i] for i in members]) for members in blocks.values()]
        low, high = min(shares), max(shares)
        stretch = 2 * self.width / (high - low) if high > low else 0.0
        extra = [0.0] * len(layers)
        for share, members in zip(shares, blocks.values(), strict=True):
            for i in members:
                extra[i] = (share - low) * stretch
        return rounded(layers, _shifted([layer.units for layer in layers], extra, total), total)

    def _outliers(self, layers: Sequence[Layer]) -> float:
        """Share of a block's scores above `outlier` times their mean; weights that are gone have none."""
        sums, counts, above = 0.0, 0, 0
        for layer in layers:
            scores = layer.scores()
            alive = scores[scores.isfinite()]
            sums += float(alive.sum(dtype=torch.float64))
            counts += alive.numel()
        limit = self.outlier * sums / max(1, counts)
        for layer in layers:
            above += int((layer.scores() > limit).count_nonzero())
        return above / max(1, counts)


owl = OWL()


def _block(name: str) -> str:
    """The name up to its first number: `model.layers.3` of `model.layers.3.mlp.up_proj.weight`."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return name if first is None else ".".join(parts[: first + 1])


def _shifted(units: Sequence[int], extra: Sequence[float], total: int) -> list[float]:
    """Units to remove such that densities are `extra` plus one number, in [0, 1], and the total is met."""
    low, high = -1.0 - max(extra), 1.0
    for _ in range(100):
        shift = (low + high) / 2
        gone = [n * min(1.0, max(0.0, 1 - shift - e)) for n, e in zip(units, extra, strict=True)]
        low, high = (shift, high) if sum(gone) > total else (low, shift)
    return gone


@dataclass(frozen=True)
class Custom:
    """Sparsity of each layer as given: `custom({"*.attn.*": 0.3, "*": 0.6})`.

    Keys are glob patterns over layer names; the first that matches decides. Every layer must match one and
    every key must match a layer, else `SelectionError`. A total asked as well must agree, else `BudgetError`.
    """

    sparsities: tuple[tuple[str, float], ...]

    def __call__(self, layers: Sequence[Layer], sparsity: float | None) -> dict[str, float]:
        idle = [g for g, _ in self.sparsities if not any(_matches(layer.name, g) for layer in layers)]
        if idle:
            raise SelectionError(f"custom: {idle[0]!r} matches none of the selected layers.")
        out = {}
        for layer in layers:
            asked = next((s for g, s in self.sparsities if _matches(layer.name, g)), None)
            if asked is None:
                raise SelectionError(f"custom: no entry for {layer.name}; add one, or a last '*': 0.0.")
            out[layer.name] = count(asked, layer.units) / max(1, layer.units)
        got = sum(count(out[layer.name], layer.units) for layer in layers)
        units = sum(layer.units for layer in layers)
        if sparsity is not None and abs(got - count(sparsity, units)) > len(layers):
            raise BudgetError(
                f"custom: the layers' sparsities add up to {got / units:.4f}, not to the asked "
                f"{sparsity:.4f}: leave the total out or change them."
            )
        return out


def custom(sparsities: Mapping[str, float]) -> Custom:
    """Allocation with the sparsity of each layer given by name pattern; see `Custom`."""
    return Custom(tuple(sparsities.items()))


@dataclass(frozen=True)
class AtLeast:
    """Another allocation that spares every layer: `at_least(global_, 0.02)` keeps 2 % of each at least.

    Layers that would be left with less keep exactly that much, and the others are allocated what remains to
    be removed, until no layer falls below. With `global_` this is a ranking in which the highest scores of
    each layer are out of reach.

    Raises `BudgetError` if the total cannot be met so.
    """

    allocation: Allocation
    density: float

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise SparsityError(f"at_least takes a density, between 0 and 1; got {self.density}.")

    def __repr__(self) -> str:
        inner = getattr(self.allocation, "__name__", repr(self.allocation))
        return f"AtLeast(allocation={inner}, density={self.density})"

    def __call__(self, layers: Sequence[Layer], sparsity: float | None) -> dict[str, float]:
        left = total = _asked(layers, sparsity, "at_least")
        # At least one unit stays where any density is asked, however small the layer.
        most = {x.name: x.units - math.ceil(self.density * x.units) for x in layers}
        if total > sum(most.values()):
            raise BudgetError(
                f"With {self.density:g} of each layer kept, {sum(most.values())} of "
                f"{sum(x.units for x in layers)} units can go, not {total}: keep or ask for less."
            )
        free, out = list(layers), dict.fromkeys((x.name for x in layers), 0.0)
        while free:
            units = sum(x.units for x in free)
            shares = self.allocation(free, left / max(1, units))
            over = [x for x in free if count(shares[x.name], x.units) > most[x.name]]
            if not over:
                return out | shares
            for x in over:
                out[x.name] = most[x.name] / max(1, x.units)
                left -= most[x.name]
            free = [x for x in free if x.name not in {y.name for y in over}]
        return out


def at_least(allocation: Allocation, density: float) -> AtLeast:
    """An allocation that leaves at least `density` of each layer; see `AtLeast`."""
    return AtLeast(allocation, density)


def _given(sparsity: float | None) -> float:
    if sparsity is None:
        raise SparsityError("A sparsity between 0 and 1 is needed with this allocation.")
    return sparsity


def _asked(layers: Sequence[Layer], sparsity: float | None, who: str) -> int:
    """Units to remove in all."""
    if sparsity is None:
        raise SparsityError(f"allocation={who} needs a sparsity between 0 and 1.")
    return count(sparsity, sum(layer.units for layer in layers))


def _unit_scores(layer: Layer) -> Callable[[], Tensor]:
    return lambda: layer.pattern.units(layer.scores())


def _bind(f: Callable[[Layer], Tensor], layer: Layer) -> Callable[[], Tensor]:
    return lambda: f(layer)


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[0], glob)


def _ranked(layers: Sequence[Layer], scores: Sequence[Callable[[], Tensor]], total: int) -> dict[str, float]:
    """Sparsities that follow from removing the `total` lowest of all `scores`."""
    _, taken = find_cut(scores, [layer.units for layer in layers], total)
    return {layer.name: n / max(1, layer.units) for layer, n in zip(layers, taken, strict=True)}


def rounded(layers: Sequence[Layer], exact: Sequence[float], total: int) -> dict[str, float]:
    """Whole numbers of units near `exact` that sum to `total`, as sparsities."""
    floors = [min(layer.units, max(0, math.floor(x))) for layer, x in zip(layers, exact, strict=True)]
    left = total - sum(floors)
    by_remainder = sorted(range(len(layers)), key=lambda i: floors[i] - exact[i])
    for i in by_remainder:
        if left > 0 and floors[i] < layers[i].units:
            floors[i] += 1
            left -= 1
    for i in reversed(by_remainder):  # floating-point noise can push a floor one too high
        if left < 0 and floors[i] > 0:
            floors[i] -= 1
            left += 1
    if left:
        raise BudgetError(f"Rounding left {left} units unplaced; the layers cannot hold the asked total.")
    return {layer.name: n / max(1, layer.units) for layer, n in zip(layers, floors, strict=True)}
