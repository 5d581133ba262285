"""Scores of weights summed to scores of units."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.collect import Collected, Loss, collect
from secateur.collect.traffic import understood
from secateur.core.errors import SecateurError, StatsError
from secateur.core.names import Target
from secateur.criteria import Criterion, Random
from secateur.scoring.base import Group, Labels, Place, Scores, check_choice, finished, per_layer, places
from secateur.scoring.taps import called_weights
from secateur.scoring.units import NORMS, across_members, count_units, index_rows, within_member
from secateur.stats import ActivationStat, NameSeed, RowTaylorSquare, SynapticFlow


@dataclass(frozen=True)
class GroupScore:
    r"""A criterion's scores of single weights, reduced to the units of a group.

    $$ s_u = \nu\Big(\bigoplus_{m} \mu_m\big(\bigoplus_{e \in m(u)} s_e\big)\Big) $$

    The criterion scores every entry of every member tensor: rows and columns of linear and convolution
    layers, biases, scales of norms, raw parameters. Entries $e$ of member $m$ that belong to unit $u$ are
    reduced by `within`; members by `across`; then the group's scores are divided by `normalise`.

    A tensor that is a member in two dimensions (a square weight in a residual stream) counts in both. A tied
    one counts once, buffers not at all. A member that the criterion cannot score, such as a bias for `Wanda`,
    is left out with a note. `TaylorGroup` scores whole rows only. Criteria with curvature of the whole
    network (`GraSP`, `OBD`) see the members of all groups given. One with several `rounds` scores once.

    `Random` draws one number for each unit: a sum of noise would rank units by their number of weights.

    Args:
        criterion: any criterion of `secateur.criteria`.
        within: `sum`; `l1`, the sum, refused if a score is negative; `l2`, root of the sum of squares,
            refused likewise; `mean` and `max` over the entries.
        across: `sum`, `mean` or `max` over the members that hold the unit. With `within="l2"` squares are
            combined and the root comes last: `l2` and `sum` give the L2 norm of all entries of a unit.
        normalise: None, or divide by the `mean`, `max`, `sum` or `l2` norm of the group's absolute scores, so
            that groups compare.
        normalise_members: the same for each member by itself, before they are combined.
        members: `all`, or the roles to count: `out`, `in`, `along`, or a tuple of these.

    Raises `StatsError` if no member of a group can be scored, or a unit has no entry in those that can.

    Source: Fang et al. 2023, DepGraph: towards any structural pruning. Differs from the authors'
    code, which leaves out the root of the L2 norm: the order of units is the same, normalised scores are not.
    """

    criterion: Criterion
    within: str = "sum"
    across: str = "sum"
    normalise: str | None = None
    normalise_members: str | None = None
    members: str | tuple[str, ...] = "all"

    def __post_init__(self) -> None:
        if isinstance(self.criterion, type) or not isinstance(self.criterion, Criterion):
            got = self.criterion.__name__ if isinstance(self.criterion, type) else repr(self.criterion)
            raise SecateurError(f"GroupScore takes a criterion of weights, such as Magnitude(); got {got}.")
        check_choice("GroupScore", "within", self.within, ("sum", "l1", "l2", "mean", "max"))
        check_choice("GroupScore", "across", self.across, ("sum", "mean", "max"))
        check_choice("GroupScore", "normalise", self.normalise, NORMS)
        check_choice("GroupScore", "normalise_members", self.normalise_members, NORMS)
        check_roles("GroupScore", self.members)

    def __call__(
        self,
        model: nn.Module,
        groups: Sequence[Any],
        labels: Labels,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
    ) -> dict[Any, Scores]:
        if isinstance(self.criterion, Random):
            return {g: finished(g, _noise(self.criterion, g)) for g in groups}
        notes: dict[Any, list[str]] = {g: [] for g in groups}
        found = {g: self._scorable(model, g, labels, notes[g]) for g in groups}
        targets: dict[int, Target] = {}
        for place in (place for of_group in found.values() for place in of_group):
            targets.setdefault(id(place.weight), place.target)
        collected, heard = _collect(model, self.criterion, list(targets.values()), batches, loss)
        parts = self._parts({k: t for k, t in targets.items() if t.name in heard}, found, collected)
        out = {}
        for g in groups:
            silent = [p.tensor for p in found[g] if targets[id(p.weight)].name not in heard]
            if silent:
                notes[g].append(f"Left out, because its module was never called: {', '.join(silent)}.")
            notes[g] += _notes_for(found[g], targets, collected)
            out[g] = finished(g, self._combine(g, parts[g]), notes[g])
        return out

    def _scorable(self, model: nn.Module, group: Group, labels: Labels, notes: list[str]) -> list[Place]:
        """The members that count; what is left out is noted."""
        left: dict[str, list[str]] = {}
        kept = []
        for place in places(model, group, labels, self.members):
            reason = _refusal(self.criterion, place)
            if reason is None:
                kept.append(place)
            else:
                left.setdefault(reason, []).append(place.tensor)
        notes += [f"Left out, because {reason}: {', '.join(names)}." for reason, names in left.items()]
        if not kept:
            raise StatsError(
                f"{self.criterion} can score no member of {group.name} (members={self.members!r}). "
                f"{' '.join([*notes, 'Use'])} another criterion, such as Magnitude(), or exclude the group."
            )
        return kept

    def _parts(
        self, targets: dict[int, Target], found: dict[Any, list[Place]], collected: Collected
    ) -> dict[Any, list[tuple[Tensor, Tensor]]]:
        """For each group its members' scores of units and which units each holds; one tensor at a time."""
        users: dict[int, list[tuple[Any, Place]]] = {}
        for g, of_group in found.items():
            for place in of_group:
                users.setdefault(id(place.weight), []).append((g, place))
        parts: dict[Any, list[tuple[Tensor, Tensor]]] = {g: [] for g in found}
        # By name, so that sums do not depend on the order of members.
        for key, target in sorted(targets.items(), key=lambda item: item[1].name):
            scores = self._entries(target, collected)
            for g, place in users[key]:
                units = within_member(index_rows(scores, place.dim), place.labels, g.size, self.within)
                has = (count_units(place.labels, g.size) > 0).double()
                parts[g].append((per_layer(units, self.normalise_members).cpu(), has.cpu()))
        return parts

    def _entries(self, target: Target, collected: Collected) -> Tensor:
        """Scores of one tensor's entries, in its own shape."""
        matrix = self.criterion(target.matrix, collected.stats[target.name])
        if self.within in ("l1", "l2") and bool((matrix < 0).any()):
            raise SecateurError(
                f"{self.criterion} gives {target.name} negative scores, whose {self.within} norm would keep "
                "what should go first: use GroupScore(within='sum') or 'mean'."
            )
        return target.layout.restore(matrix, target.weight.shape)

    def _combine(self, group: Group, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        if not parts:
            raise StatsError(
                f"No layer of {group.name} received an input, so {self.criterion} cannot score it: use "
                "another criterion, or exclude the group."
            )
        has = torch.stack([h for _, h in parts])
        if not bool(has.any(dim=0).all()):
            unit = int((has.sum(dim=0) == 0).nonzero()[0])
            raise StatsError(
                f"Unit {unit} of {group.name} has no weight in the members that {self.criterion} scores: use "
                "members='all' or another criterion."
            )
        units = across_members(torch.stack([p for p, _ in parts]), has, self.across, self.within == "l2")
        return per_layer(units, self.normalise)


def check_roles(owner: str, members: str | tuple[str, ...]) -> None:
    """Raise `SecateurError` for a role that no member can have."""
    for role in (members,) if isinstance(members, str) else members:
        check_choice(owner, "members", role, ("all", "out", "in", "along"))


def _noise(criterion: Random, group: Group) -> Tensor:
    """One number for each unit, from the group's name and the seed."""
    digest = hashlib.sha256(group.name.encode()).digest()
    seed = torch.tensor(int.from_bytes(digest[:8], "little") >> 1)
    return criterion(torch.zeros(1, group.size), {NameSeed(): seed})[0]


def _refusal(criterion: Criterion, place: Place) -> str | None:
    """Why the criterion has no scores for a member, if it has none."""
    target = place.target
    if not target.weight.is_floating_point():
        return "they are not floating-point weights"
    for stat in criterion.needs:
        if isinstance(stat, ActivationStat) and not understood(target.module, target.attribute):
            return f"{type(stat).__name__} is measured on the inputs of linear and convolution layers"
        if isinstance(stat, RowTaylorSquare) and not _is_row(place):
            return "whole rows are scored, and a unit is not made of rows"
        if isinstance(stat, SynapticFlow) and "bias" in target.attribute:
            return "biases are no part of the flow"
    return None


def _is_row(place: Place) -> bool:
    """Whether each index of the member's dimension is made of whole rows of the matrix."""
    # A small weight tells; the first dimension stays whole, as groups of a convolution divide it.
    small = [n if i == 0 else min(n, 2) for i, n in enumerate(place.weight.shape)]
    shape = [n if i == place.dim else 1 for i, n in enumerate(small)]
    rows = place.target.layout.matrix(torch.arange(small[place.dim]).reshape(shape).expand(small))
    return len(small) > 1 and bool((rows == rows[:, :1]).all())


def _collect(
    model: nn.Module,
    criterion: Criterion,
    targets: Sequence[Target],
    batches: Iterable[Any] | None,
    loss: Loss | None,
) -> tuple[Collected, set[str]]:
    """What the criterion needs, and the names of the targets of which it was measured."""
    names = {t.name for t in targets}
    if not any(isinstance(stat, ActivationStat) for stat in criterion.needs):
        return collect(model, criterion.needs, batches, loss, targets), names
    if isinstance(batches, Iterator):
        batches = list(batches)
    try:
        return collect(model, criterion.needs, batches, loss, targets), names
    except StatsError:
        # A layer may hold its weight for a bare function, and an expert may get no token.
        called = {id(t.weight) for t in targets} & called_weights(model, batches)
        heard = [t for t in targets if id(t.weight) in called]
        if len(heard) in (0, len(targets)):
            raise
    return collect(model, criterion.needs, batches, loss, heard), {t.name for t in heard}


def _notes_for(of_group: Sequence[Place], targets: dict[int, Target], collected: Collected) -> list[str]:
    """Notes of the measurement that concern a group: those on its own tensors, and those on none."""

    def naming(names: Iterable[str], note: str) -> bool:
        return any(f" of {name} is " in note for name in names)

    every = [t.name for t in targets.values()]
    own = {targets[id(p.weight)].name for p in of_group}
    return [n for n in collected.notes if naming(own, n) or not naming(every, n)]
