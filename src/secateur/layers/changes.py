"""What dropping blocks changes in a model, as plain data: made, unmade, and made again on another model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.core.errors import ArtifactError, SelectionError

Children = list[tuple[str, nn.Module | None]]

_FORMAT = "secateur-layers-1"

# Names of attributes that hold a block's place; which of them do, their values decide.
_PLACE = re.compile(r"(.*(layer|block|stage).*_)?(idx|id|index|number|num|nr|depth)|(layer|block)_?(i|no)")
_LENGTH = re.compile(r"(.*_)?(n|num|number_of)_?(\w+_)?(layers?|blocks?)|depth|layers|blocks")


@dataclass(frozen=True)
class Cut:
    """Children that stay in one list: their indices, out of `length`."""

    stack: str
    length: int
    kept: tuple[int, ...]

    @property
    def dropped(self) -> tuple[int, ...]:
        """Indices of the children that go."""
        return tuple(i for i in range(self.length) if i not in self.kept)


@dataclass(frozen=True)
class Edit:
    """A value that an object of the model holds: `path` are attributes, from the module on.

    `module` is the name before anything is dropped. Values are integers or lists.
    """

    module: str
    path: tuple[str, ...]
    old: Any
    new: Any


@dataclass(frozen=True)
class Changes:
    """Everything that dropping blocks changes: lists, then values."""

    cuts: tuple[Cut, ...]
    edits: tuple[Edit, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "format": _FORMAT,
            "cuts": [{"stack": c.stack, "length": c.length, "kept": [*c.kept]} for c in self.cuts],
            "edits": [
                {"module": e.module, "path": [*e.path], "old": _plain(e.old), "new": _plain(e.new)}
                for e in self.edits
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Changes:
        """Read what `to_dict` gave; `ArtifactError` if it is something else."""
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise ArtifactError(f"This is not a record of dropped blocks of this format ({_FORMAT}).")
        try:
            cuts = tuple(Cut(c["stack"], c["length"], tuple(c["kept"])) for c in data["cuts"])
            edits = tuple(Edit(e["module"], tuple(e["path"]), e["old"], e["new"]) for e in data["edits"])
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"The record of dropped blocks is damaged: {error!r}.") from None
        if not all(map(_is_edit, edits)) or not all(map(_is_cut, cuts)):
            raise ArtifactError(
                "The record of dropped blocks is damaged: entries of other types than written."
            )
        for c in cuts:
            if not c.kept or [*c.kept] != sorted({*c.kept}) or not 0 <= c.kept[0] <= c.kept[-1] < c.length:
                raise ArtifactError(f"The record of dropped blocks is damaged: {c.stack} keeps {[*c.kept]}.")
        return cls(cuts, edits)


def _is_cut(cut: Cut) -> bool:
    return isinstance(cut.stack, str) and all(type(n) is int for n in (cut.length, *cut.kept))


def _is_edit(edit: Edit) -> bool:
    """Whether names are plain attributes and values integers or lists, as in a record that was written."""
    names = all(isinstance(step, str) and not step.startswith("__") for step in edit.path)
    values = all(type(v) is int or isinstance(v, list) for v in (edit.old, edit.new))
    return isinstance(edit.module, str) and bool(edit.path) and names and values


class Journal:
    """Changes to a model in the order that they were made, so that they can be unmade."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._back: list[Callable[[], None]] = []
        self._cuts: dict[str, tuple[Children, Children]] = {}

    def module(self, name: str) -> nn.Module:
        """The module that had this name when the journal was opened."""
        if name not in self._modules:
            raise SelectionError(f"The model has no module {name!r}: it is not the one that was recorded.")
        return self._modules[name]

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that are still in the model, with the names that they had."""
        alive = {id(module) for module in self.module("").modules()}
        return ((name, module) for name, module in self._modules.items() if id(module) in alive)

    def mark(self) -> int:
        """Where the journal is; see `undo`."""
        return len(self._back)

    def undo(self, to: int = 0) -> None:
        """Unmake what was made since a mark, last first."""
        while len(self._back) > to:
            self._back.pop()()

    def withdraw(self) -> None:
        """Unmake everything, provided that the lists are still what the cuts made of them."""
        if not self._back:
            raise SelectionError("The blocks were put back before: this record is used up.")
        for stack, (_, after) in self._cuts.items():
            if [*self.module(stack)._modules.items()] != after:
                raise SelectionError(f"{stack} was changed after its blocks were dropped: undo that first.")
        self.undo()

    def children(self, stack: str) -> Children:
        """The children that a list had before it was cut."""
        return self._cuts[stack][0]

    def cut(self, cut: Cut) -> None:
        """Take children out of a list; the others move up, those with names of their own keep them."""
        module = self.module(cut.stack)
        before = [*module._modules.items()]
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(before) != cut.length:
            raise SelectionError(f"{cut.stack} has {len(before)} blocks, not {cut.length} as recorded.")
        numbered = [name for name, _ in before] == [str(i) for i in range(len(before))]
        kept = [before[i] for i in cut.kept]
        after = [(str(i) if numbered else name, child) for i, (name, child) in enumerate(kept)]
        _fill(module, after)
        self._cuts[cut.stack] = (before, after)
        self._back.append(lambda: _fill(module, before))

    def edit(self, edit: Edit) -> None:
        """Write one value."""
        holder: Any = self.module(edit.module)
        *way, last = edit.path
        for step in way:
            holder = getattr(holder, step, None)
        values = getattr(holder, "__dict__", {})
        if last not in values or _plain(values[last]) != _plain(edit.old):
            where = ".".join((edit.module, *edit.path)).lstrip(".")
            raise SelectionError(f"{where} is {values.get(last, 'missing')!r}, not {edit.old!r} as recorded.")
        old = values[last]
        # Past setters: those of strict configurations would check a half-changed whole.
        values[last] = tuple(edit.new) if isinstance(old, tuple) else copy.deepcopy(edit.new)
        self._back.append(lambda: values.update({last: old}))

    def make(self, changes: Changes) -> None:
        """All of `changes`."""
        for cut in changes.cuts:
            self.cut(cut)
        for edit in changes.edits:
            self.edit(edit)


def places(journal: Journal, cut: Cut) -> Iterator[Edit]:
    """New values for the attributes in which blocks hold their place in the list; to be read before the cut.

    An attribute counts if its name speaks of a place and, over all blocks that have it, its value is the
    index plus a constant.
    """
    keys = [*journal.module(cut.stack)._modules]
    for (name, attribute), values in _counting(journal, cut).items():
        if not _PLACE.fullmatch(attribute):
            continue
        for new, i in enumerate(cut.kept):
            if i in values and new != i:
                module = ".".join(filter(None, (cut.stack, keys[i], name)))
                yield Edit(module, (attribute,), values[i], values[i] - i + new)


def unexplained(journal: Journal, cut: Cut) -> Iterator[str]:
    """Notes on attributes that count along three or more blocks under a name that says nothing of it."""
    for (name, attribute), values in _counting(journal, cut).items():
        if not _PLACE.fullmatch(attribute) and len(values) > 2:
            where = ".".join(filter(None, (cut.stack, "*", name, attribute)))
            yield f"{where} counts along the blocks, but was left as it is: its name says nothing of a place."


def _counting(journal: Journal, cut: Cut) -> dict[tuple[str, str], dict[int, int]]:
    """Integers that go up by one from block to block: {(module in the block, attribute): {index: value}}."""
    found: dict[tuple[str, str], dict[int, int]] = {}
    for i, block in enumerate(journal.module(cut.stack)._modules.values()):
        for name, module in block.named_modules() if block is not None else ():
            for attribute, value in vars(module).items():
                if type(value) is int:
                    found.setdefault((name, attribute), {})[i] = value

    def counts(values: dict[int, int]) -> bool:
        offsets = {value - i for i, value in values.items()}
        return len(offsets) == 1 and (len(values) > 1 or offsets <= {0, 1})

    return {where: values for where, values in found.items() if counts(values)}


def lengths(journal: Journal, cut: Cut, holders: Sequence[str]) -> Iterator[Edit]:
    """New values for the attributes of `holders` whose name and value say how many blocks the list has."""
    for name in holders:
        for key, value in vars(journal.module(name)).items():
            if type(value) is int and value == cut.length and _LENGTH.fullmatch(key):
                yield Edit(name, (key,), value, len(cut.kept))


def above(name: str) -> list[str]:
    """Names of the modules around a module, from the model ("") to its owner."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts))]


def _fill(module: nn.Module, children: Children) -> None:
    module._modules.clear()
    module._modules.update(children)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
