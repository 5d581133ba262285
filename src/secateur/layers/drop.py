"""Dropping blocks: in place, wholly or not at all, and proven on an example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from secateur.core.errors import SelectionError
from secateur.core.names import unwrap
from secateur.layers.changes import Changes, Cut, Edit, Journal, above, places, unexplained
from secateur.layers.config import Dialect, as_edits, configs, disagreement, fit
from secateur.layers.finding import Stack, require, survey
from secateur.layers.optimizers import forget
from secateur.layers.proof import check_outputs, follow, outputs, prove
from secateur.measure import as_call


@dataclass(frozen=True)
class DropRecord:
    """What was dropped.

    Attributes:
        dropped: names that the blocks had.
        origin: name now -> name before, of the blocks that stayed in a stack that lost some.
        parameters: entries of the parameters that left the model.
        config_ok: whether a model built from the configuration is the one at hand, so that `save_pretrained`
            and `from_pretrained` give it back. Differences of before do not count, but a note says so.
        notes: why not, and what else a reader must know.
        changes: everything that was changed, as data.
    """

    dropped: tuple[str, ...]
    origin: Mapping[str, str]
    parameters: int
    config_ok: bool
    notes: tuple[str, ...]
    changes: Changes
    _undo: Callable[[], None] = field(repr=False, compare=False)

    def undo(self) -> None:
        """Put the blocks back, with their optimizer state. What was trained since stays trained.

        Raises `SelectionError` if it was undone before, or the stacks were changed since.
        """
        self._undo()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, from which `replay_` makes the same changes to another model."""
        return {
            "dropped": [*self.dropped],
            "config_ok": self.config_ok,
            "notes": [*self.notes],
            "changes": self.changes.to_dict(),
        }


