"""All blocks one after the other: load, solve, tune, hand on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

from secateur.core.names import Target
from secateur.progress import track
from secateur.reconstruct.consumers import Consumer
from secateur.reconstruct.passes import Chain
from secateur.stream.measuring import Dense
from secateur.stream.solving import Done, Job, solve_block_
from secateur.stream.stages import called_once, known_order
from secateur.stream.states import States
from secateur.stream.tuning import Reconstruct, reconstruct_
from secateur.stream.walk import InMemory, Walk, Weights

Finished = Callable[[int, dict[str, Done]], None]
"""Told how many blocks were done before, and the layers that are solved now."""


def solve_all_(
    job: Job,
    walk: Walk,
    dense: Walk | None,
    groups: Mapping[int, Sequence[Consumer]],
    targets: Mapping[str, Target],
    limit: int,
    reconstruct: Reconstruct | None = None,
    weights: Weights | None = None,
    finished: Finished = lambda n, done: None,
) -> dict[str, Done]:
    """Prune the layers of all groups in place, beginning where the walk stands.

    Args:
        job: what is done to a layer.
        walk: of the model that is pruned.
        dense: of the same model, at the same place, for what the dense one passes on; None if that is not
            asked for.
        groups: layers by the number of blocks that are done when they are called, see `segments`.
        targets: by name.
        limit: behind so many blocks the model can be entered.
        reconstruct: how blocks are tuned.
        weights: of the blocks.
        finished: called when a block is pruned and its states are kept.
    """
    weights = weights or InMemory()
    beside = Dense(dense) if dense is not None else None
    blocks, last = walk.chain.blocks, max(groups)
    done: dict[str, Done] = {}
    for n in track(range(walk.done, min(last, limit) + 1), "solving blocks"):
        mine = groups.get(n, ())
        with weights.resident(blocks[n]) if n < len(blocks) else nullcontext():
            solved = _solve_(job, walk, beside if n < len(blocks) else None, mine, targets, reconstruct)
            if any(k > n for k in groups):
                known = mine if known_order(walk, mine) is not None else ()
                with called_once(walk, known) if known else nullcontext():
                    walk.advance(n + 1)
            finished(n, solved)
        done |= solved
    if last > limit:
        whole = Walk(walk.model, Chain(), walk.data, States())
        solved = solve_block_(job, whole, groups[last], targets, None)
        done |= solved
        finished(last, solved)
    return done


def _solve_(
    job: Job,
    walk: Walk,
    beside: Dense | None,
    mine: Sequence[Consumer],
    targets: Mapping[str, Target],
    reconstruct: Reconstruct | None,
) -> dict[str, Done]:
    """The layers of one block; the dense walk ends behind it."""
    names = dict.fromkeys(c.parameter for c in mine)
    if beside is not None:
        beside.enter([targets[n] for n in names])
    solved = solve_block_(job, walk, mine, targets, beside) if mine else {}
    if beside is not None:
        with beside.weights():
            beside.walk.advance(walk.done + 1)
        if reconstruct is not None and mine:
            masks = {targets[n]: solved[n].keep for n in names}
            gain = reconstruct_(walk, beside.walk, masks, reconstruct, job)
            first = next(iter(names))
            solved[first] = replace(solved[first], tuned=gain)
    return solved


def segments(chain: Chain, limit: int, consumers: Sequence[Consumer]) -> dict[int, list[Consumer]]:
    """Layers by the number of blocks that are done when they are first called, in that order.

    All that stand behind more blocks than the model can be entered behind are one segment, the last.
    """
    found: dict[int, list[Consumer]] = {}
    for c in consumers:
        begin = chain.begin(c)
        found.setdefault(limit + 1 if begin is None else min(begin, limit + 1), []).append(c)
    return dict(sorted(found.items()))
