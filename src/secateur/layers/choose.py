"""Which blocks to drop: by position, or by score. All give names for `drop_layers_`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from secateur.core.errors import NonFiniteError, SelectionError
from secateur.layers.finding import Stack


def first_blocks(stack: Stack, n: int) -> tuple[str, ...]:
    """The first `n` blocks that can be dropped, in the order of the stack."""
    return _some(stack.droppable, n, stack.name)[:n]


def last_blocks(stack: Stack, n: int) -> tuple[str, ...]:
    """The last `n` blocks that can be dropped, in the order of the stack."""
    names = _some(stack.droppable, n, stack.name)
    return names[len(names) - n :]


def every_other(stack: Stack, keep: Literal["even", "odd"] = "even") -> tuple[str, ...]:
    """Every other block, counted from 0: the odd ones go (1, 3, 5, ...) and the even ones stay.

    So the first block, which prunes worst, stays. `keep="odd"` is the other way round. Blocks that cannot be
    dropped stay in either case.

    Source: Fan et al. 2020, Reducing Transformer Depth on Demand. Differs from the paper: which half goes is
    said.
    """
    if keep not in ("even", "odd"):
        raise SelectionError(f"every_other(keep=...) is 'even' or 'odd'; got {keep!r}.")
    gone = [block for block in stack.blocks[keep == "even" :: 2] if block.reason is None]
    return _some(tuple(block.name for block in gone), 1, stack.name)


def lowest(scores: Mapping[str, float], n: int) -> tuple[str, ...]:
    """The `n` blocks of the lowest scores, in the order of the scores; of equal ones the later goes.

    >>> sc.layers.lowest({"h.0": 0.9, "h.1": 0.1, "h.2": 0.4, "h.3": 0.1}, 2)
    ('h.1', 'h.3')
    """
    names = _some(tuple(scores), n, "the scores")
    if odd := next((name for name in names if scores[name] != scores[name]), None):
        raise NonFiniteError(f"The score of {odd} is NaN.")
    ranked = sorted(range(len(names)), key=lambda i: (scores[names[i]], -i))
    return tuple(names[i] for i in sorted(ranked[:n]))


def _some(names: tuple[str, ...], n: int, where: str) -> tuple[str, ...]:
    if not 1 <= n <= len(names):
        have = f"{where or 'the stack'} has {len(names)}"
        raise SelectionError(f"Asked for {n} blocks, but of those that can be dropped {have}.")
    return names
