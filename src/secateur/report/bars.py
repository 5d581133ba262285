"""Bars: one for each layer, or a few side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from secateur.report.canvas import Legend, Numbers, Plot, Ticks, Values, array, clean, short, style, with_note
from secateur.report.numbers import Format, number
from secateur.report.page import Figure
from secateur.report.rows import Rows, beside, join
from secateur.report.theme import LIGHT, SERIES

_BAR, _GAP = 17.0, 34.0  # height of one bar of a group; of the room for a label above each group


@style()
def layer_bars(
    names: Sequence[str],
    values: Numbers,
    *,
    xlabel: str,
    reference: tuple[str, float] | None = None,
    format: Format = number,
    caption: str = "",
) -> Figure:
    """A horizontal bar for each layer, first on top, and a dashed line at `reference` (name, value).

    Up to 60 layers stand at full height and up to 85 show their values; more become thinner with every few
    labelled; beyond 400, neighbours are joined into their mean and the caption says so.
    """
    lengths = array(values)
    if len(names) == 0 or len(names) != len(lengths):
        raise ValueError(f"layer_bars() needs a value for each name; got {len(names)} and {len(lengths)}.")
    missing = int((~np.isfinite(lengths)).sum())
    alt = f"Bar chart of {xlabel} for {len(names)} layers. {_extremes(names, lengths, format)}"
    names, table, caption = join(names, lengths[:, None], caption)
    lengths = table[:, 0]
    rows = Rows(names)
    plot = Plot(30 + rows.height + 46, left=rows.room, right=60, top=30, bottom=46)
    rows.label(plot)
    thick = 0.72 if rows.have_texts else 0.86
    plot.ax.barh(range(len(names)), _zero_if_unknown(lengths), height=thick, color=LIGHT["accent"], alpha=0.8)
    if rows.have_texts:
        for row, value in enumerate(lengths):
            text = _text(value, format)
            beside(plot.ax, (1, row), text, (56, 0), xycoords=("axes fraction", "data"), ha="right")
    plot.ax.grid(axis="x")
    plot.ax.xaxis.set_major_locator(MaxNLocator(5))
    plot.ax.xaxis.set_major_formatter(Ticks(format))
    plot.ax.set_xlabel(clean(xlabel), labelpad=7)
    if reference is not None:
        _reference_line(plot, *reference)
    return Figure(plot.svg(), with_note(caption, missing), clean(alt))


@style()
def grouped_bars(
    labels: Sequence[str],
    groups: Mapping[str, Numbers],
    title: str,
    *,
    format: Format = number,
    caption: str = "",
) -> Figure:
    """Bars side by side, a block for each label and a bar in it for each group (dense, pruned).

    All bars share one scale that starts at zero, so give one unit a figure; `title` names it.
    """
    _check_groups(labels, groups)
    legend = Legend(list(groups))
    block = _BAR * len(groups) + _GAP
    below = legend.height + 8
    plot = Plot(24 + block * len(labels) + below, left=0, right=84, top=24, bottom=below)
    starts = np.arange(len(labels)) * block + _GAP
    for start, label in zip(starts, labels, strict=True):
        plot.ax.text(0, start - 6, short(label, 60))
    handles = [
        _group(plot, array(starts + _BAR * (i + 0.5)), array(values), i, format)
        for i, values in enumerate(groups.values())
    ]
    plot.ax.set_ylim(block * len(labels), 0)
    plot.ax.set_xlim(0, max(_zero_if_unknown(array(values)).max() for values in groups.values()) or 1.0)
    plot.ax.set_axis_off()
    plot.text(0, 14, clean(title), color=LIGHT["muted"])
    legend.draw(plot, handles)
    missing = int(sum((~np.isfinite(array(values))).sum() for values in groups.values()))
    alt = f"Bar chart of {title}."
    for i, label in enumerate(labels):
        alt += (
            f" {label}: " + ", ".join(f"{name} {format(values[i])}" for name, values in groups.items()) + "."
        )
    return Figure(plot.svg(), with_note(caption, missing), clean(alt))


def _check_groups(labels: Sequence[str], groups: Mapping[str, Numbers]) -> None:
    if not labels or not groups:
        raise ValueError("grouped_bars() needs at least one label and one group.")
    for name, values in groups.items():
        if len(values) != len(labels):
            raise ValueError(f"Group {name!r} has {len(values)} values for {len(labels)} labels.")
        if (array(values) < 0).any():
            raise ValueError(f"Group {name!r} has a negative value, which a size cannot be.")


def _group(plot: Plot, y: Values, values: Values, i: int, form: Format) -> Artist:
    """The bars of one group, and its key for the legend; the first group is the grey one to compare with."""
    colour, alpha = (LIGHT[SERIES[(i - 1) % len(SERIES)]], 0.85) if i else (LIGHT["muted"], 0.7)
    lengths = _zero_if_unknown(values)
    plot.ax.barh(y, lengths, height=_BAR - 3, color=colour, alpha=alpha)
    for row, length, value in zip(y, lengths, values, strict=True):
        beside(plot.ax, (length, row), _text(value, form), (5, 0))
    return Patch(facecolor=colour, alpha=alpha)


def _reference_line(plot: Plot, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"The reference {name!r} must be finite; got {value}.")
    plot.ax.axvline(value, color=LIGHT["ink"], linewidth=1.2, linestyle=(0, (4, 3)))
    where: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "baseline"}
    beside(plot.ax, (value, 1), short(name, 40), (0, 6), color=LIGHT["muted"], **where)


def _zero_if_unknown(values: Values) -> Values:
    return np.where(np.isfinite(values), values, 0.0)


def _text(value: float, form: Format) -> str:
    return form(value) if math.isfinite(value) else "–"


def _extremes(names: Sequence[str], values: Values, form: Format) -> str:
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return "No value is finite."
    low, high = known[values[known].argmin()], known[values[known].argmax()]
    return f"Least {form(values[low])} ({names[low]}), most {form(values[high])} ({names[high]})."
