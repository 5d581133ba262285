"""Rows of texts or tokens cut into the examples that a model sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from secateur.cli.data.rows import Row, Rows
from secateur.core.errors import SecateurError

Encode = Callable[[Row, int | None], list[int]]  # a row to tokens, at most so many
Window = list[int]


@dataclass(frozen=True)
class Cut:
    """How windows are taken from rows.

    Attributes:
        samples: windows, at most; None for all.
        length: tokens of a window, at most.
        seed: None takes rows in their order and windows from the beginning. With a seed, windows of a single
            row start at positions drawn without replacement; of several rows, each in random order, one
            window is taken, at a random position where the row is longer.
        pack: several rows are joined to one, with the tokenizer's end-of-text token between them, and cut
            from the beginning into windows of `length` tokens; with a seed they are joined in random order.
    """

    samples: int | None
    length: int
    seed: int | None = None
    pack: bool = False

    def generator(self) -> torch.Generator:
        """A fresh one, from the seed."""
        return torch.Generator().manual_seed(self.seed or 0)

    def order(self, n: int, generator: torch.Generator | None = None) -> Iterator[int]:
        """The positions of `n` rows, in the order in which they are read."""
        if self.seed is None:
            return iter(range(n))
        positions: list[int] = torch.randperm(n, generator=generator or self.generator()).tolist()
        return iter(positions)

    def fewer(self, name: str, n: int) -> tuple[str, ...]:
        """A note if `n` examples are not what was asked for."""
        if self.samples is None or n >= self.samples:
            return ()
        return (f"{name} gives {n} of the {self.samples} examples asked for.",)


def windows(rows: Rows, encode: Encode, cut: Cut, end: int | None) -> tuple[list[Window], tuple[str, ...]]:
    """The windows of `rows`, and notes where they are fewer or shorter than asked; `end` is to pack with."""
    if len(rows.items) == 1:
        found = _of_one(encode(rows.items[0], None), cut, cut.seed is not None)
    elif cut.pack:
        assert end is not None
        found = _of_one(_packed(rows, encode, cut, end), cut, False)
    else:
        found = _of_each(rows, encode, cut)
    if not found or len(found[0]) < 2:
        raise SecateurError(f"{rows.name} holds no text of at least two tokens.")
    return found, _notes(rows, found, cut)


def _of_one(ids: Window, cut: Cut, anywhere: bool) -> list[Window]:
    length = min(cut.length, len(ids))
    last = len(ids) - length
    starts = cut.order(last + 1) if anywhere else iter(range(0, last + 1, max(length, 1)))
    return [ids[i : i + length] for i in islice(starts, cut.samples)]


def _of_each(rows: Rows, encode: Encode, cut: Cut) -> list[Window]:
    generator = cut.generator()
    found: list[Window] = []
    for i in cut.order(len(rows.items), generator):
        if len(found) == cut.samples:
            break
        ids = encode(rows.items[i], cut.length if cut.seed is None else None)
        if (spare := len(ids) - cut.length) > 0:
            start = int(torch.randint(spare + 1, (), generator=generator))
            ids = ids[start : start + cut.length]
        if len(ids) > 1:
            found.append(ids)
    return found


def _packed(rows: Rows, encode: Encode, cut: Cut, end: int) -> Window:
    """As many rows as the windows need."""
    joined: Window = []
    for i in cut.order(len(rows.items)):
        if cut.samples is not None and len(joined) >= cut.samples * cut.length:
            break
        ids = encode(rows.items[i], None)
        if ids and joined and joined[-1] != end:  # some tokenizers end each text with it themselves
            joined.append(end)
        joined += ids
    return joined


def _notes(rows: Rows, found: list[Window], cut: Cut) -> tuple[str, ...]:
    one = cut.pack or len(rows.items) == 1
    if one and len(found[0]) < cut.length:
        return (f"{rows.name} holds {len(found[0])} tokens, less than a window of {cut.length}.",)
    return cut.fewer(rows.name, len(found))
