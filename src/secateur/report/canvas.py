"""What all figures share: a matplotlib figure drawn alike everywhere, and its way into SVG.

One unit is one CSS pixel at the figure's natural size. Colours are those of the light theme, each of them
unique, so that `svg.tidy` can turn them into CSS variables.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import Formatter
from numpy.typing import NDArray

from secateur.report import svg
from secateur.report.numbers import Format
from secateur.report.theme import LIGHT

WIDTH = 520.0
_UNITS = 72  # the SVG backend writes 72 units to the inch
TEXT, SMALL = 12.5, 11.0

Values = NDArray[np.float64]
Numbers = Sequence[float] | NDArray[Any]

_STYLE: dict[Any, Any] = {
    # Text stays text; formulas are off because a layer may be called "$x$"; ids are the same each time.
    "svg.fonttype": "none",
    "svg.hashsalt": "secateur",
    "text.parse_math": False,
    "font.size": TEXT,
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["rule"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


@contextmanager
def style() -> Iterator[None]:
    """Our style on the defaults of matplotlib, whatever the user configured; put back afterwards."""
    with mpl.rc_context(), warnings.catch_warnings():
        # matplotlib looks glyphs up in its own font; the reader's browser has its own.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


class Plot:
    """One figure with one pair of axes inside the margins given; all lengths in CSS pixels."""

    def __init__(
        self, height: float, left: float, right: float, top: float, bottom: float, width: float = WIDTH
    ) -> None:
        self.width, self.height = width, height
        self.canvas = Canvas(figsize=(width / _UNITS, height / _UNITS))
        inside = (width - left - right) / width, (height - top - bottom) / height
        self.ax = self.canvas.add_axes((left / width, bottom / height, *inside))
        self.canvas.patch.set_visible(False)
        self.ax.patch.set_visible(False)

    def text(self, x: float, y: float, text: str, **more: Any) -> None:
        """Text at `x` from the left edge and `y` (its baseline) from the top."""
        self.canvas.text(x / self.width, 1 - y / self.height, text, **more)

    def svg(self) -> str:
        """The figure as tidy inline SVG."""
        stream = io.StringIO()
        self.canvas.savefig(stream, format="svg")
        return svg.tidy(stream.getvalue())

    def png(self) -> bytes:
        """The figure in pixels, two for each unit of length, on white with a margin."""
        stream = io.BytesIO()
        look: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.2, "facecolor": "white"}
        self.canvas.savefig(stream, format="png", dpi=2 * _UNITS, **look)
        return stream.getvalue()


class Ticks(Formatter):
    """Tick labels by `form`, with more digits where neighbours would read the same."""

    def __init__(self, form: Format) -> None:
        self.form = form

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Label of one tick, without the rounding errors of where it lies."""
        return self.form(float(f"{x:.12g}"))

    def format_ticks(self, values: Numbers) -> list[str]:
        """Labels of all ticks."""
        labels = [self(value) for value in values]
        for digits in range(4, 16):
            if len(set(labels)) == len(set(values)):
                break
            labels = [self.form(float(f"{value:.12g}"), digits) for value in values]
        return labels


class Legend:
    """Rows of keys below a plot; `height` says how much room they take."""

    def __init__(self, names: Sequence[str], width: float = WIDTH) -> None:
        self.names = [short(name, 40) for name in names]
        widest = 52 + 8.8 * max(map(len, self.names))
        rows = math.ceil(len(names) / max(1, int(width // widest)))
        self.columns = math.ceil(len(names) / rows)
        self.height = 20.0 * rows

    def draw(self, plot: Plot, handles: Sequence[Artist]) -> None:
        """Put the keys at the lower left corner of the figure."""
        box = plot.canvas.legend(
            handles=list(handles),
            # matplotlib leaves out names that begin with an underscore, so the real ones come afterwards.
            labels=["x"] * len(self.names),
            loc="lower left",
            bbox_to_anchor=(0, 0),
            ncols=self.columns,
            frameon=False,
            fontsize=SMALL + 0.5,
            handlelength=2.4,
            # Room for the larger text of a narrow page.
            columnspacing=1.4 + 0.14 * max(map(len, self.names)),
            labelspacing=0.45,
            borderpad=0,
            borderaxespad=0,
        )
        for text, name in zip(box.get_texts(), self.names, strict=True):
            text.set_text(name)


def clean(text: str) -> str:
    """The text with a replacement mark for what no document may hold (control characters, half pairs)."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def short(text: str, length: int) -> str:
    """At most `length` characters: the middle of a long name goes, since both ends tell layers apart."""
    text = clean(text)
    if len(text) <= length:
        return text
    head = (length - 1) // 3
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def common_prefix(names: Sequence[str]) -> str:
    """The dotted beginning that all names share, its last dot included; empty where there is none.

    >>> common_prefix(["model.layers.0.q", "model.layers.1.q"])
    'model.layers.'
    """
    if len(names) < 2:
        return ""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{level[0]}." for level in takewhile(lambda level: len(set(level)) == 1, levels))


def with_note(caption: str, missing: int) -> str:
    """The caption, and how many values are not in the picture because they are not finite."""
    if not missing:
        return caption
    return f"{caption} {missing} value{' is' if missing == 1 else 's are'} not finite and not drawn.".strip()


def array(values: Numbers | Sequence[Numbers]) -> Values:
    """The values as float64."""
    return np.asarray(values, dtype=np.float64)
