"""The tables of the results, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import cells
from .cells import Cell
from .latency import CASES
from .run import ranked
from .task import Task

FILE = Path(__file__).parents[1] / "results" / "structured.md"
Rows = dict[Cell, dict[str, Any]]


def write(tasks: Iterable[Task]) -> None:
    """Write all tables from the finished cells."""
    rows = cells.read()
    lines = ["# Structured pruning on real models", "", *_introduction(rows)]
    for task in tasks:
        lines += _task(task, {cell: row for cell, row in rows.items() if cell.task == task.name})
    lines += _latency(rows)
    FILE.write_text("\n".join(lines), encoding="utf-8")


def _introduction(rows: Rows) -> list[str]:
    made = sorted({f"{row['machine']}, torch {row['versions']['torch']}" for row in rows.values()})
    return [
        "Written by `python -m benchmarks.structured`. Of each method each cell shows the best variant, "
        "chosen on validation data. MACs and parameters are what remains, of the variant in the first column "
        "of values. Random: mean over seeds ± standard deviation. Made on: " + "; ".join(made) + ".",
        "",
    ]


def _task(task: Task, rows: Rows) -> list[str]:
    dense = next((row for cell, row in rows.items() if cell.target == "dense"), None)
    if dense is None:
        return []
    metrics = ["raw", *(["bn"] if task.batchnorm else []), *(["tuned"] if task.tune else [])]
    names = {"raw": "as pruned", "bn": "batch norm measured anew", "tuned": "fine-tuned"}
    lines = [f"## {task.what}", "", f"Dense: {_number(task, dense['raw'])}.", ""]
    lines += ["| removed | method | MACs | parameters | " + " | ".join(names[m] for m in metrics) + " |"]
    lines += ["| --- | --- | ---: | ---: |" + " ---: |" * len(metrics)]
    for target in task.targets:
        mine = {cell: row for cell, row in rows.items() if cell.target == target.label}
        for method in sorted({cell.method for cell in mine}, key=_place):
            chosen = {cell: row for cell, row in mine.items() if cell.method == method}
            left, texts = _left(task, chosen), [_best(task, chosen, m) for m in metrics]
            lines.append(f"| {target.label} | {method} | {left} | " + " | ".join(texts) + " |")
    return [*lines, "", *_notes(rows)]


def _place(method: str) -> tuple[bool, str]:
    """Baselines of random units last."""
    return method.startswith("random"), method


def _left(task: Task, rows: Rows) -> str:
    pruned = {cell.variant: row for cell, row in rows.items() if cell.stage == "pruned" and "macs" in row}
    if not pruned:
        return "— | —"
    row = pruned[ranked(task, pruned, "valid_raw")[0]]
    return f"{row['macs']:.1%} | {row['parameters']:.1%}"


def _best(task: Task, rows: Rows, metric: str) -> str:
    """Of each seed the value of the variant that validation data chose, with its name."""
    stage = "tuned" if metric == "tuned" else "test"
    values, names = [], set()
    for seed in sorted({cell.seed for cell in rows}):
        found = {c.variant: row for c, row in rows.items() if (c.seed, c.stage) == (seed, stage)}
        compared = {
            c.variant: row
            for c, row in rows.items()
            if (c.seed, c.stage) == (seed, "probe" if metric == "tuned" else "pruned") and "note" not in row
        }
        if metric != "tuned" or len(found) > 1:
            best = ranked(task, compared, f"valid_{metric}")[:1]
            found = {variant: found[variant] for variant in best if variant in found}
        for variant, row in found.items():
            values.append(row[metric])
            names.add(variant)
    if not values:
        return "—"
    text = _number(task, statistics.fmean(values))
    if len(values) > 1:
        text += f" ± {_number(task, statistics.stdev(values))}"
    return text + (f" ({names.pop()})" if len(names) == 1 and names != {"random"} else "")


def _number(task: Task, value: float) -> str:
    return f"{value:.4f}" if task.higher else f"{value:.2f}"


def _notes(rows: Rows) -> list[str]:
    """What could not be done, and why."""
    notes = dict.fromkeys(
        f"{cell.target}, {cell.method}, {cell.variant}: {row['note']}."
        for cell, row in rows.items()
        if row.get("note")
    )
    return [line for note in notes for line in (f"- {note}",)] + ([""] if notes else [])


def _latency(rows: Rows) -> list[str]:
    mine = {cell: row for cell, row in rows.items() if cell.stage == "latency"}
    if not mine:
        return []
    lines = ["## Latency", ""]
    lines += [
        "Time of the pruned model over that of the dense one: median and quartiles of pairs of passes in "
        "turn. Share: by how much the time fell, of how much the MACs fell.",
        "",
        "| model | removed | method | MACs | time | quartiles | times faster | share |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    what, reasons = {case.name: case.what for case in CASES}, []
    for cell, row in mine.items():
        if row.get("note"):
            continue
        between = f"{row['low']:.3f}–{row['high']:.3f}"
        lines.append(
            f"| {what[cell.task]} | {cell.target} | {cell.method} | {row['macs']:.1%} | {row['time']:.3f} | "
            f"{between} | {1 / row['time']:.2f} | {row['share']:.0%} |"
        )
        if row.get("why"):
            reasons.append(f"- {what[cell.task]}, {cell.target}, {cell.method}: {row['why']}")
    if reasons:
        lines += ["", "Where the share is below 80 %, the report of the pruned model says why:", "", *reasons]
    return [*lines, ""]
