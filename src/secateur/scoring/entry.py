"""The one entry: any criterion, of weights or of groups, to scores of units."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from secateur.collect import Loss
from secateur.core.errors import SecateurError
from secateur.core.names import unwrap
from secateur.criteria import Criterion
from secateur.scoring.base import GroupCriterion, Labels, Scores
from secateur.scoring.weights import GroupScore


def score_groups(
    model: nn.Module,
    groups: Sequence[Any],
    labels: Labels,
    criterion: Criterion | GroupCriterion,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> dict[Any, Scores]:
    """One score for each unit of each group; larger means keep.

    The model runs in evaluation mode and is left as it was: weights, gradients, modes, hooks, torch's random
    state. Frozen weights are scored like others.

    Args:
        model: any module; wrappers of `torch.compile` and data parallelism are looked through.
        groups: of a graph of this model.
        labels: `graph.labels`.
        criterion: a group criterion, such as `FPGM()`; a criterion of weights is taken as
            `GroupScore(criterion)`: its scores are summed over all of a unit's weights.
        batches: data for criteria that need it; see `collect`.
        loss: `loss(output, target)`, mean over the batch; None if the model returns its loss.

    Raises:
        StatsError: the criterion cannot score a group; the message says what to do.
        NonFiniteError: NaN or infinite scores.
    """
    if isinstance(criterion, type):
        raise SecateurError(f"Pass {criterion.__name__}(), not the class {criterion.__name__}.")
    if isinstance(criterion, Criterion):
        criterion = GroupScore(criterion)
    if isinstance(batches, Iterator):
        batches = list(batches)
    return criterion(unwrap(model), groups, labels, batches, loss)
