"""Curves with bands, and small multiples of histograms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter

from secateur.report.canvas import (
    SMALL,
    Legend,
    Numbers,
    Plot,
    Ticks,
    Values,
    array,
    clean,
    common_prefix,
    short,
    style,
    with_note,
)
from secateur.report.numbers import Format, number
from secateur.report.page import Figure
from secateur.report.theme import LIGHT, SERIES

_COLOURS = [LIGHT[name] for name in SERIES]
_MARKERS = "osD^vPX*"
_TITLE = 30  # characters above a panel
_STEPS = [1, 2, 2.5, 5, 10]
_SPARSITIES = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


@dataclass(frozen=True)
class Series:
    """One curve; `low` and `high`, if given, bound the band around it (say, the spread over seeds)."""

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Histogram:
    """One panel: `counts` (or densities) between neighbouring `edges`, so one fewer than the edges.

    `overlays` are curves in the same units (a fitted density, say); `after` are the counts once pruned.
    """

    name: str
    edges: Numbers
    counts: Numbers
    overlays: Sequence[Series] = ()
    after: Numbers | None = None


@style()
def curves(
    series: Sequence[Series],
    xlabel: str,
    ylabel: str,
    *,
    reference: tuple[str, float] | None = None,
    xformat: Format = number,
    yformat: Format = number,
    log_y: bool = False,
    log_density: bool = False,
    caption: str = "",
    pixels: bool = False,
) -> Figure:
    """Lines with bands, and a dashed horizontal line at `reference` (name, value): accuracy over sparsity.

    A value that is not finite leaves a gap. `log_y` needs values above zero. `log_density` takes x for a
    sparsity in [0, 1) and spaces it by -log(1 - x), so that every halving of what is left is one step.
    `pixels` adds the picture as PNG.
    """
    if not series:
        raise ValueError("curves() needs at least one series; got none.")
    for one in series:
        _check_series(one, log_y, log_density)
    legend = Legend([one.name for one in series])
    plot = Plot(332 + legend.height, left=52, right=14, top=34, bottom=50 + legend.height)
    handles: list[Artist] = [_curve(plot, one, i) for i, one in enumerate(series)]
    plot.ax.grid(axis="y")
    _scale_x(plot, series, xformat, log_density)
    _scale_y(plot, yformat, log_y)
    if reference is not None:
        _reference_line(plot, *reference)
    plot.ax.set_xlabel(clean(xlabel), labelpad=7)
    plot.text(0, 14, clean(ylabel), color=LIGHT["muted"])
    legend.draw(plot, handles)
    missing = sum(int((~np.isfinite(array(one.y))).sum()) for one in series)
    alt = f"Line chart of {ylabel} against {xlabel}. " + " ".join(
        _in_words(one, xformat, yformat) for one in series
    )
    png = plot.png() if pixels else None
    return Figure(plot.svg(), with_note(caption, missing), clean(alt), png)


@style()
def histograms(panels: Sequence[Histogram], *, xformat: Format = number, caption: str = "") -> Figure:
    """Small multiples, one panel a layer: counts filled, or in outline behind `after`; overlays dashed.

    The height follows the outline and the curves; a taller bar of `after` is cut off at the top.
    """
    if not panels:
        raise ValueError("histograms() needs at least one panel; got none.")
    names = dict.fromkeys(overlay.name for one in panels for overlay in one.overlays)
    looks = {name: _overlay_look(i) for i, name in enumerate(names)}
    shared = common_prefix([one.name for one in panels])
    long = shared and max(len(one.name) for one in panels) > _TITLE
    svgs = [
        _panel(one, "…" + one.name[len(shared) :] if long else one.name, xformat, looks) for one in panels
    ]
    keys: dict[str, Artist] = {}
    if any(one.after is not None for one in panels):
        keys["before"] = Line2D([], [], color=LIGHT["muted"], linewidth=1.2)
        keys["after"] = Patch(facecolor=LIGHT["accent"], alpha=0.55)
    keys.update({name: Line2D([], [], **look) for name, look in looks.items()})
    if keys:
        svgs.insert(0, _key_strip(keys).replace("<svg ", '<svg class="keys" ', 1))
    alt = f"Histograms of {len(panels)} layers: " + ", ".join(one.name for one in panels) + "."
    return Figure(tuple(svgs), caption, clean(alt))


def _overlay_look(i: int) -> dict[str, Any]:
    colour = _COLOURS[(1 + i) % len(_COLOURS)]
    return {"color": colour, "linestyle": _DASHES[1 + i % (len(_DASHES) - 1)], "linewidth": 1.4}


def _panel(one: Histogram, title: str, xformat: Format, looks: Mapping[str, dict[str, Any]]) -> str:
    edges, counts = array(one.edges), array(one.counts)
    after = None if one.after is None else array(one.after)
    for label, values in (("counts", counts), ("after", counts if after is None else after)):
        if len(values) == 0 or len(edges) != len(values) + 1 or not np.isfinite(values).all():
            raise ValueError(
                f"Histogram {one.name!r} needs finite {label}, one fewer than its edges; "
                f"got {len(values)} for {len(edges)} edges."
            )
    if not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
        raise ValueError(f"Histogram {one.name!r} needs finite edges that increase.")
    plot = Plot(140, left=16, right=16, top=24, bottom=22, width=250)
    if after is None:
        plot.ax.stairs(counts, edges, fill=True, color=LIGHT["accent"], alpha=0.55, linewidth=0)
    else:
        plot.ax.stairs(after, edges, fill=True, color=LIGHT["accent"], alpha=0.55, linewidth=0)
        plot.ax.stairs(counts, edges, color=LIGHT["muted"], linewidth=1.0, baseline=None)
    top = counts.max()
    for overlay in one.overlays:
        _check_series(overlay)
        y = array(overlay.y)
        plot.ax.plot(array(overlay.x), y, **looks[overlay.name])
        top = max(top, y[np.isfinite(y)].max(initial=0.0))
    # A Laplace density peaks far above its histogram; half as high again is enough to see that it does.
    plot.ax.set_ylim(0, 1.05 * min(top, 1.5 * counts.max()) or 1.0)
    plot.ax.set_xlim(edges[0], edges[-1])
    plot.ax.set_yticks([])
    plot.ax.xaxis.set_major_locator(MaxNLocator(4))
    plot.ax.xaxis.set_major_formatter(Ticks(xformat))
    plot.text(16, 14, short(title, _TITLE), fontsize=SMALL + 0.5)
    return plot.svg()


def _key_strip(keys: Mapping[str, Artist]) -> str:
    legend = Legend(list(keys))
    plot = Plot(legend.height + 2, left=0, right=0, top=0, bottom=0)
    plot.ax.set_axis_off()
    legend.draw(plot, list(keys.values()))
    return plot.svg()


def _curve(plot: Plot, one: Series, i: int) -> Line2D:
    x, y = array(one.x), np.where(np.isfinite(array(one.y)), array(one.y), np.nan)
    colour = _COLOURS[i % len(_COLOURS)]
    if one.low is not None and one.high is not None:
        low, high = array(one.low), array(one.high)
        shown = np.isfinite(low) & np.isfinite(high)
        plot.ax.fill_between(x, low, high, where=shown, color=colour, alpha=0.16, linewidth=0)
    dash = 1 if one.dashed else i // len(_COLOURS) % len(_DASHES)
    (line,) = plot.ax.plot(
        x,
        y,
        color=colour,
        linewidth=1.9,
        linestyle=_DASHES[dash],
        marker=_MARKERS[i % len(_MARKERS)],
        markersize=4.4,
        markeredgewidth=0,
        markevery=max(1, len(x) // 20),
        clip_on=False,  # a marker on the edge of the plot stays whole
        zorder=3 + 1 / (1 + i),  # the first series on top
    )
    return line


def _scale_x(plot: Plot, series: Sequence[Series], form: Format, log_density: bool) -> None:
    ax = plot.ax
    if log_density:
        last = max(x for one in series for x in one.x)
        ax.set_xlim(0, last or 0.5)
        ax.set_xscale("function", functions=(_halvings, lambda t: -np.expm1(-t)))
        ticks = [t for t in _SPARSITIES if t <= last]
        # Without most of the weights gone the scale is nearly linear, and so are its ticks.
        few = len(ticks) < 4
        ax.xaxis.set_major_locator(MaxNLocator(7, steps=_STEPS) if few else FixedLocator(ticks[-9:]))
    else:
        ax.margins(x=0.02)
        ax.xaxis.set_major_locator(MaxNLocator(7, steps=_STEPS))
    ax.xaxis.set_major_formatter(Ticks(form))


def _halvings(sparsity: Values) -> Values:
    # matplotlib transforms the corner (1, 1) of its axes as well, where the logarithm has no value.
    return -np.log1p(-np.minimum(sparsity, 1 - 1e-12))


def _scale_y(plot: Plot, form: Format, log_y: bool) -> None:
    axis = plot.ax.yaxis
    if log_y:
        plot.ax.set_yscale("log")
        low, high = plot.ax.get_ylim()
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,), numticks=8))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(6, steps=_STEPS))
    axis.set_major_formatter(Ticks(form))


def _reference_line(plot: Plot, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"The reference {name!r} must be finite; got {value}.")
    plot.ax.axhline(value, color=LIGHT["muted"], linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
    plot.ax.annotate(
        clean(name),
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=LIGHT["muted"],
        fontsize=SMALL + 0.5,
    )


def _check_series(one: Series, log_y: bool = False, log_density: bool = False) -> None:
    lengths = {len(v) for v in (one.x, one.y, one.low, one.high) if v is not None}
    if lengths == {0}:
        raise ValueError(f"Series {one.name!r} has no points.")
    if len(lengths) > 1:
        raise ValueError(f"Series {one.name!r} has x, y, low and high of different lengths.")
    if (one.low is None) != (one.high is None):
        raise ValueError(f"Series {one.name!r} has only one side of its band; give both low and high.")
    if not np.isfinite(array(one.x)).all():
        raise ValueError(f"Series {one.name!r} has an x that is not finite.")
    if log_density and not all(0 <= x < 1 for x in one.x):
        raise ValueError(
            f"Series {one.name!r} has an x outside [0, 1), which is no sparsity for log_density."
        )
    if log_y and any((array(v) <= 0).any() for v in (one.y, one.low) if v is not None):
        raise ValueError(f"Series {one.name!r} has values at or below zero, which a log scale cannot show.")


def _in_words(one: Series, xformat: Format, yformat: Format) -> str:
    first, last = 0, len(one.x) - 1
    return (
        f"{one.name}: {yformat(one.y[first])} at {xformat(one.x[first])}, "
        f"{yformat(one.y[last])} at {xformat(one.x[last])}."
    )
