"""What structured pruning did, as plain data: printed as a table, written as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import nn

from secateur.budget import format_amount
from secateur.core.errors import ArtifactError
from secateur.core.files import write_text
from secateur.core.plain import fields_of
from secateur.graph import Check
from secateur.measure import Measurement, measure
from secateur.operators import OperatorTime, operator_times, vector_width, why_not_faster
from secateur.printing import printed
from secateur.reconstruct import RepairReport
from secateur.reconstruct.worth import Gain
from secateur.record import Change, TrainLoss, course, versions
from secateur.surgery import Cuts, as_data, save_cuts

_FROZEN = 3  # reasons that the terminal names
_ALIKE = 3  # groups of one kind that the terminal names one by one


@dataclass(frozen=True)
class Costs:
    """What a model costs, and where its time goes."""

    measured: Measurement
    operators: tuple[OperatorTime, ...]
    width: int

    @classmethod
    def of(cls, model: nn.Module, example: Any) -> Costs:
        """Measure a model on an example input."""
        width = max((vector_width(p) for p in model.parameters()), default=1)
        return cls(measure(model, example), operator_times(model, example), width)

    def slower_than_expected(self, dense: Costs) -> str | None:
        """Why this model is not faster than the dense one by as much as it computes less; None if it is."""
        return why_not_faster(dense.measured, self.measured, dense.operators, self.operators, self.width)


@dataclass(frozen=True)
class GroupRecord:
    """One group: units before and kept, tensors that it lives in, and why its removal is not exact, if so."""

    name: str
    kind: str
    size: int
    kept: int
    places: int
    inexact: str | None

    @property
    def sparsity(self) -> float:
        """Fraction of the units that went."""
        return 1 - self.kept / self.size


@dataclass(frozen=True)
class ShrinkReport:
    """The result of structured pruning.

    Attributes:
        settings: what was asked.
        groups: every group that could be cut, cut or not.
        frozen: why dimensions cannot be cut, and the share of parameters in them; the largest first.
        before: costs of the dense model.
        after: costs of what is left, measured anew.
        operators_before: time of each operator of the dense model, longest first.
        operators_after: of what is left.
        why_not_faster: why the time fell by much less than the multiply-accumulates; None where it did not.
        asked: what the budget allows, in its unit.
        got: what came out.
        check: output against the dense model with the same units at zero, of the worst step; None if a step
            could not be compared.
        unproved: why it could not.
        repairs: of each step.
        gains: what repair did to the whole model, in each step.
        notes: what a reader must know.
        seconds: of the whole call.
        cuts: the surgery of each step, as data.
        history: of the training that chose the units, if one did.
        losses: of that training, where a command trained.
        dropped: blocks that went as a whole.
    """

    settings: Mapping[str, str]
    groups: tuple[GroupRecord, ...]
    frozen: tuple[tuple[str, float], ...]
    before: Measurement
    after: Measurement
    operators_before: tuple[OperatorTime, ...]
    operators_after: tuple[OperatorTime, ...]
    why_not_faster: str | None
    asked: float
    got: float
    check: Check | None
    unproved: str | None
    repairs: tuple[RepairReport, ...]
    gains: tuple[Gain, ...]
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    cuts: tuple[Cuts, ...] = field(repr=False)
    take_back: Callable[[], None] = field(repr=False, compare=False)
    versions: Mapping[str, str] = field(default_factory=versions)
    history: tuple[Change, ...] = ()
    losses: tuple[TrainLoss, ...] = ()
    dropped: tuple[str, ...] = ()

    def undo(self) -> None:
        """Give the model its old tensors back: the very same objects, with the values that they had."""
        self.take_back()

    def save_surgery(self, path: str | os.PathLike[str]) -> None:
        """Write the surgery, for `replay_` on a freshly built dense model."""
        save_cuts(self.cuts, path)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the surgery."""
        return {
            "settings": dict(self.settings),
            "groups": [asdict(g) | {"sparsity": g.sparsity} for g in self.groups],
            "frozen": [{"reason": reason, "share": share} for reason, share in self.frozen],
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "operators": {
                "before": [asdict(t) for t in self.operators_before],
                "after": [asdict(t) for t in self.operators_after],
            },
            "why_not_faster": self.why_not_faster,
            "asked": self.asked,
            "got": self.got,
            "check": asdict(self.check) if self.check else None,
            "unproved": self.unproved,
            "repairs": [r.to_dict() for r in self.repairs],
            "gains": [asdict(g) | {"kept": g.kept} for g in self.gains],
            "notes": list(self.notes),
            "seconds": dict(self.seconds),
            "versions": dict(self.versions),
            "surgery": as_data(self.cuts),
            "dropped": list(self.dropped),
            **course(self.history, self.losses),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ShrinkReport:
        """Inverse of `to_dict` but for the surgery; `ArtifactError` if the data is something else.

        There is no model that the result could be undone on, and `cuts` are empty.
        """
        repairs = [
            r | {"skipped": [tuple(s.values()) for s in r["skipped"]]} for r in data.get("repairs", ())
        ]
        given = {
            **data,
            "frozen": [tuple(entry.values()) for entry in data.get("frozen", ())],
            "operators_before": data.get("operators", {}).get("before"),
            "operators_after": data.get("operators", {}).get("after"),
            "repairs": repairs,
        }
        return cls(cuts=(), take_back=_nothing, **fields_of(cls, given, ["cuts", "take_back"]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON, atomically."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def __rich__(self) -> RenderableType:
        how = ", ".join(f"{k} {v}" for k, v in self.settings.items())
        lines = [how]
        if self.dropped:
            lines.append(f"Dropped as a whole: {', '.join(self.dropped)}.")
        if self.check is not None:
            lines.append(f"Against the dense model with the same units at zero: {self.check}.")
        if self.unproved is not None:
            lines.append(f"Not compared with the dense model: {self.unproved}.")
        lines += [f"Repair: {g}." for g in self.gains if g.kept]
        if self.why_not_faster is not None:
            lines.append(self.why_not_faster)
        lines += [
            f"Frozen, {share:.1%} of the parameters: {reason}." for reason, share in self.frozen[:_FROZEN]
        ]
        lines += self.notes
        texts = (Padding(Text(line, style="dim"), (0, 0, 0, 2), expand=False) for line in lines)
        cut = any(g.kept < g.size for g in self.groups)
        groups = _group_table(self) if cut else Text("\n  No units were cut.")
        return Group(groups, cost_table(self.before, self.after), *texts)

    def __str__(self) -> str:
        return printed(self.__rich__())


def _nothing() -> None:
    raise ArtifactError("This report was read from a file: there is no model to give its tensors back to.")


def _group_table(report: ShrinkReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("group", overflow="fold")
    for column in ("units", "kept", "sparsity"):
        table.add_column(column, justify="right")
    by_kind: dict[str, list[GroupRecord]] = {}
    for g in report.groups:
        by_kind.setdefault(g.kind, []).append(g)
    whole = [kind for kind, found in by_kind.items() if all(g.kept == g.size for g in found)]
    for kind, found in by_kind.items():
        if kind in whole:
            continue
        if len(found) <= _ALIKE:
            for g in found:
                table.add_row(g.name, str(g.size), str(g.kept), f"{g.sparsity:.1%}")
            continue
        size, kept = sum(g.size for g in found), sum(g.kept for g in found)
        table.add_row(f"{kind}, {len(found)} groups", f"{size:,}", f"{kept:,}", f"{1 - kept / size:.1%}")
    if whole:
        table.caption = f"left whole: {', '.join(whole)}"
    return table


def cost_table(a: Measurement, b: Measurement) -> Table:
    """Costs before and after, and what is left of each."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("cost")
    for column in ("before", "after", "left"):
        table.add_column(column, justify="right")
    rows: list[tuple[str, float | None, float | None]] = [
        ("parameters", a.parameters, b.parameters),
        ("bytes", a.dense_bytes, b.dense_bytes),
        ("multiply-accumulates", a.macs, b.macs),
    ]
    if a.latency and b.latency:
        rows.append(("milliseconds", 1e3 * a.latency.median, 1e3 * b.latency.median))
    for name, old, new in rows:
        if old is not None and new is not None:
            left = f"{new / old:.1%}" if old else "-"
            table.add_row(name, format_amount(old), format_amount(new), left)
    return table
