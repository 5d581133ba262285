"""The pictures of a report. Importing this module imports matplotlib; nothing global is left changed.

Every function returns a `Figure` whose SVG takes the page's colours and fonts, light and dark. Values that
are not finite are not drawn, and the caption says how many. Mistakes in the data raise `ValueError`.
"""

from __future__ import annotations

from os import PathLike

from secateur.report.bars import grouped_bars, layer_bars
from secateur.report.heat import heat
from secateur.report.lines import Histogram, Series, curves, histograms
from secateur.report.page import Figure, write
from secateur.report.svg import standalone

__all__ = ["Histogram", "Series", "curves", "grouped_bars", "heat", "histograms", "layer_bars", "save"]


def save(figure: Figure, path: str | PathLike[str]) -> None:
    """Write one figure as an SVG file of its own, in the colours of the light page."""
    write(path, standalone(figure.panels))
