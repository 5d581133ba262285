"""Scores from the activations of a unit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.collect import Loss
from secateur.core.errors import SecateurError, StatsError
from secateur.scoring.base import Group, Labels, Scores, check_choice, finished
from secateur.scoring.taps import Consumer, consumers, data, read_channels
from secateur.scoring.units import add_units, count_units


@dataclass(frozen=True)
class ActivationNorm:
    r"""The norm of a unit's activations where its consumers take them in, in the mean over tokens.

    $$ s_u = \Big(\frac{1}{C_u} \sum_c \frac{1}{T_c} \sum_t \sum_{i \in u} |x_{ti}|^p\Big)^{1/p} $$

    over the $C_u$ consumers of the unit and the $T_c$ tokens, or positions of a convolution's input, of each.
    Padding tokens count. Needs batches, without targets; no gradients. In the units of the activations.

    Args:
        p: 1 or 2.
    """

    p: int = 2

    def __post_init__(self) -> None:
        check_choice("ActivationNorm", "p", self.p, (1, 2))

    def __call__(
        self,
        model: nn.Module,
        groups: Sequence[Any],
        labels: Labels,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
    ) -> dict[Any, Scores]:
        def powers(x: Tensor) -> Tensor:
            return torch.linalg.vector_norm(x, self.p, dim=0, dtype=torch.float64) ** self.p

        def combine(parts: list[tuple[Tensor, Tensor, int]]) -> Tensor:
            means = torch.stack([total / tokens for total, _, tokens in parts]).sum(0)
            held = torch.stack([(channels > 0).double() for _, channels, _ in parts]).sum(0)
            return (means / held) ** (1 / self.p)

        return _scores(self, model, groups, labels, batches, powers, combine)


@dataclass(frozen=True)
class APoZ:
    r"""One minus the average percentage of zeros: how often a unit is active where its consumers take it in.

    $$ s_u = 1 - \frac{\#\{|x_{ti}| \le \tau\}}{\#\{x_{ti}\}} $$

    over all consumers, tokens $t$ and channels $i$ of the unit. Needs batches, without targets. Only
    activations like ReLU are exactly zero: where nothing is, every unit scores 1, which a note says.

    Args:
        threshold: $\tau$, up to which an activation counts as zero.

    Source: Hu et al. 2016, Network trimming. Larger means keep, so the score is one minus the paper's.
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise SecateurError(f"APoZ(threshold=...) is not negative; got {self.threshold}.")

    def __call__(
        self,
        model: nn.Module,
        groups: Sequence[Any],
        labels: Labels,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
    ) -> dict[Any, Scores]:
        def active(x: Tensor) -> Tensor:
            return (x.abs() > self.threshold).sum(dim=0)

        def combine(parts: list[tuple[Tensor, Tensor, int]]) -> Tensor:
            seen = torch.stack([channels * tokens for _, channels, tokens in parts]).sum(0)
            return torch.stack([total for total, _, _ in parts]).sum(0) / seen

        found = _scores(self, model, groups, labels, batches, active, combine)
        why = "No activation is zero here, so all units score 1: set APoZ(threshold=...)."
        return {
            g: Scores(s.values, (*s.notes, why)) if bool((s.values == 1).all()) else s
            for g, s in found.items()
        }


def _scores(
    who: object,
    model: nn.Module,
    groups: Sequence[Any],
    labels: Labels,
    batches: Iterable[Any] | None,
    measure: Any,
    combine: Any,
) -> dict[Any, Scores]:
    """One pass over the data for all groups; sums over channels become sums over units."""
    found = {g: consumers(model, g, labels, who) for g in groups}
    weights = {id(c.weight): c.weight for of_group, _ in found.values() for c in of_group}
    sums = read_channels(model, list(weights.values()), data(model, batches, who), measure)
    out = {}
    for g, (of_group, notes) in found.items():
        heard = [c for c in of_group if id(c.weight) in sums]
        parts = [
            (add_units(total, c.labels, g.size), count_units(c.labels, g.size), tokens)
            for c in heard
            for total, tokens in [sums[id(c.weight)]]
        ]
        silent = unheard(who, g, of_group, heard)
        refuse_missing(who, g, [channels for _, channels, _ in parts])
        out[g] = finished(g, combine(parts), (*notes, *silent))
    return out


def unheard(who: object, group: Group, wanted: Sequence[Consumer], heard: Sequence[Consumer]) -> list[str]:
    """A note on consumers that were never called; `StatsError` if none was."""
    names = [c.tensor for c in wanted if c not in heard]
    if not heard:
        raise StatsError(
            f"{who} cannot score {group.name}: no layer that takes it in was called as a module "
            f"({', '.join(names)}). Use GroupScore(Taylor()) or GroupScore(Magnitude()), or leave it out."
        )
    return [f"Left out, because its module was never called: {', '.join(names)}."] if names else []


def refuse_missing(who: object, group: Group, channels: Sequence[Tensor]) -> None:
    """`StatsError` if a unit was seen at no consumer."""
    missing = (torch.stack(list(channels)).sum(0) == 0).nonzero()
    if len(missing):
        raise StatsError(
            f"{who} cannot score unit {int(missing[0])} of {group.name}: no layer that ran takes it in. "
            "Use GroupScore(Taylor()) or GroupScore(Magnitude())."
        )
