"""The page of an experiment with tickets: accuracy over what is left, with controls beside it."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.core.files import replacing, write_text
from secateur.lottery import LinearPath, Overlap, Summary, TicketTable, kept_paths, overlaps
from secateur.report import Figure, Section, Table, percent, render
from secateur.report.figures import Series, curves

_SHOWN = 6  # levels whose paths are drawn


def plot_tickets(
    table: TicketTable, folder: str | os.PathLike[str], out: str | os.PathLike[str], name: str = ""
) -> None:
    """Write `tickets.html`, `tickets.png` and `tickets.csv` about an experiment in a folder.

    Raises `ValueError` if no training of it is finished.
    """
    _check(table)
    out = Path(out)
    picture = accuracy_figure(table)
    write_text(
        out / "tickets.html", ticket_page(table, kept_paths(table, folder), overlaps(table, folder), name)
    )
    assert picture.png is not None
    with replacing(out / "tickets.png") as temporary:
        temporary.write_bytes(picture.png)
    table.csv(out / "tickets.csv")


def ticket_page(
    table: TicketTable, paths: Sequence[LinearPath] = (), common: Sequence[Overlap] = (), name: str = ""
) -> str:
    """HTML of one experiment."""
    _check(table)
    sections = [_accuracy_section(table), _layers_section(table)]
    if any(r.early_stop is not None for r in table):
        sections.insert(1, _early_section(table))
    if paths:
        sections.append(_paths_section(paths))
    if common:
        sections.append(_overlap_section(common))
    title = "Winning tickets" + (f": {name}" if name else "")
    return render(title, _sentence(table), _facts(table), sections)


def compare_page(tables: Mapping[str, TicketTable]) -> str:
    """HTML of several experiments' tickets side by side."""
    for table in tables.values():
        _check(table)
    found = {name: _ticket(table) for name, table in tables.items()}
    figure = curves(
        [_series(name, rows) for name, rows in found.items()],
        "weights remaining",
        "accuracy",
        xformat=_remaining,
        yformat=percent,
        log_density=True,
        caption="Tickets. Bands are 95 % confidence intervals of the mean over seeds.",
        pixels=True,
    )
    rows = [
        (f"{name}, {percent(s.density)} left", percent(s.mean, 4), _interval(s), s.seeds)
        for name, found_rows in found.items()
        for s in found_rows
    ]
    columns = ("experiment", "accuracy", "95 % interval", "seeds")
    section = Section("Accuracy", figures=[figure], tables=[Table(columns, rows)])
    return render("Winning tickets compared", f"{len(tables)} experiments.", [], [section])


def accuracy_figure(table: TicketTable) -> Figure:
    """Accuracy of all branches over what was removed, with the dense network as reference."""
    found = table.summary()
    dense = next((s for s in found if s.level == 0 and s.branch == "ticket"), None)
    shown = [branch for branch in table.branches if branch not in _twins(table)]
    return curves(
        [_series(branch, [s for s in found if s.branch == branch]) for branch in shown],
        "weights remaining",
        "accuracy",
        reference=None if dense is None else ("dense", dense.mean),
        xformat=_remaining,
        yformat=percent,
        log_density=True,
        caption="Test accuracy after training. Bands are 95 % confidence intervals of the mean over seeds.",
        pixels=True,
    )


def _remaining(removed: float, digits: int = 3, /) -> str:
    return percent(1 - removed, digits)


def _check(table: TicketTable) -> None:
    if not len(table):
        raise ValueError("No training of this experiment is finished yet.")
    if not table.summary():
        raise ValueError("evaluate gave no value named accuracy, which pictures show.")


def _twins(table: TicketTable) -> set[str]:
    """Branches that repeat the ticket, whose curve would hide its own."""
    kinds = {r.branch: str(dict(r.settings.get("branch") or {}).get("of", "")) for r in table}
    return {branch for branch, kind in kinds.items() if kind.endswith(".Twin")}


def _ticket(table: TicketTable) -> list[Summary]:
    return [s for s in table.summary() if s.branch == "ticket"]


def _series(name: str, rows: Sequence[Summary]) -> Series:
    has_band = all(not math.isnan(s.low) for s in rows)
    return Series(
        name,
        [1 - s.density for s in rows],
        [s.mean for s in rows],
        [s.low for s in rows] if has_band else None,
        [min(1.0, s.high) for s in rows] if has_band else None,
        dashed=name != "ticket",
    )


def _sentence(table: TicketTable) -> str:
    tickets = _ticket(table)
    dense = next((s for s in tickets if s.level == 0), None)
    good = [s for s in tickets if dense is not None and s.level > 0 and s.mean >= dense.mean]
    if dense is None or not good:
        return "Iterative pruning with rewinding, and controls at the same density."
    return (
        f"Tickets match the dense network's mean accuracy of {percent(dense.mean, 4)} down to "
        f"{percent(good[-1].density)} of its weights."
    )


