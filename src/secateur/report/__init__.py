"""Floor 4: one self-contained HTML page of facts, figures and tables.

Pure presentation: it imports nothing else of Secateur, and whoever has something to show hands it data.
`secateur.report.figures` draws the pictures and is imported by those who need it, because it brings
matplotlib along.
"""

from secateur.report.numbers import compact, number, percent, size
from secateur.report.page import Figure, Section, Table, render, write

__all__ = [
    "Figure",
    "Section",
    "Table",
    "compact",
    "number",
    "percent",
    "render",
    "size",
    "write",
]
