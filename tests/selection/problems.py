"""Small selection problems, and their solution by plain lists and fractions."""

import math
import random
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

import torch
from hypothesis import strategies as st

from secateur.selection import Constraint


@dataclass(frozen=True)
class Member:
    tensor: str
    dim: int
    role: str


@dataclass(frozen=True, eq=False)
class Group:
    name: str
    size: int
    kind: str = "neurons"
    members: tuple[Member, ...] = ()


@dataclass
class Problem:
    """Layers are products of the widths of two groups (None: a width of 3 that stays) and a factor."""

    groups: list[Group]
    scores: dict[Group, torch.Tensor]
    layers: list[tuple[Group, Group | None, int]]
    clusters: list[list[Group]] = field(default_factory=list)
    constraints: dict[Group, Constraint] = field(default_factory=dict)
    alike: dict[Group, str] = field(default_factory=dict)
    calls: int = 0

    def cost(self, kept):
        self.calls += 1
        assert set(kept) == set(self.groups)
        return sum(kept[a] * (3 if b is None else kept[b]) * factor for a, b, factor in self.layers)

    def sets(self):
        """Groups of equal share, each once, in the order of the groups."""
        found, seen = [], set()
        for group in self.groups:
            if group not in seen:
                together = next((c for c in self.clusters if group in c), [group])
                found.append(sorted(together, key=self.groups.index))
                seen.update(together)
        return found

    def constraint(self, group):
        return self.constraints.get(group, Constraint())

    def allows(self, group, n):
        limits = self.constraint(group)
        least = max(limits.minimum, group.size - limits.maximum_sparsity * group.size)
        return n >= least and n % limits.multiple_of == 0

    def rungs(self, together):
        """Allowed counts of a set of groups, whole first."""
        found = []
        for k in range(together[0].size, 0, -1):
            if all(k * g.size % together[0].size == 0 for g in together):
                counts = [k * g.size // together[0].size for g in together]
                if k == together[0].size or all(map(self.allows, together, counts)):
                    found.append(counts)
        fixed = {self.constraint(g).sparsity for g in together} - {None}
        if fixed:
            wanted = (1 - fixed.pop()) * together[0].size
            best = min(found, key=lambda counts: (round(abs(counts[0] - wanted), 6), counts[0]))
            return [best]
        return found

    def ranked(self, group):
        """Indices in the order in which they go."""
        scores = self.scores[group].tolist()
        return sorted(range(group.size), key=lambda i: (scores[i], i))

    def removed_scores(self, together, before, after):
        """Scores of the units that go between two rungs."""
        return [
            self.scores[g][i].item()
            for g, b, a in zip(together, before, after, strict=True)
            for i in self.ranked(g)[g.size - b : g.size - a]
        ]


def mean(values):
    if math.inf in values:
        return math.inf
    return -math.inf if -math.inf in values else Fraction(sum(map(Fraction, values)), len(values))


def keys(problem, scope):
    """Key of each step of each set, as the documentation of the scopes says."""
    sets = problem.sets()
    rungs = [problem.rungs(s) for s in sets]
    steps = [[*pairwise(r)] for r in rungs]
    means = [
        [mean(problem.removed_scores(s, *step)) for step in ss] for s, ss in zip(sets, steps, strict=True)
    ]
    if scope == "global":
        return means
    if scope == "local":
        return [
            [1 - Fraction(b[0] + a[0], 2 * s[0].size) for b, a in ss]
            for s, ss in zip(sets, steps, strict=True)
        ]
    classes = {}
    for i, s in enumerate(sets):
        classes.setdefault(frozenset(problem.alike[g] for g in s), []).append(i)
    found = [[] for _ in sets]
    for members in classes.values():
        total = sum(g.size for i in members if steps[i] for g in sets[i])
        gone = 0
        order = sorted((means[i][j], i, j) for i in members for j in range(len(steps[i])))
        for _, i, j in order:
            before, after = steps[i][j]
            units = sum(before) - sum(after)
            found[i].append(Fraction(2 * gone + units, 2 * total))
            gone += units
    return found


def prefix(problem, scope, limit):
    """Levels of the sets after the fewest steps, taken one by one, that bring the cost within the limit."""
    sets = problem.sets()
    rungs = [problem.rungs(s) for s in sets]
    found = keys(problem, scope)
    order = sorted((key, i, j) for i, ks in enumerate(found) for j, key in enumerate(ks))
    levels = [0] * len(sets)
    for _, i, _ in [*order, (None, None, None)]:
        if problem.cost(kept_at(sets, rungs, levels)) <= limit:
            return levels
        if i is not None:
            levels[i] += 1
    return None


def kept_at(sets, rungs, levels):
    return {
        g: n
        for s, r, level in zip(sets, rungs, levels, strict=True)
        for g, n in zip(s, r[level], strict=True)
    }


def least(problem):
    """Cost with every group at its smallest, whatever the scope."""
    sets = problem.sets()
    rungs = [problem.rungs(s) for s in sets]
    return problem.cost(kept_at(sets, rungs, [len(r) - 1 for r in rungs]))


def dense(problem):
    """Cost with all units."""
    return problem.cost({g: g.size for g in problem.groups})


@st.composite
def problems(draw, clustered=True, constrained=True):
    """Sizes and a seed from Hypothesis; what is in a problem follows from the seed."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=5))
    chance = random.Random(draw(st.integers(0, 2**32)))
    groups = [Group(f"g{i}", n) for i, n in enumerate(sizes)]
    values = [*range(-3, 10), *(chance.random() for _ in range(40)), -math.inf]
    scores = {g: torch.tensor([float(chance.choice(values)) for _ in range(g.size)]) for g in groups}
    layers = [(g, chance.choice([None, *groups]), chance.randint(1, 20)) for g in groups]
    problem = Problem(groups, scores, layers, alike={g: chance.choice("ab") for g in groups})
    if clustered and chance.random() < 0.5:
        problem.clusters = [chance.sample(groups, chance.randint(2, len(groups)))]
    if constrained and chance.random() < 0.5:
        problem.constraints = {g: constraint(chance) for g in groups}
        for cluster in problem.clusters:  # only one may fix the sparsity
            problem.constraints.update(dict.fromkeys(cluster[1:], Constraint()))
    return problem


def constraint(chance):
    if chance.random() < 0.2:
        return Constraint(sparsity=chance.choice([0.0, 0.25, 0.5, 0.9]))
    return Constraint(
        multiple_of=chance.choice([1, 1, 2, 3]),
        minimum=chance.choice([1, 1, 3]),
        maximum_sparsity=chance.choice([1.0, 1.0, 0.5]),
    )
