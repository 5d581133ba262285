"""What a surgery does to every stored tensor and every integer that the code keeps, before it is done."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from secateur.callsites import CallSite, Reason, locate
from secateur.graph import axes
from secateur.graph.axes import Axis, Dim
from secateur.graph.ints import Attr, Expr, Guard, Size, evaluate, parts
from secateur.graph.sizes import Argument, Tie
from secateur.graph.types import Place

_SEARCH = 20_000  # largest attribute that is searched for by trying values


@dataclass(frozen=True)
class Problem:
    """A reason why sizes cannot change as asked, and the axes that meet there."""

    text: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Repair:
    """A size argument of one call in the source, to become -1 (None) or the input's own size."""

    place: Place
    call: str
    arguments: tuple[tuple[int, int | None], ...]


@dataclass
class Solution:
    """New values of integers, calls to repair, and what stands in the way."""

    attrs: dict[Attr, int] = field(default_factory=dict)
    repairs: list[Repair] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


class Sizes:
    """Sizes of dimensions when only some positions of some leaves are kept."""

    def __init__(self, kept: Mapping[Axis, int]) -> None:
        self.kept = kept
        self._cache: dict[Axis, int] = {}

    def __call__(self, dim: Iterable[Axis]) -> int:
        n = 1
        for axis in axes.atoms(dim):
            if axis.terms is None:
                n *= self.kept.get(axis, axis.size)
                continue
            if axis not in self._cache:
                self._cache[axis] = sum(self(term) for term in axes.terms_of(axis))
            n *= self._cache[axis]
        return n


def keep_mask(dim: Dim, masks: Mapping[Axis, Tensor], cache: dict[Axis, Tensor]) -> Tensor:
    """Which positions of `dim` survive: all of its factors do. Bool `[extent]`."""
    out = torch.ones(1, dtype=torch.bool)
    for axis in axes.atoms(dim):
        own = cache.get(axis)
        if own is None:
            if axis.terms is None:
                own = masks.get(axis)
                own = torch.ones(axis.size, dtype=torch.bool) if own is None else own
            else:
                own = torch.cat([keep_mask(term, masks, cache) for term in axes.terms_of(axis)])
            cache[axis] = own
        out = (out[:, None] & own[None]).reshape(-1)
    return out


class Constraints:
    """The ties, comparisons and numbers of a trace, found quickly by the axes and attributes in them."""

    def __init__(
        self,
        ties: list[Tie],
        guards: Iterable[Guard],
        numbers: Iterable[tuple[str, Expr, Place]],
        values: Mapping[Attr, int],
        aligned: Iterable[tuple[Dim, int, str]] = (),
        calls: Mapping[object, Collection[Argument]] = MappingProxyType({}),
    ) -> None:
        self.values = values
        self.calls = calls
        self._sites: dict[object, CallSite | Reason] = {}
        self.ties = _distinct(ties)
        self.guards = [g for g in guards if not _frozen_expr(g.left) or not _frozen_expr(g.right)]
        self.numbers = list(numbers)
        self.aligned = list(aligned)
        self._ties = _index((t.expr, t.dim) for t in self.ties)
        self._guards = _index((g.left, g.right) for g in self.guards)
        self._aligned = _index((dim,) for dim, _, _ in self.aligned)
        self._numbers = _index((expr,) for _, expr, _ in self.numbers)

    def solve(self, kept: Mapping[Axis, int]) -> Solution:
        """New attributes that make every tie hold for the sizes `kept`."""
        return _Solver(self, Sizes(kept)).run(kept)

    def attributes(self) -> set[Attr]:
        """All attributes that occur."""
        return {
            key
            for index in (self._ties, self._guards, self._numbers)
            for key in index
            if isinstance(key, Attr)
        }

    def repairable(self, tie: Tie) -> bool:
        """Whether the call's source could say -1 or the input's own size instead."""
        if not tie.argument.repairable or tie.place.code is None:
            return False
        key = _exactly(tie.place)
        if key not in self._sites:
            self._sites[key] = locate(tie.place.code, tie.place.instruction)
        site = self._sites[key]
        return isinstance(site, CallSite) and tie.argument.index < len(site.sizes)

    def clusters(self) -> list[set[Axis]]:
        """Leaves that one number sets together: their shares must be the same."""
        by_expr: dict[object, list[Dim]] = defaultdict(list)
        for tie in self.ties:
            if not isinstance(tie.expr, int) and not self.repairable(tie):
                by_expr[_key(tie.expr)].append(tie.dim)
        union = _Union()
        for found in by_expr.values():
            sets = [set(axes.leaves(dim)) for dim in found]
            first = sets[0]
            for other in sets[1:]:
                union.join([leaf for leaf in first ^ other if leaf.frozen is None])
        return union.sets()


