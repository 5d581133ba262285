"""How the weights of each layer are distributed: the observation from which pruning starts.

Trained weights crowd around zero more than Gaussian ones would, and a Laplace distribution often fits them
better. Both are fitted to every layer, with how well they fit and what they predict close to zero.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from secateur.core.errors import NonFiniteError
from secateur.core.files import write_text
from secateur.core.names import Target, Where, select
from secateur.measure import measure
from secateur.printing import printed
from secateur.progress import track
from secateur.record import versions

BINS = 80  # of a histogram, each a tenth of a standard deviation wide
REACH = 4.0  # standard deviations on each side of the mean that a histogram covers
NEAR = (0.1, 1.0)  # standard deviations from zero within which weights are counted
# Entries converted to float64 at a time: 8 MiB.
_CHUNK = 1 << 20

_Cdf = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fit:
    """A distribution fitted by maximum likelihood.

    Attributes:
        location: mean of the Gaussian, median of the Laplace distribution, in the units of the weights.
        scale: standard deviation of the Gaussian, mean distance from the median for Laplace.
        log_likelihood: mean over the weights of the natural logarithm of the fitted density.
        distance: Kolmogorov-Smirnov distance, the largest difference between the empirical and the fitted
            distribution function, in [0, 1].
    """

    location: float
    scale: float
    log_likelihood: float
    distance: float


@dataclass(frozen=True)
class NearZero:
    """Share of the weights with `|w| < within * sd`: as it is, and as each fitted distribution predicts."""

    within: float
    share: float
    gaussian: float
    laplace: float


@dataclass(frozen=True)
class Histogram:
    """Shares of the weights per unit of weight between `edges`; how many lie `below` and `above` them all.

    A bin holds its left edge, the last one also its right edge. Densities compare with the fitted density
    functions: `sum(density * width) + (below + above) / weights = 1`.
    """

    edges: tuple[float, ...]
    densities: tuple[float, ...]
    below: int
    above: int


@dataclass(frozen=True)
class LayerInspection:
    """The weights of one layer. Everything but the first four fields speaks of its non-zero weights only.

    What is undefined is None: everything for a layer of zeros, and kurtosis, fits, shares near zero and
    histogram for weights that are all alike (a single one, say).

    Attributes:
        name: of the parameter.
        shape: of the parameter as stored.
        weights: entries.
        zeros: entries that are exactly zero: pruned already.
        minimum: smallest non-zero weight.
        maximum: largest non-zero weight.
        mean: of the non-zero weights.
        sd: standard deviation, `sqrt(mean((w - mean)^2))`.
        median: middle weight, or the mean of the two in the middle.
        excess_kurtosis: `mean((w - mean)^4) / sd^4 - 3`: 0 for Gaussian, 3 for Laplace weights.
        gaussian: fit of a Gaussian distribution.
        laplace: fit of a Laplace distribution.
        near_zero: weights close to zero, one record for each distance in `NEAR`.
        histogram: `BINS` bins over `REACH` standard deviations on each side of the mean.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    sd: float | None = None
    median: float | None = None
    excess_kurtosis: float | None = None
    gaussian: Fit | None = None
    laplace: Fit | None = None
    near_zero: tuple[NearZero, ...] = ()
    histogram: Histogram | None = None

    @property
    def sparsity(self) -> float:
        """Fraction that is zero."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def gain(self) -> float | None:
        """Log-likelihood per weight of the Laplace fit minus that of the Gaussian, in nats.

        Both have two parameters, so their AIC differ by `-2 * gain` for each non-zero weight.
        """
        if self.gaussian is None or self.laplace is None:
            return None
        return self.laplace.log_likelihood - self.gaussian.log_likelihood

    @property
    def better(self) -> str | None:
        """Which distribution has the higher likelihood: "laplace" or "gaussian"."""
        return None if self.gain is None else "laplace" if self.gain > 0 else "gaussian"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"sparsity": self.sparsity, "gain": self.gain, "better": self.better}


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found: the model's parameters and zeros, each layer, and what was left out and why."""

    parameters: int
    zeros: int
    layers: tuple[LayerInspection, ...]
    skipped: tuple[tuple[str, str], ...]
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def sparsity(self) -> float:
        """Fraction of all parameters that is zero."""
        return self.zeros / self.parameters if self.parameters else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "totals": {"parameters": self.parameters, "zeros": self.zeros, "sparsity": self.sparsity},
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "versions": dict(self.versions),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON, atomically."""
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def __rich__(self) -> RenderableType:
        skipped = Table(box=box.SIMPLE_HEAD)
        skipped.add_column("left out", overflow="fold")
        skipped.add_column("why", overflow="fold")
        for name, reason in self.skipped:
            skipped.add_row(escape(name), escape(reason))
        return Group(_layer_table(self), *([skipped] if self.skipped else []))

    def __str__(self) -> str:
        return printed(self, width=110)


def inspect(model: nn.Module, where: Where | None = None) -> Inspection:
    r"""Describe the weights of each layer and fit Gaussian and Laplace distributions to them.

    Zeros are counted and left out: all that follows is of the non-zero weights, in float64. By maximum
    likelihood:

    - Gaussian: mean and standard deviation; log-likelihood per weight :math:`-\ln(\sigma\sqrt{2\pi e})`.
    - Laplace: median :math:`m` and :math:`b = \mathrm{mean}\,|w - m|`; log-likelihood per weight
      :math:`-\ln(2 e b)`.

    The Kolmogorov-Smirnov distance is exact, over the sorted weights:
    :math:`\max_i \max(i/n - F(w_{(i)}),\ F(w_{(i)}) - (i-1)/n)`. It is no test: the parameters come from the
    same weights, and with millions of them any test rejects both.

    Memory: one copy of a layer's non-zero weights and one byte a weight, and some 8 MiB buffers.

    Args:
        model: any module; wrappers of `torch.compile` and data parallelism are looked through.
        where: which layers; see `Where`.

    Raises:
        SelectionError: nothing is selected.
        NonFiniteError: NaN or infinite weights, with the layer's name.

    Reference: Norton 1984, The double exponential distribution: using calculus to find a maximum likelihood
    estimator; Massey 1951, The Kolmogorov-Smirnov test for goodness of fit.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[-1.0, 0.0, 1.0], [-3.0, 0.0, 3.0]]))
    >>> layer = inspect(model).layers[0]
    >>> layer.name, layer.zeros, layer.median, layer.laplace.scale, layer.gaussian.scale
    ('0.weight', 2, 0.0, 2.0, 2.23606797749979)
    """
    selection = select(model, where)
    whole = measure(model)
    layers = tuple(_layer(target) for target in track(selection.targets, "inspecting"))
    return Inspection(whole.parameters, whole.parameters - whole.nonzero, layers, selection.skipped)


def _layer(target: Target) -> LayerInspection:
    weight = target.weight.detach()
    values = _sorted_nonzero(weight)
    n = len(values)
    base = LayerInspection(target.name, tuple(weight.shape), weight.numel(), weight.numel() - n)
    if not n:
        return base
    low, high = float(values[0]), float(values[-1])
    if not (math.isfinite(low) and math.isfinite(high)):  # NaN is sorted to the end
        raise NonFiniteError(
            f"{target.name} holds NaN or infinite weights: repair it, or exclude it with where=."
        )
    median = (float(values[(n - 1) // 2]) + float(values[n // 2])) / 2
    base = replace(base, minimum=low, maximum=high, median=median)
    if low == high:
        return replace(base, mean=low, sd=0.0)
    mean = sum(float(c.sum()) for _, c in _chunks(values)) / n
    sd = math.sqrt(sum(float((c - mean).square().sum()) for _, c in _chunks(values)) / n)
    scale = sum(float((c - median).abs().sum()) for _, c in _chunks(values)) / n

    def gaussian(x: Tensor) -> Tensor:
        return torch.special.ndtr((x - mean) / sd)

    def laplace(x: Tensor) -> Tensor:
        z = (x - median) / scale
        return 0.5 - 0.5 * z.sign() * torch.expm1(-z.abs())

    return replace(
        base,
        mean=mean,
        sd=sd,
        excess_kurtosis=sum(float(((c - mean) / sd).pow(4).sum()) for _, c in _chunks(values)) / n - 3,
        gaussian=Fit(mean, sd, -math.log(sd * math.sqrt(2 * math.pi * math.e)), _distance(values, gaussian)),
        laplace=Fit(median, scale, -math.log(2 * math.e * scale), _distance(values, laplace)),
        near_zero=tuple(_near_zero(values, k, sd, gaussian, laplace) for k in NEAR),
        histogram=_histogram(values, mean, sd),
    )


_Values = np.ndarray[tuple[int], np.dtype[np.floating[Any]]]  # sorted, float32 or float64


def _sorted_nonzero(weight: Tensor) -> _Values:
    # numpy sorts in place, where torch would also make an index of eight bytes a weight.
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    values = weight.to("cpu", wide).reshape(-1).numpy()
    values = values[values != 0]
    values.sort()
    return values


def _chunks(values: _Values) -> Iterator[tuple[int, Tensor]]:
    """Consecutive pieces in float64, each with the position of its first entry."""
    for start in range(0, len(values), _CHUNK):
        yield start, torch.from_numpy(values[start : start + _CHUNK]).double()


def _distance(values: _Values, cdf: _Cdf) -> float:
    """Kolmogorov-Smirnov distance between sorted values and a distribution function."""
    n, worst = len(values), 0.0
    for start, x in _chunks(values):
        expected = cdf(x)
        before = torch.arange(start, start + len(x), dtype=torch.float64) / n
        worst = max(worst, float((expected - before).max()), float((before + 1 / n - expected).max()))
    return worst


def _near_zero(values: _Values, within: float, sd: float, gaussian: _Cdf, laplace: _Cdf) -> NearZero:
    reach = within * sd
    inside = _position(values, reach) - _position(values, -reach, after=True)
    ends = torch.tensor([-reach, reach], dtype=torch.float64)
    predicted = [float(cdf(ends).diff()) for cdf in (gaussian, laplace)]
    return NearZero(within, inside / len(values), *predicted)


def _histogram(values: _Values, mean: float, sd: float) -> Histogram:
    edges = (mean + sd * np.linspace(-REACH, REACH, BINS + 1)).tolist()
    cuts = [_position(values, edge) for edge in edges[:-1]] + [_position(values, edges[-1], after=True)]
    width = 2 * REACH * sd / BINS
    densities = np.diff(cuts) / (len(values) * width)
    return Histogram(tuple(edges), tuple(densities.tolist()), cuts[0], len(values) - cuts[-1])


def _position(values: _Values, x: float, after: bool = False) -> int:
    """How many values lie below `x`; with `after`, those equal to it too."""
    # Exact: np.searchsorted would copy all values to float64, and a plain float would be rounded to theirs.
    return (bisect_right if after else bisect_left)(values, np.float64(x))


def _layer_table(inspection: Inspection) -> Table:
    caption = (
        f"{inspection.parameters:,} parameters, {inspection.sparsity:.2%} of them zero; all else is of the "
        f"non-zero weights. Near zero: share with |w| < {NEAR[0]:g} sd, and what the Gaussian fit predicts. "
        "KS: Kolmogorov-Smirnov distance of each fit; the smaller fits better."
    )
    table = Table(
        box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("layer", overflow="fold")
    shares = ("near\nzero", "by\nGauss")
    for column in ("weights", "zero", "sd", "kur-\ntosis", *shares, "KS\nGauss", "KS\nLapl."):
        table.add_column(column, justify="right", no_wrap=True)
    for x in inspection.layers:
        fits = ["-"] * 4
        if x.gaussian and x.laplace:
            near = x.near_zero[0]
            fits = [f"{share:.1%}" for share in (near.share, near.gaussian)]
            fits += [f"{fit.distance:.3f}" for fit in (x.gaussian, x.laplace)]
        table.add_row(
            escape(x.name.removesuffix(".weight")),
            f"{x.weights:,}",
            f"{x.sparsity:.1%}",
            _number(x.sd, ".3g"),
            _number(x.excess_kurtosis, ".1f"),
            *fits,
        )
    return table


def _number(x: float | None, form: str) -> str:
    return "-" if x is None else format(x, form)
