"""The report page: plain data in, one self-contained HTML document out."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from os import PathLike
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from secateur.report.numbers import Cell, column
from secateur.report.svg import embed, extent
from secateur.report.theme import DARK, LIGHT

_NUMERIC = re.compile(r"[-+−~±<>≤≥]?\s?[\d∞]|NaN$|–$")
_LONG = 24  # rows; a longer table scrolls in a box of its own


@dataclass(frozen=True)
class Table:
    """Rows of cells below named columns; the first column names the row. None shows as a dash."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture: inline SVG (several for small multiples), what it shows, and the same for who cannot see."""

    svg: str | tuple[str, ...]
    caption: str
    alt: str
    png: bytes | None = None  # the same in pixels, where it was asked for

    @property
    def panels(self) -> tuple[str, ...]:
        """The picture's SVG elements, one or several."""
        return (self.svg,) if isinstance(self.svg, str) else self.svg


@dataclass(frozen=True)
class Section:
    """A heading with text (blank lines part its paragraphs), then figures, tables and notes."""

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


def render(
    title: str,
    subtitle: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    footer: str = "",
) -> str:
    """The whole page as HTML: the same bytes for the same data, no script, nothing fetched.

    `facts` are (label, value) pairs shown as cards. Every text is escaped. Raises `ValueError` for a table
    whose rows do not fit its columns and for SVG that holds more than shapes and text.
    """
    for section in sections:
        for table in section.tables:
            _check(table)
    return _template().render(
        title=title,
        subtitle=subtitle,
        facts=facts,
        sections=sections,
        footer=footer,
        light=LIGHT,
        dark=DARK,
    )


def write(path: str | PathLike[str], html: str) -> None:
    """Write the text as UTF-8 under a temporary name, flush it to the disk, then rename it to `path`."""
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"Cannot write {target}: the folder {target.parent} does not exist.")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            # A path read from the system may hold half a surrogate pair, which UTF-8 has no bytes for.
            file.write(html.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _check(table: Table) -> None:
    if not table.columns:
        raise ValueError(f"The table {table.caption!r} has no columns.")
    for i, row in enumerate(table.rows):
        if len(row) != len(table.columns):
            raise ValueError(
                f"Row {i} of the table {table.caption!r} has {len(row)} cells; "
                f"its columns are {len(table.columns)}."
            )


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        cells=_cells,
        columns=_columns,
        picture=_picture,
        paragraphs=_paragraphs,
        is_long=_is_long,
        shape=_shape,
    )
    return environment.from_string(files(__package__).joinpath("template.html.j2").read_text("utf-8"))


def _picture(figure: Figure, prefix: str) -> Markup:
    # embed() parses and re-serialises each panel, so that what comes out is SVG of shapes and text only.
    return Markup("").join(Markup(embed(p, f"{prefix}-{i}-")) for i, p in enumerate(figure.panels))


def _shape(figure: Figure) -> str:
    """Class of a figure that takes a row for itself, where the others stand side by side."""
    width, height = extent(figure.panels[0])
    return "many" if len(figure.panels) > 1 else "tall" if height > 1.4 * width else ""


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _is_long(table: Table) -> bool:
    return len(table.rows) > _LONG


def _columns(table: Table) -> list[tuple[str, bool]]:
    """Name of each column and whether it is one of numbers; the first names the rows and never is."""
    found = []
    for j, name in enumerate(table.columns):
        cells = [row[j] for row in table.rows if row[j] is not None]
        numeric = j > 0 and all(not isinstance(c, str) or _NUMERIC.match(c) for c in cells)
        found.append((name, numeric))
    return found


def _cells(table: Table) -> list[tuple[str, ...]]:
    """Rows of texts; the numbers of a column share their decimals."""
    return list(
        zip(*(column([row[j] for row in table.rows]) for j in range(len(table.columns))), strict=True)
    )