def _facts(table: TicketTable) -> list[tuple[str, str]]:
    seconds = sum(r.seconds for r in table)
    return [
        ("trainings", f"{len(table):,}"),
        ("seeds", str(len({r.seed for r in table}))),
        ("least left", percent(min(r.density for r in table))),
        ("training time", f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"),
    ]


def _accuracy_section(table: TicketTable) -> Section:
    found = table.summary()
    levels = sorted({s.level for s in found})
    at = {(s.branch, s.level): s for s in found}
    rows = []
    for level in levels:
        density = next(s.density for s in found if s.level == level)
        cells = [_cell(at.get((branch, level))) for branch in table.branches]
        rows.append((percent(density), *cells))
    caption = "Mean accuracy in per cent, and half the 95 % interval, at the share of weights that is left."
    return Section(
        "Accuracy",
        figures=[accuracy_figure(table)],
        tables=[Table(("left", *table.branches), rows, caption)],
    )


def _cell(s: Summary | None) -> str | None:
    if s is None:
        return None
    half = "" if math.isnan(s.low) else f" ± {100 * (s.high - s.mean):.2f}"
    return f"{100 * s.mean:.2f}{half}"


def _interval(s: Summary) -> str | None:
    return None if math.isnan(s.low) else f"{percent(s.low, 4)} to {percent(s.high, 4)}"


def _early_section(table: TicketTable) -> Section:
    found = table.summary("early_stop")
    series = [_series_of_steps(b, [s for s in found if s.branch == b]) for b in table.branches]
    text = "The step at which the loss on the validation data was lowest: how fast a network learns."
    figure = curves(
        [s for s in series if len(s.x)],
        "weights remaining",
        "step of early stopping",
        xformat=_remaining,
        log_density=True,
        caption="Mean over seeds.",
    )
    return Section("Early stopping", text, figures=[figure])


def _series_of_steps(name: str, rows: Sequence[Summary]) -> Series:
    return Series(name, [1 - s.density for s in rows], [s.mean for s in rows], dashed=name != "ticket")


def _layers_section(table: TicketTable) -> Section:
    tickets = [r for r in table if r.branch == "ticket"]
    levels = sorted({r.level for r in tickets})
    names = list(tickets[0].layers) if tickets else []
    densities: dict[str, list[float]] = {
        name: [statistics.fmean(r.layers[name] for r in tickets if r.level == level) for level in levels]
        for name in names
    }
    left = [statistics.fmean(r.density for r in tickets if r.level == level) for level in levels]
    rows: list[tuple[Any, ...]] = [
        (percent(total), *(percent(densities[name][i]) for name in names)) for i, total in enumerate(left)
    ]
    shown = sorted(names, key=lambda n: -densities[n][-1])
    few = names if len(names) <= 8 else [*shown[:4], *shown[-4:]]
    figure = curves(
        [Series(name, [1 - d for d in left], densities[name]) for name in few],
        "weights remaining",
        "left of the layer",
        xformat=_remaining,
        yformat=percent,
        log_density=True,
        log_y=all(min(densities[name]) > 0 for name in few),
        caption="Mean over seeds."
        + ("" if few == names else " The four densest layers and the four sparsest."),
    )
    text = "What the tickets keep of each layer."
    return Section("Layers", text, figures=[figure], tables=[Table(("left", *names), rows)])


def _paths_section(paths: Sequence[LinearPath]) -> Section:
    levels = sorted({p.level for p in paths})
    own = {level: [p for p in paths if p.level == level] for level in levels}
    left = {level: statistics.fmean(p.density for p in own[level]) for level in levels}
    drawn = levels if len(levels) <= _SHOWN else [levels[round(i * (len(levels) - 1) / 5)] for i in range(6)]
    lines = [
        Series(
            f"{percent(left[level])} left",
            own[level][0].alphas,
            [statistics.fmean(e) for e in zip(*(p.errors for p in own[level]), strict=True)],
        )
        for level in drawn
    ]
    between = curves(
        lines,
        "from one training to the other",
        "error",
        yformat=percent,
        caption="Mean over seeds of the error on the straight line between two trainings from one start.",
    )
    mean = [statistics.fmean(p.barrier for p in own[level]) for level in levels]
    over = curves(
        [Series("barrier", [1 - left[level] for level in levels], mean)],
        "weights remaining",
        "barrier",
        reference=("stable below", 0.02),
        xformat=_remaining,
        yformat=percent,
        log_density=True,
        caption="Largest error on the line minus the mean of its ends.",
    )
    rows = [
        (percent(left[level]), percent(m), percent(max(p.barrier for p in own[level])), len(own[level]))
        for level, m in zip(levels, mean, strict=True)
    ]
    table = Table(("left", "barrier", "highest", "seeds"), rows)
    text = "Each ticket was trained twice from one start, with the data in another order."
    return Section("Linear connectivity", text, figures=[over, between], tables=[table])


def _overlap_section(common: Sequence[Overlap]) -> Section:
    x = [1 - o.density for o in common]
    figure = curves(
        [
            Series("tickets of two seeds", x, [o.iou for o in common]),
            Series("by chance", x, [o.by_chance for o in common], dashed=True),
        ],
        "weights remaining",
        "intersection over union",
        xformat=_remaining,
        log_density=True,
        caption="Mean over pairs of seeds. By chance: random masks of the same density in each layer.",
    )
    rows = [(percent(o.density), round(o.iou, 4), round(o.by_chance, 4)) for o in common]
    return Section(
        "What tickets have in common",
        figures=[figure],
        tables=[Table(("left", "tickets", "by chance"), rows)],
    )
