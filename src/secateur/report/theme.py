"""The colours of the page, light and dark, as CSS custom properties.

Text is at least 4.5:1 against `paper` and `card` and graphics at least 3:1 (WCAG 2.2, AA). The eight
series colours were spread apart in OKLab under normal vision and simulated protanopia, deuteranopia and
tritanopia; dashes and markers tell them apart as well.
"""

from __future__ import annotations

SERIES = tuple(f"series-{i}" for i in range(1, 9))

LIGHT = {
    "paper": "#f8f8f4",
    "card": "#ffffff",
    "ink": "#1b231f",
    "muted": "#5a655e",
    "rule": "#dde1da",
    "accent": "#2f6b4b",
    "heat": "#58a17a",
    "series-1": "#327254",
    "series-2": "#1e98db",
    "series-3": "#cb1906",
    "series-4": "#8648d3",
    "series-5": "#b78800",
    "series-6": "#214247",
    "series-7": "#eb589b",
    "series-8": "#621b88",
}

DARK = {
    "paper": "#131819",
    "card": "#1b2123",
    "ink": "#e7ebe8",
    "muted": "#a0aba5",
    "rule": "#343c3d",
    "accent": "#74c596",
    "heat": "#2c7350",
    "series-1": "#53b678",
    "series-2": "#45ceff",
    "series-3": "#ff7b1e",
    "series-4": "#7878fa",
    "series-5": "#edd16d",
    "series-6": "#deedf2",
    "series-7": "#ff97c1",
    "series-8": "#b77bc6",
}
