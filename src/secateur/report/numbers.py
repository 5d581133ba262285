"""Numbers as people read them: thousands separators, significant digits, per cent, bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

_PREFIXES = ("", "k", "M", "G", "T", "P")
Cell = str | int | float | None

_DECIMALS = 6
NBSP = "\N{NO-BREAK SPACE}"


@runtime_checkable
class Format(Protocol):
    """Text of a value, to at least `digits` significant digits."""

    def __call__(self, value: float, digits: int = ..., /) -> str: ...


def number(value: float, digits: int = 4, /) -> str:
    """Plain decimal notation with thousands separators; a power of ten only below 1e-4 and from 1e15.

    >>> number(1234567), number(0.1 + 0.2), number(97.256), number(3.2e-7)
    ('1,234,567', '0.3', '97.26', '3.2e-7')
    """
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    if not 1e-4 <= abs(value) < 1e15:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{_trim(mantissa)}e{int(exponent)}"
    return _trim(f"{value:,.{_decimals(value, digits)}f}")


def percent(value: float, digits: int = 3, /) -> str:
    """A fraction as per cent; what is not quite nothing or everything never rounds to it.

    >>> percent(0.8), percent(0.8123), percent(0.99996), percent(1.0)
    ('80%', '81.2%', '99.996%', '100%')
    """
    if not math.isfinite(value):
        return number(value)
    for precision in range(digits, 18):
        text = f"{100 * value:.{precision}g}"
        if value in (0.0, 1.0) or float(text) not in (0.0, 100.0):
            break
    return text + "%"


def compact(value: float, digits: int = 3, /) -> str:
    r"""A count with a metric letter: k, M, G, T, P.

    >>> compact(950), compact(1_234_567), compact(999_999)
    ('950', '1.23\xa0M', '1\xa0M')
    """
    return _metric(value, digits, "")


def size(value: float, digits: int = 3, /) -> str:
    r"""A size in bytes with a metric (decimal) prefix.

    >>> size(950), size(4_890_000)
    ('950\xa0B', '4.89\xa0MB')
    """
    return _metric(value, digits, "B")


def column(cells: Sequence[Cell]) -> list[str]:
    """Texts of one column of a table: floats with the same number of decimals, None as an en dash.

    >>> column([0.8, 0.75, None, 1]), column([97.25, 3e-9])
    (['0.80', '0.75', '–', '1'], ['97.25', '3e-9'])
    """
    texts = [_cell(cell) for cell in cells]
    floats = {i: cell for i, cell in enumerate(cells) if isinstance(cell, float) and math.isfinite(cell)}
    sizes = sorted(abs(value) for value in floats.values() if value)
    if not sizes or any("e" in texts[i] for i in floats):
        return texts
    # Four digits of the largest, two of the smallest, and no zero behind what they all need.
    decimals = max(_decimals(sizes[-1], 4), _decimals(sizes[0], 2))
    decimals = min(decimals, max(len(texts[i].partition(".")[2]) for i in floats))
    if decimals <= _DECIMALS:
        for i, value in floats.items():
            texts[i] = f"{value:,.{decimals}f}"
    return texts


def _cell(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int | float):
        return number(cell)
    raise TypeError(f"A table cell is a str, an int, a float or None; got {type(cell).__name__}. Convert it.")


def _metric(value: float, digits: int, unit: str) -> str:
    if not math.isfinite(value):
        return number(value)
    step = 0
    shown = float(f"{value:.{digits}g}")  # rounded first, so that 999,999 becomes 1 M and not 1,000 k
    while abs(shown) >= 1000 and step < len(_PREFIXES) - 1:
        shown /= 1000
        step += 1
    suffix = _PREFIXES[step] + unit
    text = number(shown if step else value, digits)  # below a thousand a count stays exact
    return f"{text}{NBSP}{suffix}" if suffix else text


def _decimals(value: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