class _Union:
    def __init__(self) -> None:
        self.parent: dict[Axis, Axis] = {}

    def find(self, a: Axis) -> Axis:
        self.parent.setdefault(a, a)
        while self.parent[a] is not a:
            a = self.parent[a]
        return a

    def join(self, group: list[Axis]) -> None:
        for a in group[1:]:
            self.parent[self.find(a)] = self.find(group[0])

    def sets(self) -> list[set[Axis]]:
        found: dict[Axis, set[Axis]] = defaultdict(set)
        for a in self.parent:
            found[self.find(a)].add(a)
        return [s for s in found.values() if len(s) > 1]


def _frozen_expr(expr: Expr) -> bool:
    return not any(isinstance(p, Attr) or axes.frozen_reason(p.dim) is None for p in parts(expr))


def _key(expr: Expr) -> object:
    if isinstance(expr, int | Attr):
        return expr
    if isinstance(expr, Size):
        return ("size", tuple(axes.atoms(expr.dim)))
    return (expr.name, *(_key(a) for a in expr.args))


def _distinct(ties: list[Tie]) -> list[Tie]:
    """Each tie once for a place in the code, without those that say nothing."""
    found: dict[object, Tie] = {}
    for tie in ties:
        if (
            _frozen_expr(tie.expr)
            and axes.frozen_reason(tie.dim) is not None
            and not isinstance(tie.expr, Attr)
        ):
            continue
        if isinstance(tie.expr, Size) and axes.same(tie.expr.dim, tie.dim):
            continue
        key = (
            tuple(axes.atoms(tie.dim)),
            _key(tie.expr),
            tie.argument,
            tie.place.code,
            tie.place.instruction,
        )
        found.setdefault(key, tie)
    return list(found.values())


