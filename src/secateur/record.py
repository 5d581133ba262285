"""What happened, as plain data: printed as a table, written as JSON, drawn by `secateur.report`."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from secateur.core.files import write_text
from secateur.core.plain import fields_of
from secateur.masks import Masks
from secateur.measure import Latency, Measurement
from secateur.printing import printed

_LEFT = 4  # parameters left alone that the terminal names


@dataclass(frozen=True)
class LayerRecord:
    """One pruned layer.

    Attributes:
        name: of the parameter.
        shape: of the parameter as stored.
        asked: sparsity that the allocation gave the layer.
        removed: weights that the mask removes, an exact count.
        zeros: weights that are zero afterwards: those removed, and those that were zero before and stay.
        error: squared error of the layer's output over its power, on the calibration data, by a solver; None
            where a criterion alone decided.
    """

    name: str
    shape: tuple[int, ...]
    asked: float
    removed: int
    zeros: int
    error: float | None = None

    @property
    def entries(self) -> int:
        """Weights in all."""
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def sparsity(self) -> float:
        """Fraction that the mask removes."""
        return self.removed / self.entries if self.entries else 0.0


@dataclass(frozen=True)
class Change:
    """One change of the masks.

    Attributes:
        step: optimizer steps taken, the one that it belongs to included.
        asked: sparsity that the schedule gave.
        sparsity: fraction of the weights that the masks remove, an exact count over their number.
        layers: sparsity of each layer.
        moved: weights that were kept before and are not now, or the other way round.
    """

    step: int
    asked: float
    sparsity: float
    layers: Mapping[str, float]
    moved: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"layers": dict(self.layers)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Change:
        """Inverse of `to_dict`."""
        return cls(**{**data, "layers": dict(data["layers"])})


@dataclass(frozen=True)
class TrainLoss:
    """The loss of the task while training.

    Attributes:
        step: optimizer steps taken, the last of those that it belongs to included.
        loss: mean over the steps since the entry before, without what a method or a teacher adds.
    """

    step: int
    loss: float


@dataclass(frozen=True)
class Report:
    """The result of pruning: what was asked, what was done to each layer, what was left alone and why.

    `history` holds every change of the masks of a method that prunes while training, `losses` the course of
    the loss where a command trained.
    """

    settings: Mapping[str, str]
    layers: tuple[LayerRecord, ...]
    skipped: tuple[tuple[str, str], ...]
    before: Measurement
    after: Measurement
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    masks: Masks = field(repr=False, compare=False)
    history: tuple[Change, ...] = ()
    losses: tuple[TrainLoss, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: versions())

    @property
    def removed(self) -> int:
        """Weights removed in all."""
        return sum(layer.removed for layer in self.layers)

    @property
    def entries(self) -> int:
        """Weights of the pruned layers."""
        return sum(layer.entries for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction removed of the pruned layers' weights."""
        return self.removed / self.entries if self.entries else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the masks."""
        return {
            "settings": dict(self.settings),
            "totals": {"entries": self.entries, "removed": self.removed, "sparsity": self.sparsity},
            "layers": [asdict(layer) | {"sparsity": layer.sparsity} for layer in self.layers],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "notes": list(self.notes),
            "seconds": dict(self.seconds),
            "versions": dict(self.versions),
            **course(self.history, self.losses),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], masks: Masks | None = None) -> Report:
        """Inverse of `to_dict`, which leaves the masks out; `ArtifactError` if the data is something else."""
        given = {**data, "skipped": [tuple(entry.values()) for entry in data.get("skipped", ())]}
        return cls(masks=masks if masks is not None else Masks({}), **fields_of(cls, given, ["masks"]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON, atomically."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def __rich__(self) -> RenderableType:
        how = ", ".join(f"{k} {v}" for k, v in self.settings.items())
        left = "; ".join(f"{name}, {reason}" for name, reason in self.skipped[:_LEFT])
        if len(self.skipped) > _LEFT:
            left += f"; and {len(self.skipped) - _LEFT} more"
        lines = (how, f"Left alone: {left or 'nothing but biases and norms'}.", *self.notes)
        texts = (Text(f"  {line}", style="dim") for line in lines)
        return Group(_layer_table(self), _cost_table(self), *texts)

    def __str__(self) -> str:
        return printed(self)


def course(history: Sequence[Change], losses: Sequence[TrainLoss]) -> dict[str, Any]:
    """What happened while training, as plain data; nothing if there was no training."""
    found = {
        "history": [change.to_dict() for change in history],
        "losses": [asdict(entry) for entry in losses],
    }
    return {name: entries for name, entries in found.items() if entries}


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {"python": platform.python_version()}
    for package in ("secateur", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _layer_table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column("layer", footer=f"{len(report.layers)} layers", overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("weights", justify="right", footer=f"{report.entries:,}")
    table.add_column("removed", justify="right", footer=f"{report.removed:,}")
    table.add_column("sparsity", justify="right", footer=f"{report.sparsity:.2%}")
    solved = any(layer.error is not None for layer in report.layers)
    if solved:
        table.add_column("error", justify="right")
    for layer in report.layers:
        shape = " x ".join(map(str, layer.shape))
        name = escape(layer.name.removesuffix(".weight"))
        error = ["" if layer.error is None else f"{layer.error:.3g}"] if solved else []
        table.add_row(
            name, shape, f"{layer.entries:,}", f"{layer.removed:,}", f"{layer.sparsity:.2%}", *error
        )
    return table


def _cost_table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("whole model", "before", "after"):
        table.add_column(column, justify="left" if column == "whole model" else "right")
    for label, old, new in cost_rows(report.before, report.after):
        table.add_row(label, old, new)
    return table


def cost_rows(before: Measurement, after: Measurement) -> list[tuple[str, str, str]]:
    """Rows (what, before, after) of a comparison of costs, formatted."""
    rows = [
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}"),
        ("non-zero", f"{before.nonzero:,}", f"{after.nonzero:,}"),
        ("sparsity of all parameters", f"{before.sparsity:.2%}", f"{after.sparsity:.2%}"),
        ("bytes, dense", f"{before.dense_bytes:,}", f"{after.dense_bytes:,}"),
        ("bytes, packed (bit mask + values)", f"{before.packed_bytes:,}", f"{after.packed_bytes:,}"),
    ]
    if before.macs is not None and after.macs is not None:
        rows.append(("multiply-accumulates", f"{before.macs:,}", f"{after.macs:,}"))
        rows.append(("... without zero weights", f"{before.effective_macs:,}", f"{after.effective_macs:,}"))
    if before.latency is not None and after.latency is not None:
        label = f"latency, dense kernels, {after.latency.threads} threads"
        rows.append((label, _milliseconds(before.latency), _milliseconds(after.latency)))
    return rows


def _milliseconds(latency: Latency) -> str:
    """Median and quartiles."""
    low, middle, high = (f"{1e3 * x:.2f}" for x in (latency.low, latency.median, latency.high))
    return f"{middle} ms ({low} to {high})"
