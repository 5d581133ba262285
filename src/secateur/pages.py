"""Pages of what happened: a report, an inspection or a sensitivity scan as one HTML file each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from secateur.inspection import Inspection, LayerInspection
from secateur.layerwise import Sensitivity
from secateur.measure import Measurement
from secateur.record import Change, Report, TrainLoss, cost_rows
from secateur.report import Section, Table, compact, number, percent, render, size
from secateur.report.figures import Histogram, Series, curves, grouped_bars, heat, histograms, layer_bars

_TITLE = 30  # characters above a histogram
_FEW = 12  # layers up to which each gets a curve
PANELS = 24  # histograms shown on one page; more layers are in the JSON


def prune_page(report: Report, before: Inspection | None = None, after: Inspection | None = None) -> str:
    """HTML of a pruning report, with weight distributions if the model was inspected before and after."""
    facts = [
        ("removed", percent(report.sparsity)),
        ("of the weights of", f"{len(report.layers)} layers"),
        ("non-zero parameters", f"{compact(report.before.nonzero)} → {compact(report.after.nonzero)}"),
        ("packed size", f"{size(report.before.packed_bytes)} → {size(report.after.packed_bytes)}"),
    ]
    sections = [layers_section(report), sizes_section(report.before, report.after)]
    if report.history or report.losses:
        sections.insert(0, training_section(report.history, report.losses))
    if before is not None:
        sections.append(weights_section(before, after))
    sections.append(
        Section(
            "How it was done",
            tables=[
                Table(("setting", "value"), list(report.settings.items())),
                Table(("step", "seconds"), [(k, f"{v:.2f}") for k, v in report.seconds.items()]),
            ],
            notes=report.notes,
        )
    )
    if report.skipped:
        sections.append(
            Section(
                "Left alone",
                "Parameters that were not pruned, and why. Biases and norms are not listed.",
                tables=[Table(("parameter", "reason"), report.skipped)],
            )
        )
    return render("Pruning report", _sentence(report), facts, sections, footer(report.versions))


def inspect_page(inspection: Inspection) -> str:
    """HTML of an inspection."""
    facts = [
        ("parameters", compact(inspection.parameters)),
        ("already zero", percent(inspection.sparsity)),
        ("layers", str(len(inspection.layers))),
        ("nearer to Laplace", f"{sum(x.better == 'laplace' for x in inspection.layers)} layers"),
    ]
    table = Table(
        (
            "layer",
            "weights",
            "zeros",
            "sd",
            "kurtosis",
            "better fit",
            "KS Gauss",
            "KS Laplace",
            "|w| < 0.1 sd",
            "Gauss says",
        ),
        [_distribution_row(layer) for layer in inspection.layers],
        "Excess kurtosis is 0 for Gaussian and 3 for Laplace weights; KS is the Kolmogorov-Smirnov distance "
        "of the maximum-likelihood fit. Zeros are left out of the fits.",
    )
    sections = [weights_section(inspection, None), Section("Layers", tables=[table])]
    if inspection.skipped:
        left = Table(("parameter", "reason"), inspection.skipped)
        sections.append(Section("Not inspected", tables=[left]))
    return render(
        "Inspection",
        "How the weights of each layer are distributed: the more of them crowd around zero, the more can go.",
        facts,
        sections,
        footer(inspection.versions),
    )


def sensitivity_page(scan: Sensitivity) -> str:
    """HTML of a sensitivity scan."""
    names = [layer.name for layer in scan.layers]
    drops = scan.drops()
    columns = [percent(s) for s in scan.sparsities]
    facts = [
        ("metric, nothing pruned", number(scan.baseline)),
        ("better is", "higher" if scan.higher_is_better else "lower"),
        ("layers", str(len(names))),
    ]
    damage = heat(
        names,
        columns,
        [drops[name] for name in names],
        xlabel="sparsity of the layer",
        title="damage",
        caption="Damage to the metric: how much worse it is than with nothing pruned.",
    )
    figures = [damage]
    if len(names) <= _FEW:
        series = [Series(layer.name, scan.sparsities, layer.values) for layer in scan.layers]
        reference = ("nothing pruned", scan.baseline)
        lines = curves(series, "sparsity of the layer", "metric", reference=reference, xformat=percent)
        figures.insert(0, lines)
    section = Section(
        "One layer at a time",
        "The metric of the whole model when one layer alone is pruned and all others are as they were.",
        figures,
        [Table(("layer", *columns), [(layer.name, *layer.values) for layer in scan.layers])],
        scan.notes,
    )
    settings = Section("How it was done", tables=[Table(("setting", "value"), list(scan.settings.items()))])
    subtitle = "Which layers bear pruning and which do not: the metric with one layer pruned at a time."
    return render("Sensitivity", subtitle, facts, [section, settings], footer(scan.versions))


def weights_section(before: Inspection, after: Inspection | None) -> Section:
    """Histograms of the weights with both fits, and after pruning if given."""
    pruned = {layer.name: layer for layer in after.layers} if after else {}
    shown = [layer for layer in before.layers if layer.histogram is not None]
    panels = [_panel(layer, pruned.get(layer.name)) for layer in _spread(shown, PANELS)]
    notes = [f"{len(panels)} of {len(shown)} layers are drawn, evenly spread; all are in the JSON."]
    return Section(
        "Weight distributions",
        "Density of the weights of each layer, within four standard deviations.",
        [histograms(panels, xformat=number)] if panels else [],
        notes=notes if len(shown) > len(panels) else (),
    )


def sizes_section(before: Measurement, after: Measurement) -> Section:
    """What the model costs, before and after."""
    bars = grouped_bars(
        ["stored densely", "packed: one bit a weight and the non-zero values"],
        {
            "before": [before.dense_bytes, before.packed_bytes],
            "after": [after.dense_bytes, after.packed_bytes],
        },
        "bytes",
        format=size,
    )
    return Section(
        "Size and cost", figures=[bars], tables=[Table(("", "before", "after"), cost_rows(before, after))]
    )


def training_section(changes: Sequence[Change], losses: Sequence[TrainLoss]) -> Section:
    """The course of the loss, and of the sparsity at each change of the masks."""
    figures, tables = _sparsity_course(changes) if changes else ([], [])
    if losses:
        line = Series("loss", [entry.step for entry in losses], [entry.loss for entry in losses])
        caption = "Mean loss of the task on the training batches, without what a method or a teacher adds."
        figures.append(curves([line], "optimizer step", "training loss", yformat=number, caption=caption))
    return Section("While training", figures=figures, tables=tables)


def _sparsity_course(changes: Sequence[Change]) -> tuple[list[Any], list[Table]]:
    """Sparsity asked and had, in all and by layer."""
    steps = [change.step for change in changes]
    asked = Series("asked", steps, [change.asked for change in changes], dashed=True)
    had = Series("all layers", steps, [change.sparsity for change in changes])
    caption = (
        "The final sparsity is exact, or of whole units the next that they allow; dynamic methods keep it "
        "and exchange weights."
    )
    figures = [
        curves([had, asked], "optimizer step", "sparsity", yformat=percent, caption=caption),
        curves(
            [Series("weights changed", steps, [change.moved for change in changes])],
            "optimizer step",
            "weights that left or came back",
            caption="How many entries of the masks each change turned.",
        ),
    ]
    names = list(changes[-1].layers)
    if 1 < len(names) <= _FEW:
        layers = [Series(_short(n), steps, [change.layers[n] for change in changes]) for n in names]
        figures.append(curves(layers, "optimizer step", "sparsity of the layer", yformat=percent))
    rows = [(str(c.step), percent(c.asked), percent(c.sparsity), c.moved) for c in changes]
    table = Table(("step", "asked", "removed", "entries changed"), rows)
    return figures, [table]


def layers_section(report: Report) -> Section:
    """Sparsity of each layer."""
    names = [layer.name for layer in report.layers]
    bars = layer_bars(
        names,
        [layer.sparsity for layer in report.layers],
        xlabel="sparsity",
        reference=("all layers", report.sparsity),
        format=percent,
    )
    rows: list[tuple[str | int, ...]] = [
        (
            layer.name,
            " × ".join(map(str, layer.shape)),
            layer.entries,
            layer.removed,
            percent(layer.sparsity),
            layer.zeros,
            *([] if layer.error is None else [f"{layer.error:.3g}"]),
        )
        for layer in report.layers
    ]
    solved = any(layer.error is not None for layer in report.layers)
    columns = ("layer", "shape", "weights", "removed", "sparsity", "zeros", *(("error",) if solved else ()))
    text = "Error: squared, of the layer's output over its power, on the calibration data." if solved else ""
    return Section("Sparsity of each layer", text, figures=[bars], tables=[Table(columns, rows)])


def _panel(layer: LayerInspection, after: LayerInspection | None) -> Histogram:
    assert layer.histogram is not None
    edges = layer.histogram.edges
    middle = [(a + b) / 2 for a, b in pairwise(edges)]
    overlays = []
    if layer.gaussian and layer.gaussian.scale > 0:
        m, s = layer.gaussian.location, layer.gaussian.scale
        curve = [math.exp(-(((x - m) / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi)) for x in middle]
        overlays.append(Series("Gaussian fit", middle, curve))
    if layer.laplace and layer.laplace.scale > 0:
        m, s = layer.laplace.location, layer.laplace.scale
        overlays.append(Series("Laplace fit", middle, [math.exp(-abs(x - m) / s) / (2 * s) for x in middle]))
    return Histogram(_short(layer.name), edges, layer.histogram.densities, overlays, _survivors(layer, after))


def _short(name: str) -> str:
    """The end of a name, which tells layers apart."""
    name = name.removesuffix(".weight")
    return name if len(name) <= _TITLE else f"…{name[1 - _TITLE :]}"


def _survivors(layer: LayerInspection, after: LayerInspection | None) -> list[float] | None:
    """Densities after pruning in the bins of before, as shares of all weights that were not zero before."""
    if after is None or after.histogram is None or layer.histogram is None:
        return None
    alive = (after.weights - after.zeros) / max(1, layer.weights - layer.zeros)
    return _rebin(
        after.histogram.edges, [d * alive for d in after.histogram.densities], layer.histogram.edges
    )


def _rebin(old: Sequence[float], densities: Sequence[float], new: Sequence[float]) -> list[float]:
    """Densities over other edges, each old bin spread evenly."""
    out = []
    for left, right in pairwise(new):
        mass = sum(
            d * max(0.0, min(right, b) - max(left, a))
            for (a, b), d in zip(pairwise(old), densities, strict=True)
        )
        out.append(mass / (right - left))
    return out


def _distribution_row(layer: LayerInspection) -> tuple[Any, ...]:
    near = next((n for n in layer.near_zero if n.within == 0.1), None)
    return (
        layer.name,
        layer.weights,
        layer.zeros,
        layer.sd,
        layer.excess_kurtosis,
        layer.better,
        layer.gaussian.distance if layer.gaussian else None,
        layer.laplace.distance if layer.laplace else None,
        percent(near.share) if near else None,
        percent(near.gaussian) if near else None,
    )


def _spread(items: Sequence[LayerInspection], most: int) -> list[LayerInspection]:
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def _sentence(report: Report) -> str:
    what = f"removed {report.removed:,} of {report.entries:,} weights"
    if "criterion" not in report.settings:  # learned while training
        return f"While the model was trained, {what.replace('removed', 'it lost')}."
    how = f"{report.settings['pattern']}, allocation {report.settings['allocation']}"
    return f"{report.settings['criterion']} {what} ({how})."


def footer(versions: Any) -> str:
    """Versions, for the foot of a page."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
