"""Results over seeds: means with confidence intervals, as rows, text and CSV."""

from __future__ import annotations

import csv
import io
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from secateur.core.files import write_text
from secateur.lottery.store import Finished


@dataclass(frozen=True)
class Summary:
    """One branch at one level, over its seeds.

    Attributes:
        branch: its name.
        level: of pruning.
        density: mean fraction of the prunable weights that the tickets of this level keep.
        seeds: so many.
        mean: of the value.
        low, high: 95 % confidence interval of the mean, by Student's t; NaN for one seed.
    """

    branch: str
    level: int
    density: float
    seeds: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class TicketTable:
    """The finished trainings of an experiment."""

    rows: tuple[Finished, ...]

    def __iter__(self) -> Iterator[Finished]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def branches(self) -> list[str]:
        """Names, in the order of the experiment."""
        return list(dict.fromkeys(r.branch for r in self.rows))

    def values(self, branch: str, level: int, value: str = "accuracy") -> list[float]:
        """One number a seed; of what `evaluate` gave, or `early_stop` or `seconds`."""
        chosen = [r for r in self.rows if r.branch == branch and r.level == level]
        return [v for r in chosen if (v := _value(r, value)) is not None]

    def summary(self, value: str = "accuracy") -> list[Summary]:
        """Means and intervals of every branch and level that has the value."""
        found = []
        for branch in self.branches:
            for level in sorted({r.level for r in self.rows if r.branch == branch}):
                values = self.values(branch, level, value)
                if values:
                    own = [r.density for r in self.rows if r.branch == branch and r.level == level]
                    density, mean = statistics.fmean(own), statistics.fmean(values)
                    low, high = confidence(values)
                    found.append(Summary(branch, level, density, len(values), mean, low, high))
        return found

    def csv(self, path: str | os.PathLike[str]) -> None:
        """Write one row a training, with all its values."""
        names = list(dict.fromkeys(name for r in self.rows for name in r.values))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        last = ["early_stop", "steps", "seconds", "key"]
        writer.writerow(["branch", "level", "seed", "density", *names, *last])
        for r in self.rows:
            values = [r.values.get(name, "") for name in names]
            stop = "" if r.early_stop is None else r.early_stop
            writer.writerow(
                [r.branch, r.level, r.seed, r.density, *values, stop, r.steps, round(r.seconds, 3), r.key]
            )
        write_text(path, text.getvalue())

    def __str__(self) -> str:
        found = self.summary()
        levels = sorted({s.level for s in found})
        at = {(s.branch, s.level): s for s in found}
        width = max([9, *(len(b) for b in self.branches)])
        lines = ["left".rjust(8) + "".join(f"  {b:>{width}}" for b in self.branches)]
        for level in levels:
            density = next(s.density for s in found if s.level == level)
            cells = [_shown(at.get((b, level))) for b in self.branches]
            lines.append(f"{100 * density:>6.2f} %" + "".join(f"  {c:>{width}}" for c in cells))
        return "\n".join(lines)


def confidence(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean by Student's t; NaN for one value.

    >>> [round(v, 3) for v in confidence([1.0, 2.0, 3.0, 4.0, 5.0])]
    [1.037, 4.963]
    """
    if len(values) < 2:
        return math.nan, math.nan
    mean = statistics.fmean(values)
    half = _t_quantile(len(values) - 1, level) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def _t_quantile(freedom: int, level: float) -> float:
    """Half-width that holds this share of Student's t; the angle atan(t / √n) has a density to integrate."""
    angle = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)
    density = angle.cos() ** (freedom - 1)
    share = torch.cumulative_trapezoid(density, angle)
    place = int(torch.searchsorted(share / share[-1], level))
    return math.sqrt(freedom) * math.tan(float(angle[place + 1]))


def _value(row: Finished, name: str) -> float | None:
    if name == "early_stop":
        return None if row.early_stop is None else float(row.early_stop)
    return row.seconds if name == "seconds" else row.values.get(name)


def _shown(s: Summary | None) -> str:
    if s is None:
        return ""
    half = "" if math.isnan(s.low) else f" ±{100 * (s.high - s.mean):.2f}"
    return f"{100 * s.mean:.2f}{half}"
