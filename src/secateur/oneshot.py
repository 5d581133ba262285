"""One-shot pruning by a solver, layer after layer, each fitted to what the pruned ones before it pass on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from secateur.collect.batches import Batch, as_batches
from secateur.core.errors import StatsError
from secateur.core.names import Target
from secateur.patterns import Pattern
from secateur.reconstruct.consumers import consumers_of
from secateur.solvers import Solver
from secateur.stream.sequence import segments, solve_all_
from secateur.stream.solving import Done, Job
from secateur.stream.states import States
from secateur.stream.tuning import Reconstruct
from secateur.stream.walk import Walk, enterable


@torch.no_grad()
def solve_(
    model: nn.Module,
    targets: Sequence[Target],
    solver: Solver,
    pattern: Pattern,
    shares: Mapping[str, float],
    batches: Iterable[Any] | None,
    correction: float | None = None,
    reconstruct: Reconstruct | None = None,
) -> tuple[dict[str, Done], tuple[str, ...]]:
    """Prune the targets in the order in which the model runs them, in place; not undone on errors.

    The model is walked block by block (see `secateur.stream.walk`): a block that is done is not run again.
    Where that would not be the same as the model's own pass, which is seen on the first example before
    anything is changed, the passes from there on are whole ones, with a note.

    Memory: the calibration batches, the hidden states between two blocks on all of them, the Gram matrix of
    one input, and the masks.

    Raises:
        StatsError: no batches, or a layer whose inputs cannot be seen or that no batch reaches.
        NonFiniteError: NaN or infinite inputs.
    """
    data = list(as_batches(batches, targets[0].weight.device, f"{solver} fits weights to data"))
    consumers, reasons = consumers_of(model, [t.name for t in targets])
    for name, reason in reasons.items():
        raise StatsError(
            f"{solver} cannot see the inputs of {name}, {reason}: exclude it with where=Where(exclude=...), or "
            "prune by a criterion."
        )
    chain, limit, why = enterable(model, consumers, _example(data[0]))
    groups = segments(chain, limit, consumers)
    twin = correction is not None or reconstruct is not None
    done = solve_all_(
        Job(solver, pattern, shares, correction),
        Walk(model, chain, data, States()),
        Walk(model, chain, data, States()) if twin else None,
        groups,
        {t.name: t for t in targets},
        limit,
        reconstruct,
    )
    if max(groups) <= limit:
        return done, ()
    return done, (f"Behind {limit} blocks the model is run as a whole for every layer: {why}.",)


def _example(batch: Batch) -> Batch:
    """The first example of a batch, if it can be cut."""
    try:
        return batch.part(0, 1) if batch.size > 1 else batch
    except StatsError:
        return batch
