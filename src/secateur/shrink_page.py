"""The page of a structured pruning: what went, what is frozen and why, what it cost before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateur.dropped import DropReport
from secateur.measure import Measurement
from secateur.operators import OperatorTime
from secateur.pages import footer, prune_page, training_section
from secateur.record import Report
from secateur.report import Section, Table, compact, percent, render
from secateur.report.figures import grouped_bars, layer_bars
from secateur.shrunk import GroupRecord, ShrinkReport

_SHORTEST = 0.01  # share of the time below which an operator is not listed
_SMALLEST = 5e-4  # share of the parameters below which a frozen dimension is not listed


def page_of(report: Report | ShrinkReport | DropReport) -> str:
    """HTML of a report of any kind."""
    if isinstance(report, ShrinkReport):
        return shrink_page(report)
    return drop_page(report) if isinstance(report, DropReport) else prune_page(report)


def shrink_page(report: ShrinkReport) -> str:
    """HTML of a report of structured pruning."""
    before, after = report.before, report.after
    cut = sum(g.kept < g.size for g in report.groups)
    facts = [("groups cut", f"{cut} of {len(report.groups)}"), *_cost_facts(before, after)]
    sections = [_cost_section(before, after), _time_section(report), _groups_section(report)]
    if report.repairs:
        sections.append(_repair_section(report))
    if report.history or report.losses:
        sections.insert(0, training_section(report.history, report.losses))
    sections += [_proof_section(report), _frozen_section(report), _how_section(report)]
    return render("Structured pruning report", _sentence(report), facts, sections, footer(report.versions))


def _sentence(report: ShrinkReport) -> str:
    cut = [g for g in report.groups if g.kept < g.size]
    parts = []
    if report.dropped:
        parts.append(f"{len(report.dropped)} blocks were dropped as a whole.")
    if cut or not report.dropped:
        units = sum(g.size - g.kept for g in cut)
        kinds = ", ".join(sorted({g.kind for g in cut})) or "nothing"
        parts.append(f"{units:,} units ({kinds}) were removed from every tensor that depends on them.")
    chosen = "Training closed them." if report.history else f"Asked: {report.settings['budget']}."
    return " ".join((*parts, chosen))


def _cost_section(before: Measurement, after: Measurement) -> Section:
    """Dense and smaller side by side; what says the same twice where no weight is zero is left out."""
    costs = {
        "parameters": (before.parameters, after.parameters),
        "bytes": (before.dense_bytes, after.dense_bytes),
    }
    if before.macs and after.macs is not None:
        costs["multiply-accumulates"] = before.macs, after.macs
    rows: list[tuple[Any, ...]] = [(k, a, b, percent(b / max(1, a))) for k, (a, b) in costs.items()]
    ratios = {name: b / max(1, a) for name, (a, b) in costs.items()}
    if before.latency and after.latency:
        old, new = before.latency, after.latency
        ratios["time"] = new.median / old.median
        times = (f"{1e3 * t.median:.2f} ms ({1e3 * t.low:.2f} to {1e3 * t.high:.2f})" for t in (old, new))
        rows.append((f"time, {old.threads} threads, median", *times, percent(ratios["time"])))
    bars = grouped_bars(
        list(ratios),
        {"dense": [1.0] * len(ratios), "smaller": list(ratios.values())},
        "share of the dense model",
        format=percent,
    )
    return Section("Size and cost", figures=[bars], tables=[Table(("", "dense", "smaller", "left"), rows)])


def drop_page(report: DropReport) -> str:
    """HTML of a report of dropped blocks."""
    before, after = report.before, report.after
    names = list(report.influence)
    gone = set(report.record.dropped)
    facts = [("blocks dropped", f"{len(gone)} of {len(names)}"), *_cost_facts(before, after)]
    labels = [f"{name} (dropped)" if name in gone else name for name in names]
    bars = layer_bars(labels, list(report.influence.values()), xlabel="influence", format=compact)
    rows = [(name, f"{x:.4g}", "dropped" if name in gone else "") for name, x in report.influence.items()]
    text = "Influence: one minus the cosine of the hidden state before and after the block, mean over tokens."
    blocks = Section("Blocks", text, figures=[bars], tables=[Table(("block", "influence", ""), rows)])
    settings = Table(("setting", "value"), list(report.settings.items()))
    how = Section("How it was done", tables=[settings], notes=report.notes)
    sections = [_cost_section(before, after), _time_section(report), blocks, how]
    sentence = (
        f"{len(gone)} blocks of least influence were dropped. What is left computes what the model computes "
        "without them, which was proven on the example input."
    )
    return render("Dropped blocks", sentence, facts, sections, footer(report.versions))


def _cost_facts(before: Measurement, after: Measurement) -> list[tuple[str, str]]:
    facts = [
        ("parameters", f"{compact(before.parameters)} → {compact(after.parameters)}"),
        ("multiply-accumulates", f"{compact(before.macs or 0)} → {compact(after.macs or 0)}"),
    ]
    if before.latency and after.latency:
        facts.append(("time", f"{1e3 * before.latency.median:.1f} → {1e3 * after.latency.median:.1f} ms"))
    return facts


def _time_section(report: ShrinkReport | DropReport) -> Section:
    """Where the time goes, operator by operator, and why it did not fall by more."""
    dense, smaller = (
        {t.name: t for t in times} for times in (report.operators_before, report.operators_after)
    )
    whole = sum(t.seconds for t in dense.values()) or 1.0
    shown = [name for name in dense if dense[name].seconds >= _SHORTEST * whole]
    rows = [(name, *_times(dense[name], smaller.get(name))) for name in shown]
    text = (
        "One forward pass on the example input. Products: calls that multiply matrices; uneven: those with a "
        "weight whose size is no multiple of the vector width."
    )
    table = Table(("operator", "calls", "dense", "smaller", "left", "products", "uneven"), rows)
    notes = (report.why_not_faster,) if report.why_not_faster else ()
    return Section("Where the time goes", text, tables=[table], notes=notes)


def _times(old: OperatorTime, new: OperatorTime | None) -> tuple[Any, ...]:
    seconds = 0.0 if new is None else new.seconds
    uneven = f"{old.uneven} → {0 if new is None else new.uneven}" if old.products else ""
    times = (f"{1e3 * t:.2f} ms" for t in (old.seconds, seconds))
    left = percent(seconds / old.seconds) if old.seconds else "-"
    return old.calls, *times, left, "yes" if old.products else "", uneven


def _groups_section(report: ShrinkReport) -> Section:
    cut = {g.kind for g in report.groups if g.kept < g.size}
    shown = [g for g in report.groups if g.kind in cut]
    sparsities = [g.sparsity for g in shown]
    bars = layer_bars(_labels(shown), sparsities, xlabel="units removed", format=percent) if shown else None
    rows = [
        (g.name, g.size, g.kept, percent(g.sparsity), g.places, g.inexact or "yes") for g in report.groups
    ]
    table = Table(("group", "units", "kept", "removed", "places", "exact"), rows)
    text = "" if shown else "Nothing was removed."
    return Section("Groups", text, figures=[bars] if bars is not None else [], tables=[table])


def _labels(groups: Sequence[GroupRecord]) -> list[str]:
    """Short names that differ: the module that has the units, without what all paths begin with."""
    paths = [g.name.partition(" of ")[2].removesuffix(".weight") for g in groups]
    parts = [path.split(".") for path in paths]
    shared = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), 0)
    return [f"{'.'.join(path[shared:])} {g.kind}" for path, g in zip(parts, groups, strict=True)]


def _repair_section(report: ShrinkReport) -> Section:
    rows: list[tuple[Any, ...]] = [
        (
            x.name,
            x.features,
            x.kept,
            *(f"{e:.3g}" for e in (x.error_before, x.error_bias, x.error_after)),
            "" if x.held_out is None else f"{x.held_out:.3g}",
        )
        for repair in report.repairs
        for x in repair.layers
    ]
    left = [(name, reason) for repair in report.repairs for name, reason in repair.skipped]
    tables = [Table(("layer", "inputs", "kept", "removed", "with a new bias", "repaired", "held out"), rows)]
    if left:
        tables.append(Table(("not repaired", "reason"), left))
    text = (
        "Squared error of each layer's output over that of the dense layer, on the calibration data. Held "
        "out: on one half of it, of what the other half gives, by which the damping was chosen."
    )
    notes = [f"{'Kept' if g.kept else 'Left out'}: {g}." for g in report.gains]
    return Section("Repair", text, tables=tables, notes=notes)


def _proof_section(report: ShrinkReport) -> Section:
    if report.check is None:
        text = f"Not compared with the dense model with the same units at zero: {report.unproved}."
    else:
        text = f"Against the dense model with the same units at zero, on the example input: {report.check}."
    return Section("Proof", text)


def _frozen_section(report: ShrinkReport) -> Section:
    rows = [(reason, percent(share)) for reason, share in report.frozen if share >= _SMALLEST]
    text = "Dimensions that cannot be cut, why, and the share of all parameters that lie in them."
    return Section("Frozen", text, tables=[Table(("reason", "parameters"), rows)] if rows else [])


def _how_section(report: ShrinkReport) -> Section:
    settings = Table(("setting", "value"), list(report.settings.items()))
    seconds = Table(("step", "seconds"), [(k, f"{v:.2f}") for k, v in report.seconds.items()])
    return Section("How it was done", tables=[settings, seconds], notes=report.notes)
