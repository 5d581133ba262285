"""Figures with a row for each layer: how high the rows are, what they are called, and which are joined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from secateur.report.canvas import SMALL, Plot, Values, common_prefix, short
from secateur.report.theme import LIGHT

ADVANCE = 7.7  # the width of a character, with room for wide fonts and for the text of a narrow page
_NAME = 32  # characters of a layer's name
_TALL, _LABELLED = 20.0, 14.0  # height of a row; the least that has room for a text
_PLOT = 1200.0  # more rows than fit in this height at full size become thinner
_MOST = 400  # and more rows than this are joined


class Rows:
    """Named rows, the first on top; the beginning that all names share stands once, above them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.prefix = common_prefix(names)
        self.names = [short(name[len(self.prefix) :], _NAME) for name in names]
        self.pitch = min(_TALL, max(3.0, _PLOT / len(names)))
        self.height = self.pitch * len(names)
        self.room = 12 + ADVANCE * max(len(name) for name in [*self.names, short(self.prefix, _NAME)])

    @property
    def have_texts(self) -> bool:
        """Whether every row is high enough for a text of its own."""
        return self.pitch >= _LABELLED

    def label(self, plot: Plot) -> None:
        """Set the limits and the labels of the y axis; thin rows are labelled every few."""
        every = math.ceil(_LABELLED / self.pitch)
        plot.ax.set_ylim(len(self.names) - 0.5, -0.5)
        plot.ax.set_yticks(range(0, len(self.names), every), self.names[::every])
        if self.prefix:
            up = max(9.0, 16 - self.pitch / 2)  # clear of the first label, which overhangs a thin row
            text = short(self.prefix, _NAME)
            muted = LIGHT["muted"]
            beside(plot.ax, (0, 1), text, (-4, up), xycoords="axes fraction", ha="right", color=muted)


def join(names: Sequence[str], table: Values, caption: str) -> tuple[Sequence[str], Values, str]:
    """Means of neighbouring rows where there are too many to see, and a caption that says so."""
    size = math.ceil(len(names) / _MOST)
    if size == 1:
        return names, table, caption
    means = np.stack([_finite_mean(table[i : i + size]) for i in range(0, len(names), size)])
    return (
        names[::size],
        means,
        f"{caption} Each row is the mean of {size} layers, named by the first.".strip(),
    )


def beside(ax: Axes, where: tuple[float, float], text: str, offset: tuple[float, float], **more: Any) -> None:
    """Small text at a point of the plot, moved by `offset` (right, up) in CSS pixels."""
    look: dict[str, Any] = {"va": "center_baseline", "fontsize": SMALL} | more
    ax.annotate(text, where, xytext=offset, textcoords="offset points", **look)


def _finite_mean(part: Values) -> Values:
    known = np.isfinite(part)
    total = np.where(known, part, 0.0).sum(axis=0)
    return np.divide(total, known.sum(axis=0), out=np.full_like(total, np.nan), where=known.any(axis=0))
