"""What dropping blocks by their scores did, as plain data: printed as a table, written as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import nn

from secateur.core.errors import ArtifactError
from secateur.core.files import write_text
from secateur.core.plain import fields_of, value_of
from secateur.layers import Changes, DropRecord, block_influence, drop_layers_, lowest
from secateur.measure import Measurement
from secateur.operators import OperatorTime
from secateur.printing import printed
from secateur.record import versions
from secateur.shrunk import Costs, cost_table


@dataclass(frozen=True)
class DropReport:
    """The result of dropping the blocks of least influence.

    Attributes:
        settings: what was asked.
        influence: of every block that could be dropped, in order; see `block_influence`.
        record: what was done, with `undo()`.
        before: costs of the dense model.
        after: costs of what is left.
        operators_before: time of each operator of the dense model, longest first.
        operators_after: of what is left.
        why_not_faster: why the time fell by much less than the multiply-accumulates; None where it did not.
        notes: what a reader must know.
    """

    settings: Mapping[str, str]
    influence: Mapping[str, float]
    record: DropRecord
    before: Measurement
    after: Measurement
    operators_before: tuple[OperatorTime, ...]
    operators_after: tuple[OperatorTime, ...]
    why_not_faster: str | None
    notes: tuple[str, ...]
    versions: Mapping[str, str] = field(default_factory=versions)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the record, from which `replay_` does the same to another model."""
        return {
            "settings": dict(self.settings),
            "influence": dict(self.influence),
            "dropped": list(self.record.dropped),
            "record": self.record.to_dict(),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "operators": {
                "before": [asdict(t) for t in self.operators_before],
                "after": [asdict(t) for t in self.operators_after],
            },
            "why_not_faster": self.why_not_faster,
            "notes": list(self.notes),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DropReport:
        """Inverse of `to_dict` but for the record, of which only the names stay; else `ArtifactError`."""
        dropped = value_of(tuple[str, ...], data.get("dropped"), "dropped")
        record = DropRecord(dropped, {}, 0, False, (), Changes((), ()), _nothing)
        operators = data.get("operators", {})
        given = {
            **data,
            "operators_before": operators.get("before"),
            "operators_after": operators.get("after"),
        }
        return cls(record=record, **fields_of(cls, given, ["record"]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON, atomically."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def __rich__(self) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("block", overflow="fold")
        table.add_column("influence", justify="right")
        table.add_column("")
        for name, value in self.influence.items():
            table.add_row(name, f"{value:.4g}", "dropped" if name in self.record.dropped else "")
        lines = [*self.notes, *([self.why_not_faster] if self.why_not_faster else [])]
        texts = (Padding(Text(line, style="dim"), (0, 0, 0, 2), expand=False) for line in lines)
        return Group(table, cost_table(self.before, self.after), *texts)

    def __str__(self) -> str:
        return printed(self.__rich__())


def _nothing() -> None:
    raise ArtifactError("This report was read from a file: there is no model to put its blocks back into.")


def drop_least_(model: nn.Module, n: int, example: Any, batches: Iterable[Any]) -> DropReport:
    """Drop the `n` blocks of least influence, in place, and say what that did.

    Args:
        model: any module with a stack of blocks.
        n: blocks that go.
        example: an input; see `drop_layers_`.
        batches: on which influence is measured; see `block_influence`.

    Raises:
        As `block_influence`, `lowest` and `drop_layers_`; the model is then as it was.
    """
    scores = block_influence(model, batches)
    which = lowest(scores, n)
    before = Costs.of(model, example)
    record = drop_layers_(model, which, example)
    try:
        after = Costs.of(model, example)
    except BaseException:
        record.undo()
        raise
    return DropReport(
        {"dropped": f"{n} of {len(scores)} blocks", "by": "block influence"},
        scores,
        record,
        before.measured,
        after.measured,
        before.operators,
        after.operators,
        after.slower_than_expected(before),
        record.notes,
    )