def _index(rows: Iterable[tuple[Expr | Dim, ...]]) -> dict[Axis | Attr, list[int]]:
    """Numbers of the rows in which a leaf or an attribute occurs."""
    found: dict[Axis | Attr, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        keys: dict[Axis | Attr, None] = {}
        for thing in row:
            if isinstance(thing, tuple):
                keys |= axes.leaves(thing)  # type: ignore[arg-type]
                continue
            for part in parts(thing):
                if isinstance(part, Attr):
                    keys[part] = None
                else:
                    keys |= axes.leaves(part.dim)  # type: ignore[arg-type]
        for key in keys:
            found[key].append(i)
    return found


def _axes_of(*things: Expr | Dim) -> tuple[Axis, ...]:
    found: dict[Axis, None] = {}
    for thing in things:
        if isinstance(thing, tuple):
            found |= axes.leaves(thing)
        else:
            for part in parts(thing):
                if isinstance(part, Size):
                    found |= axes.leaves(part.dim)
    return tuple(found)


class _Solver:
    """One solution. Work starts at the axes that shrink and follows the attributes that change."""

    def __init__(self, constraints: Constraints, size: Sizes) -> None:
        self.c, self.size = constraints, size
        self.out = Solution()
        self.tied: set[Attr] = set()
        self.touched: dict[int, None] = {}

    def attr(self, a: Attr) -> int:
        return self.out.attrs.get(a, self.c.values[a])

    def value(self, expr: Expr) -> int | None:
        return evaluate(expr, self.size, self.attr)

    def run(self, kept: Mapping[Axis, int]) -> Solution:
        changed: list[Axis | Attr] = [a for a, n in kept.items() if n != a.size]
        seen: set[Axis | Attr] = set(changed)
        while changed:
            rows = {i: None for key in changed for i in self.c._ties.get(key, ())}
            self.touched |= rows
            new: list[Attr] = []
            for i in [i for i in rows if isinstance(self.c.ties[i].expr, Attr)]:
                new += self._assign(self.c.ties[i])
            for i in [i for i in rows if not isinstance(self.c.ties[i].expr, Attr)]:
                new += self._search(self.c.ties[i])
            changed = [a for a in new if a not in seen]
            seen |= set(changed)
        failing = [t for i in self.touched if not self._holds(t := self.c.ties[i])]
        self._repair(failing)
        self._guards(seen)
        for i in {i: None for key in seen for i in self.c._aligned.get(key, ())}:
            dim, multiple, why = self.c.aligned[i]
            if self.size(dim) % multiple:
                self.out.problems.append(Problem(why, _axes_of(dim)))
        self._numbers(seen | set(self.out.attrs))
        self.out.attrs = {a: n for a, n in self.out.attrs.items() if n != self.c.values[a]}
        return self.out

    def _holds(self, tie: Tie) -> bool:
        return self.value(tie.expr) == self.size(tie.dim)

    def _assign(self, tie: Tie) -> list[Attr]:
        """A dimension that an attribute gives gives the attribute."""
        assert isinstance(tie.expr, Attr)
        n = self.size(tie.dim)
        if tie.expr in self.tied or n == self.c.values[tie.expr]:
            self.tied.add(tie.expr)
            return []
        self.tied.add(tie.expr)
        self.out.attrs[tie.expr] = n
        return [tie.expr]

    def _search(self, tie: Tie) -> list[Attr]:
        """An attribute in an expression that no other tie gives is looked for."""
        if self._holds(tie):
            return []
        free = {p: None for p in parts(tie.expr) if isinstance(p, Attr) and not self._is_tied(p)}
        target = self.size(tie.dim)
        before = max(1, axes.extent(tie.dim))
        for a in free:
            old = self.c.values[a]
            likely = old * target // before  # of several numbers that serve, the proportional one
            for n in sorted(range(1, min(old, _SEARCH) + 1), key=lambda n: (n != likely, abs(n - old))):
                if evaluate(tie.expr, self.size, lambda b, n=n, a=a: n if b == a else self.attr(b)) == target:  # type: ignore[misc]
                    self.out.attrs[a] = n
                    self.tied.add(a)
                    return [a]
        return []

    def _is_tied(self, a: Attr) -> bool:
        """Whether some tie gives the attribute directly."""
        return a in self.tied or any(self.c.ties[i].expr == a for i in self.c._ties.get(a, ()))

    def _repair(self, failing: list[Tie]) -> None:
        """Size arguments that fail may become -1 or the input's own size, where the call allows it."""
        calls: dict[Place, list[Tie]] = defaultdict(list)
        for tie in failing:
            if self.c.repairable(tie):
                calls[_exactly(tie.place)].append(tie)  # type: ignore[index]
            else:
                self.out.problems.append(_problem(tie, self.c))
        for ties in calls.values():
            # One place can run often, with other tensors: what is written there must be true each time.
            ran = [*self.c.calls.get(_exactly(ties[0].place), ()), *(t.argument for t in ties)]
            arguments = {
                j: {a.same_as for a in ran if a.index == j} for j in {t.argument.index for t in ties}
            }
            open_ = [j for j, s in arguments.items() if len(s) > 1 or None in s]
            if len(open_) > 1 or (open_ and any(a.inferred for a in ran)):
                self.out.problems += [_problem(tie, self.c) for tie in ties]
                continue
            chosen = tuple((j, None if j in open_ else next(iter(s))) for j, s in sorted(arguments.items()))
            self.out.repairs.append(Repair(ties[0].place, ties[0].argument.call, chosen))

    def _guards(self, seen: set[Axis | Attr]) -> None:
        """Comparisons come out as they did, or the code would take another way."""
        rows = {i: None for key in (*seen, *self.out.attrs) for i in self.c._guards.get(key, ())}
        for i in rows:
            guard = self.c.guards[i]
            if not self._flips(guard):
                continue
            if not self._follow(guard):
                what = f"{guard.left} {_SIGNS[guard.name]} {guard.right}"
                self.out.problems.append(
                    Problem(
                        f"the code compares {what}, and would take another way",
                        _axes_of(guard.left, guard.right),
                    )
                )

    def _flips(self, guard: Guard) -> bool:
        a, b = self.value(guard.left), self.value(guard.right)
        return a is not None and b is not None and getattr(int, guard.name)(a, b) != guard.outcome

    def _follow(self, guard: Guard) -> bool:
        """Set an attribute that no tie gives so that a comparison comes out as before."""
        for mine, other in ((guard.left, guard.right), (guard.right, guard.left)):
            if not isinstance(mine, Attr) or self._is_tied(mine):
                continue
            before = evaluate(other, axes.extent, lambda a: self.c.values[a])
            now = self.value(other)
            if before is None or now is None:
                continue
            saved = self.out.attrs.get(mine)
            self.out.attrs[mine] = max(1, self.c.values[mine] * now // max(1, before))
            if not self._flips(guard):
                return True
            if saved is None:
                del self.out.attrs[mine]
            else:
                self.out.attrs[mine] = saved
        return False

    def _numbers(self, seen: set[Axis | Attr]) -> None:
        """A size that the code uses as a number would be another number."""
        for i in {i: None for key in seen for i in self.c._numbers.get(key, ())}:
            what, expr, place = self.c.numbers[i]
            if self.value(expr) != evaluate(expr, axes.extent, lambda a: self.c.values[a]):
                self.out.problems.append(Problem(f"{what} is used as a number at {place}", _axes_of(expr)))


_SIGNS = {"__eq__": "==", "__ne__": "!=", "__lt__": "<", "__le__": "<=", "__gt__": ">", "__ge__": ">="}


def _exactly(place: Place) -> object:
    return (place.code, place.instruction)


def _problem(tie: Tie, c: Constraints) -> Problem:
    same = [t for t in c.ties if t.expr == tie.expr and t is not tie] if isinstance(tie.expr, Attr) else []
    where = f"{tie.argument.call} at {tie.place}"
    text = (
        f"{tie.expr} gives the size of {where}"
        if not isinstance(tie.expr, int)
        else f"the number {tie.expr} stands in {where}"
    )
    if same:
        text += f" and of {same[0].argument.call} at {same[0].place}"
    return Problem(text, _axes_of(tie.dim, tie.expr, *(t.dim for t in same)))


def common_step(sizes: Iterable[int]) -> int:
    """The largest number of equal shares that all sizes can be cut into."""
    return math.gcd(*sizes)
