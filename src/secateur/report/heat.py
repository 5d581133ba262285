"""A table of numbers as a table of shades."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from secateur.report.canvas import SMALL, WIDTH, Plot, Values, array, clean, style, with_note
from secateur.report.numbers import Format, number
from secateur.report.page import Figure
from secateur.report.rows import ADVANCE, Rows, join
from secateur.report.theme import LIGHT

_SHADES = 24
_FAINTEST = 0.04  # opacity of the least value, so that its cell is still one


@style()
def heat(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]] | Values,
    *,
    xlabel: str,
    title: str,
    format: Format = number,
    caption: str = "",
) -> Figure:
    """A table of `rows` x `columns` whose cells are the darker the larger the value; `title` names it.

    Shade is linear from the least to the greatest value, in 25 steps. Cells show their number where there
    is room. More than 400 rows are joined as in `layer_bars`.
    """
    table = array(values)
    if table.shape != (len(rows), len(columns)) or table.size == 0:
        raise ValueError(
            f"heat() needs a value for each of {len(rows)} rows and {len(columns)} columns; "
            f"got the shape {table.shape}."
        )
    missing = int((~np.isfinite(table)).sum())
    alt = f"Table of {title} for {len(rows)} rows by {len(columns)} columns ({xlabel})."
    names, table, caption = join(rows, table, caption)
    labels = Rows(names)
    plot = Plot(56 + labels.height + 34, left=labels.room, right=6, top=56, bottom=34)
    labels.label(plot)
    wide = (WIDTH - labels.room - 6) / len(columns)
    _label_columns(plot, columns, wide)
    plot.text(0, 14, clean(title), color=LIGHT["muted"])
    plot.ax.set_title(clean(xlabel), color=LIGHT["muted"], fontsize=SMALL, pad=22)
    finite = table[np.isfinite(table)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if high > low:
        _shade(plot.ax, (table - low) / (high - low))
        _key(plot, format(low), format(high))
    else:
        _shade(plot.ax, np.where(np.isfinite(table), 0.5, np.nan))
    if labels.have_texts:
        _write_values(plot.ax, table, format, wide)
    return Figure(plot.svg(), with_note(caption, missing), clean(alt))


def _label_columns(plot: Plot, columns: Sequence[str], wide: float) -> None:
    every = math.ceil(max(map(len, columns)) * ADVANCE / wide)
    plot.ax.set_xlim(-0.5, len(columns) - 0.5)
    plot.ax.set_xticks(range(0, len(columns), every), [clean(name) for name in columns[::every]])
    plot.ax.xaxis.tick_top()
    plot.ax.spines["bottom"].set_visible(False)


def _write_values(ax: Axes, table: Values, form: Format, wide: float) -> None:
    texts = [[form(value) if math.isfinite(value) else "–" for value in row] for row in table]
    if max(len(text) for row in texts for text in row) * ADVANCE > wide:
        return
    for y, row in enumerate(texts):
        for x, text in enumerate(row):
            ax.text(x, y, text, ha="center", va="center_baseline", fontsize=SMALL)


def _shade(ax: Axes, share: Values) -> None:
    """Fill the cells by their share in [0, 1]; NaN stays empty."""
    # One path for each shade, not for each cell: a few hundred layers stay a few kilobytes.
    level = np.where(np.isfinite(share), np.rint(np.nan_to_num(share) * _SHADES), -1)
    for k in range(_SHADES + 1):
        boxes = [_box(x, y) for y, x in np.argwhere(level == k).tolist()]
        if boxes:
            opacity = _FAINTEST + (1 - _FAINTEST) * k / _SHADES
            whole = Path.make_compound_path(*boxes)
            ax.add_patch(PathPatch(whole, facecolor=LIGHT["heat"], alpha=opacity, linewidth=0))


def _box(x: float, y: float) -> Path:
    a, b = 0.48, 0.46
    corners = [(x - a, y - b), (x + a, y - b), (x + a, y + b), (x - a, y + b), (x - a, y - b)]
    return Path(corners, [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY])


def _key(plot: Plot, low: str, high: str) -> None:
    """Which shade is how much, at the lower right."""
    key = plot.canvas.add_axes((1 - 190 / WIDTH, 8 / plot.height, 90 / WIDTH, 9 / plot.height))
    _shade(key, np.linspace(0, 1, 6)[None])
    key.set_xlim(-0.5, 5.5)
    key.set_ylim(-0.5, 0.5)
    key.set_axis_off()
    plot.text(WIDTH - 196, plot.height - 9, low, ha="right", color=LIGHT["muted"], fontsize=SMALL)
    plot.text(WIDTH - 94, plot.height - 9, high, color=LIGHT["muted"], fontsize=SMALL)
