"""Scores that look at a unit's weights as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.collect import Loss
from secateur.core.errors import StatsError
from secateur.scoring.base import Group, Labels, Place, Scores, finished, places
from secateur.scoring.units import add_units, count_units, index_rows

# Entries of a block of distances: 8 MiB.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class FPGM:
    r"""Distance from the geometric median: what other units of the group could stand for goes first.

    $$ s_u = \sum_v \lVert F_u - F_v \rVert_2 $$

    $F_u$ is all that produces the unit: the slices of the members of role `out` side by side, each in float64
    and as it is stored. (Biases, norms and consumers do not count.) Needs no data; in the units of the
    weights.

    Raises `StatsError` if nothing in the group produces it, or its units differ in size.

    Source: He et al. 2019, Filter pruning via geometric median. Differs from the authors' code:
    units that are all zero score 0 and do not count for the others, since a cluster of pruned filters would
    become the median.
    """

    def __call__(
        self,
        model: nn.Module,
        groups: Sequence[Any],
        labels: Labels,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
    ) -> dict[Any, Scores]:
        return {g: finished(g, self._distances(model, g, labels)) for g in groups}

    def _distances(self, model: nn.Module, group: Group, labels: Labels) -> Float[Tensor, "units"]:
        made_by = places(model, group, labels, "out")
        if not made_by:
            raise StatsError(
                f"FPGM compares the weights that produce a unit, and {group.name} has none of role 'out': "
                "use Magnitude(), or exclude the group."
            )
        units = torch.cat([_slices(place, group) for place in made_by], dim=1)
        alive = units.norm(dim=1) > 0
        live = units[alive]
        step = max(1, _BLOCK // max(1, len(live)))
        sums = [torch.cdist(block, live).sum(dim=1) for block in live.split(step)]
        scores = units.new_zeros(group.size)
        scores[alive] = torch.cat(sums) if sums else live.new_zeros(0)
        return scores


def _slices(place: Place, group: Group) -> Float[Tensor, "units entries"]:
    """Each unit's part of a tensor, as a row: its indices in order."""
    order = torch.argsort(place.labels, stable=True)
    order = order[place.labels[order] >= 0]
    counts = count_units(place.labels, group.size)
    if not bool((counts == counts[0]).all()):
        raise StatsError(
            f"FPGM compares units of one size, but those of {group.name} differ in {place.tensor}: use "
            "Magnitude(), or exclude the group."
        )
    rows = index_rows(place.weight.detach(), place.dim)[order].double()
    return rows.reshape(group.size, -1)


@dataclass(frozen=True)
class BNScale:
    r"""The scale of batch normalisation, $s_u = \mathrm{mean}\,|\gamma_i|$ over the channels $i$ of the unit.

    Over all batch norms of the group: one for a filter, one for each block along a residual stream. Needs no
    data. Meant for networks trained with an L1 penalty on the scales; a channel's shift is not seen.

    Raises `StatsError` if a unit of a group passes no batch norm with scales.

    Source: Liu et al. 2017, Learning efficient convolutional networks through network slimming.
    """

    def __call__(
        self,
        model: nn.Module,
        groups: Sequence[Any],
        labels: Labels,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
    ) -> dict[Any, Scores]:
        return {g: finished(g, self._scales(model, g, labels)) for g in groups}

    def _scales(self, model: nn.Module, group: Group, labels: Labels) -> Float[Tensor, "units"]:
        norms = [p for p in places(model, group, labels) if _is_batch_norm(p)]
        total = sum(
            (add_units(p.weight.detach().abs().double(), p.labels, group.size) for p in norms),
            torch.zeros(()),
        )
        count = sum((count_units(p.labels, group.size) for p in norms), torch.zeros(()))
        if not norms or not bool((count > 0).all()):
            which = "its units pass no" if not norms else "not all of its units pass a"
            raise StatsError(
                f"BNScale cannot score {group.name}: {which} batch norm with scales. Use "
                "Magnitude(), or exclude the group."
            )
        return total / count


def _is_batch_norm(place: Place) -> bool:
    """Whether a member is the scale of a batch norm, of torch or written like one."""
    module = place.target.module
    running = isinstance(getattr(module, "running_var", None), Tensor)
    batch_norm = running or isinstance(
        module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
    )
    return batch_norm and place.target.attribute == "weight" and place.weight.dim() == 1
