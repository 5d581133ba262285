"""The page of a structured pruning: what went, what is frozen and why, what it cost before and after."""

from __future__ import annotations

from secateur.measure import Measurement
from secateur.pages import footer
from secateur.record import cost_rows
from secateur.report import Section, Table, compact, percent, render
from secateur.report.figures import grouped_bars, layer_bars
from secateur.shrunk import ShrinkReport

_SMALLEST = 5e-4  # share of the parameters below which a frozen dimension is not listed


def shrink_page(report: ShrinkReport) -> str:
    """HTML of a report of structured pruning."""
    before, after = report.before, report.after
    facts = [
        ("parameters", f"{compact(before.parameters)} → {compact(after.parameters)}"),
        ("multiply-accumulates", f"{compact(before.macs or 0)} → {compact(after.macs or 0)}"),
        ("groups cut", f"{sum(g.kept < g.size for g in report.groups)} of {len(report.groups)}"),
    ]
    if before.latency and after.latency:
        facts.append(("time", f"{1e3 * before.latency.median:.1f} → {1e3 * after.latency.median:.1f} ms"))
    sections = [_cost_section(before, after), _groups_section(report)]
    if report.repairs:
        sections.append(_repair_section(report))
    sections += [_proof_section(report), _frozen_section(report), _how_section(report)]
    return render("Structured pruning report", _sentence(report), facts, sections, footer(report.versions))


def _sentence(report: ShrinkReport) -> str:
    cut = [g for g in report.groups if g.kept < g.size]
    units = sum(g.size - g.kept for g in cut)
    kinds = ", ".join(sorted({g.kind for g in cut})) or "nothing"
    return (
        f"{units:,} units ({kinds}) were removed from every tensor that depends on them. Asked: "
        f"{report.settings['budget']}."
    )


def _cost_section(before: Measurement, after: Measurement) -> Section:
    ratios = {
        "parameters": after.parameters / max(1, before.parameters),
        "bytes": after.dense_bytes / max(1, before.dense_bytes),
    }
    if before.macs and after.macs is not None:
        ratios["multiply-accumulates"] = after.macs / before.macs
    if before.latency and after.latency:
        ratios["seconds"] = after.latency.median / before.latency.median
    bars = grouped_bars(
        list(ratios), {"left of the dense model": list(ratios.values())}, "share", format=percent
    )
    table = Table(("", "before", "after"), cost_rows(before, after))
    return Section("Size and cost", figures=[bars], tables=[table])


def _groups_section(report: ShrinkReport) -> Section:
    bars = layer_bars(
        [g.name for g in report.groups],
        [g.sparsity for g in report.groups],
        xlabel="units removed",
        format=percent,
    )
    rows = [
        (g.name, g.size, g.kept, percent(g.sparsity), g.places, g.inexact or "yes") for g in report.groups
    ]
    table = Table(("group", "units", "kept", "removed", "places", "exact"), rows)
    return Section("Groups", figures=[bars], tables=[table])


def _repair_section(report: ShrinkReport) -> Section:
    rows = [
        (x.name, x.features, x.kept, f"{x.error_before:.3g}", f"{x.error_bias:.3g}", f"{x.error_after:.3g}")
        for repair in report.repairs
        for x in repair.layers
    ]
    left = [(name, reason) for repair in report.repairs for name, reason in repair.skipped]
    tables = [Table(("layer", "inputs", "kept", "removed", "with a new bias", "repaired"), rows)]
    if left:
        tables.append(Table(("not repaired", "reason"), left))
    text = "Squared error of each layer's output over that of the dense layer, on the calibration data."
    return Section("Repair", text, tables=tables)


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