def drop_layers_(
    model: nn.Module,
    which: Iterable[str | int],
    example: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> DropRecord:
    """Drop whole blocks from the stacks of a model, in place.

    The result computes what the model computes with these blocks bypassed: both are run on the example, and
    their outputs must be equal, bit by bit. Else, and on any other error, the model is left as it was.

    The blocks that stay move up in their list. Attributes that hold a block's place (`layer_idx` and the
    like) are renumbered, so that caches have no gaps. The configuration is updated: building a model from it,
    on the meta device, proves which fields count the blocks. The record's `config_ok` says if that succeeded.

    Do it before `DistributedDataParallel` or `torch.compile` wrap the model, or wrap it anew.

    Args:
        model: any module; wrappers of `torch.compile` and data parallelism are looked through.
        which: names of blocks, as from `stacks`; or indices if the model has one stack only, -1 the last.
        example: a tensor, a tuple of positional arguments or a mapping of keyword arguments.
        optimizer: loses the parameters of the dropped blocks and their state. Groups stay, if need be empty.

    Raises:
        SelectionError: a block cannot be dropped, for the reason that `stacks` says; none would be left; the
            model without the blocks is not the model with them bypassed, because its code depends on how many
            there are; the optimizer is one of another model.

    >>> block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> encoder = torch.nn.TransformerEncoder(block, 3)
    >>> record = sc.layers.drop_layers_(encoder, [1], torch.ones(1, 5, 8))
    >>> encoder.num_layers, record.origin
    (2, {'layers.0': 'layers.0', 'layers.1': 'layers.2'})
    """
    inner = unwrap(model)
    args, kwargs = as_call(example)
    cuts, names = _resolve(inner, survey(inner, args, kwargs), which)
    expected = outputs(inner, args, kwargs, names)
    journal = Journal(inner)
    try:
        held = {name: c for cut in cuts for name, c in configs(journal, above(cut.stack))}
        known = {name: Dialect.of(journal.module(name), config) for name, config in held.items()}
        odd = [note for cut in cuts for note in unexplained(journal, cut)]
        edits = _cut(journal, cuts, known)
        check = partial(check_outputs, inner, args, kwargs, expected)
        edits += prove(journal, cuts, check)
        edits += follow(journal, cuts, held, known, check)
        lists = [journal.module(cut.stack) for cut in cuts]
        reasons = [disagreement(journal.module(n), config, known[n], lists) for n, config in held.items()]
        notes = [f"The configuration does not give this model: {r}." for r in dict.fromkeys(reasons) if r]
        if not held:
            notes = ["The model has no configuration: to build it anew takes this record."]
        config_ok = not notes
        for name in sorted({tensor for d in known.values() for tensor in d.tensors})[:1]:
            odd.append(
                f"The model differed from its configuration before, in {name}: load it as the original."
            )
        changes = Changes(tuple(cuts), tuple(edits))
        return _record(inner, journal, changes, config_ok, [*notes, *odd], optimizer)
    except BaseException:
        journal.undo()
        raise


def replay_(
    model: nn.Module, data: Mapping[str, Any], *, optimizer: torch.optim.Optimizer | None = None
) -> DropRecord:
    """Make the changes of a record, as from `DropRecord.to_dict`, to a model as it was before them.

    Nothing is run, so the model may be on the meta device.

    Raises:
        ArtifactError: the data is not such a record.
        SelectionError: the model is not of the structure that was recorded. It is left as it was.
    """
    inner = unwrap(model)
    data = data if isinstance(data, Mapping) else {}
    changes = Changes.from_dict(data.get("changes", {}))
    journal = Journal(inner)
    try:
        journal.make(changes)
        notes = [str(note) for note in data.get("notes", ())]
        return _record(inner, journal, changes, bool(data.get("config_ok", False)), notes, optimizer)
    except BaseException:
        journal.undo()
        raise


def _resolve(
    model: nn.Module, found: Sequence[Stack], which: Iterable[str | int]
) -> tuple[list[Cut], list[str]]:
    """What stays in each stack, and the names of the blocks that go."""
    usable = require(model, found)
    asked = [which] if isinstance(which, str | int) else [*which]
    if not asked:
        raise SelectionError("No blocks to drop were given.")
    names = [_name(usable, block) if isinstance(block, int) else block for block in asked]
    blocks = {block.name: block for stack in found for block in stack.blocks}
    for name in names:
        if name not in blocks:
            some = ", ".join(stack.name or "the model itself" for stack in usable)
            raise SelectionError(f"There is no block {name!r}; the stacks of this model are: {some}.")
        if blocks[name].reason:
            raise SelectionError(f"{name} cannot be dropped: {blocks[name].reason}.")
        if names.count(name) > 1:
            raise SelectionError(f"{name} was given twice.")
        if inside := next((other for other in names if name.startswith(f"{other}.")), None):
            raise SelectionError(f"{name} lies in {inside}, which is dropped too: leave it out.")
    cuts = []
    for stack in found:
        kept = tuple(i for i, block in enumerate(stack.blocks) if block.name not in names)
        if len(kept) == len(stack):
            continue
        if not any(stack.blocks[i].parameters for i in kept):
            raise SelectionError(f"Nothing of {stack.name or 'the model'} would be left: keep a block.")
        cuts.append(Cut(stack.name, len(stack), kept))
    return cuts, names


def _name(usable: Sequence[Stack], index: int) -> str:
    if len(usable) != 1:
        some = ", ".join(stack.name or "the model itself" for stack in usable)
        raise SelectionError(f"Indices name blocks of the only stack, but this model has {some}: give names.")
    blocks = usable[0].blocks
    if not -len(blocks) <= index < len(blocks):
        raise SelectionError(f"There is no block {index} in {usable[0].name}, which has {len(blocks)}.")
    return blocks[index].name


def _cut(journal: Journal, cuts: Sequence[Cut], known: Mapping[str, Dialect]) -> list[Edit]:
    """Cut all lists, renumber the blocks and write the configurations."""
    done: list[Edit] = []

    def make(edits: Iterable[Edit]) -> None:
        for edit in edits:
            journal.edit(edit)
            done.append(edit)

    for cut in cuts:
        renumbered = [*places(journal, cut)]
        journal.cut(cut)
        make(renumbered)
        for name, config in configs(journal, above(cut.stack)):
            writes = fit(journal.module(name), config, cut, known[name])
            make([*as_edits(journal, name, writes)])
    return done


def _record(
    model: nn.Module,
    journal: Journal,
    changes: Changes,
    config_ok: bool,
    notes: Sequence[str],
    optimizer: torch.optim.Optimizer | None,
) -> DropRecord:
    alive = {id(p) for p in model.parameters()}
    now = {id(module): name for name, module in model.named_modules()}
    dropped, origin, gone = [], {}, {}
    for cut in changes.cuts:
        for i, (key, block) in enumerate(journal.children(cut.stack)):
            name = f"{cut.stack}.{key}" if cut.stack else key
            if i not in cut.kept:
                dropped.append(name)
                gone.update({id(p): p for p in block.parameters() if id(p) not in alive} if block else {})
            elif id(block) in now:
                origin[now[id(block)]] = name
    restore = forget(optimizer, alive, gone) if optimizer is not None else None
    parameters = sum(p.numel() for p in gone.values())

    def undo() -> None:
        journal.withdraw()
        if restore is not None:
            restore()

    return DropRecord(tuple(dropped), origin, parameters, config_ok, tuple(notes), changes, undo)
