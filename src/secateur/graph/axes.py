"""The algebra of dimensions: what each dimension of a tensor is made of.

An *axis* is a type variable with a size. It starts as a leaf and may be refined, once: into another axis
(the two are one), into an ordered product (heads x head_dim), or into an ordered sum (a concatenation). A
*dimension* is a tuple of axes, row major: the last varies fastest. A dimension of size 1 is the empty tuple.

`unify` says that two dimensions are indexed alike. What it cannot express it freezes: a frozen axis is never
cut, and keeps the reason. Sizes strictly fall from an axis to what it is made of, so refinement always ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

Blame = Callable[[str], str]
"""Completes a reason with the place in the user's code."""


class Axis:
    """A type variable of a fixed size; compared by identity."""

    __slots__ = ("factors", "frozen", "link", "size", "terms")

    def __init__(self, size: int, frozen: str | None = None) -> None:
        self.size = size
        self.frozen = frozen
        self.link: Axis | None = None
        self.factors: Dim | None = None
        self.terms: tuple[Dim, ...] | None = None

    def __repr__(self) -> str:
        return f"<{self.size}{' frozen' if self.frozen else ''} #{id(self) % 99991}>"

    @property
    def is_leaf(self) -> bool:
        """Whether nothing is known of what the axis is made of."""
        return self.link is None and self.factors is None and self.terms is None


Dim = tuple[Axis, ...]
EMPTY: Dim = ()


def fresh(size: int, frozen: str | None = None) -> Dim:
    """A dimension of which nothing is known."""
    return () if size == 1 else (Axis(size, frozen),)


def resolve(axis: Axis) -> Axis:
    """The axis that stands for all that were found to be the same."""
    root = axis
    while root.link is not None:
        root = root.link
    while axis is not root:
        axis.link, axis = root, axis.link
    return root


def extent(dim: Iterable[Axis]) -> int:
    """Number of positions."""
    n = 1
    for axis in dim:
        n *= axis.size
    return n


def atoms(dim: Iterable[Axis]) -> list[Axis]:
    """The finest known factors: leaves and sums. Axes of size 1 vanish."""
    out: list[Axis] = []
    for axis in dim:
        root = resolve(axis) if axis.link is not None else axis
        if root.size == 1:
            continue
        if root.factors is not None:
            out.extend(atoms(root.factors))
        elif root.terms is not None:
            terms = terms_of(root)
            out.extend(atoms(terms[0]) if len(terms) == 1 else [root])
        else:
            out.append(root)
    return out


def terms_of(axis: Axis) -> list[Dim]:
    """The parts of a sum, none of which is itself a sum."""
    out: list[Dim] = []
    for term in axis.terms or ():
        found = tuple(atoms(term))
        if len(found) == 1 and found[0].terms is not None:
            out.extend(terms_of(found[0]))
        elif extent(found) > 0:
            out.append(found)
    return out


def leaves(dim: Iterable[Axis]) -> dict[Axis, None]:
    """The leaves that a dimension is made of, in order, each once."""
    found: dict[Axis, None] = {}
    seen: set[Axis] | None = None
    for axis in atoms(dim):
        if axis.terms is None:
            found[axis] = None
        else:
            seen = set() if seen is None else seen
            _gather((axis,), found, seen)
    return found


def _gather(dim: Iterable[Axis], found: dict[Axis, None], seen: set[Axis]) -> None:
    for axis in atoms(dim):
        if axis.terms is None:
            found[axis] = None
        elif axis not in seen:
            seen.add(axis)
            for term in terms_of(axis):
                _gather(term, found, seen)


def frozen_reason(dim: Iterable[Axis]) -> str | None:
    """The reason if nothing of the dimension can be cut, else None. Size 1 counts as frozen."""
    reason = "of size 1"
    found = atoms(dim)
    for leaf in found if all([axis.terms is None for axis in found]) else leaves(found):
        if leaf.frozen is None:
            return None
        reason = leaf.frozen
    return reason


def freeze(dim: Iterable[Axis], reason: str | Callable[[], str]) -> bool:
    """Freeze what is not frozen; whether there was anything. A callable reason is asked only then."""
    free = [leaf for leaf in leaves(dim) if leaf.frozen is None]
    if free:
        text = reason() if callable(reason) else reason
        for leaf in free:
            leaf.frozen = text
    return bool(free)


def concat(parts: Iterable[Dim]) -> Dim:
    """The sum of parts, in order."""
    kept = [tuple(part) for part in parts if extent(part) > 0]
    if not kept:
        return (Axis(0, "empty"),)
    if len(kept) == 1:
        return kept[0]
    axis = Axis(sum(extent(part) for part in kept))
    axis.terms = tuple(kept)  # a part of size 1 has no axis: it is a position that stays
    return (axis,)


def same(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are known to be indexed alike."""
    return atoms(a) == atoms(b)


def unify(a: Dim, b: Dim, blame: Blame) -> bool:
    """Make two dimensions of one size the same; where that is impossible, freeze both. Whether it worked."""
    if a == b or (len(a) == len(b) == 1 and resolve(a[0]) is resolve(b[0])):
        return True
    if extent(a) != extent(b):
        return _give_up(a, b, f"sizes {extent(a)} and {extent(b)} meet", blame)
    for one, other in ((a, b), (b, a)):
        if reason := frozen_reason(one):
            freeze(other, reason)  # what is frozen needs no equation
            return True
    left, right = atoms(a), atoms(b)
    while left and right:
        x, y = left[-1], right[-1]
        if x.size == y.size:
            left.pop()
            right.pop()
            _bind(x, y, blame)
        else:
            if x.size < y.size:
                left, right, x, y = right, left, y, x
            rest = strip_tail(x, y, blame) if x.size % y.size == 0 else None
            if rest is None:
                return _give_up(a, b, f"{x.size} does not split into parts of {y.size}", blame)
            left.pop()
            right.pop()
            left.extend(rest)
        left, right = atoms(left), atoms(right)
    return True


def _give_up(a: Dim, b: Dim, what: str, blame: Blame) -> bool:
    for dim in (a, b):
        freeze(dim, lambda: blame(what))
    return False


def _bind(a: Axis, b: Axis, blame: Blame) -> None:
    """Make two atoms of one size the same."""
    if a is b:
        return
    if a.terms is not None and b.terms is not None:
        _unify_sums(a, b, blame)
        return
    if a.terms is not None:
        a, b = b, a
    if a.frozen:
        freeze((b,), a.frozen)
    a.link = b


def _unify_sums(a: Axis, b: Axis, blame: Blame) -> None:
    """Merge two lists of parts, cutting the longer part at the other's border."""
    left, right = terms_of(a)[::-1], terms_of(b)[::-1]
    merged: list[Dim] = []
    while left and right:
        x, y = left.pop(), right.pop()
        n, m = extent(x), extent(y)
        if n < m:
            y, rest = cut(y, n, blame)
            right.append(rest)
        elif n > m:
            x, rest = cut(x, m, blame)
            left.append(rest)
        unify(x, y, blame)
        merged.append(x)
    a, b = resolve(a), resolve(b)
    if a is not b and a.terms is not None and b.terms is not None:
        b.terms = tuple(merged)
        a.link = b


def strip_tail(a: Axis, b: Axis, blame: Blame) -> Dim | None:
    """Refine the atom `a` into `rest x b` and return the rest; None if a part of a sum does not divide."""
    if a.terms is None:
        rest = Axis(a.size // b.size, a.frozen)
        if a.frozen:
            freeze((b,), a.frozen)
        a.factors = (rest, b)
        return (rest,)
    parts = terms_of(a)
    if any(extent(part) % b.size for part in parts):
        return None
    rests = []
    for part in parts:
        rests.append(fresh(extent(part) // b.size))
        unify(part, (*rests[-1], b), blame)
    if not any(atoms(rest) for rest in rests):
        return (Axis(len(rests), "a fixed number of parts"),) if len(rests) > 1 else ()
    return concat(rests)


def cut(dim: Dim, at: int, blame: Blame) -> tuple[Dim, Dim]:
    """The first `at` positions and the rest. Only the leading factor can be cut, else all is frozen."""
    n = extent(dim)
    if at <= 0:
        return (Axis(0, "empty"),), dim
    if at >= n:
        return dim, (Axis(0, "empty"),)
    if reason := frozen_reason(dim):
        return fresh(at, reason), fresh(n - at, reason)
    first, *inner = atoms(dim)
    if at % extent(inner):
        sizes = " x ".join(str(axis.size) for axis in (first, *inner))
        reason = blame(f"cut at {at} inside a product of {sizes}")
        freeze(dim, reason)
        return fresh(at, reason), fresh(n - at, reason)
    head, tail = _cut_atom(first, at // extent(inner), blame)
    return (*head, *inner), (*tail, *inner)


def _cut_atom(axis: Axis, at: int, blame: Blame) -> tuple[Dim, Dim]:
    if axis.terms is None:
        ends: tuple[Dim, Dim] = (Axis(at, axis.frozen),), (Axis(axis.size - at, axis.frozen),)
        axis.terms = ends
        return ends
    parts = terms_of(axis)
    done = 0
    for i, part in enumerate(parts):
        if at == done:
            return concat(parts[:i]), concat(parts[i:])
        if at < done + extent(part):
            head, tail = cut(part, at - done, blame)
            # Cutting refined the part, and so the sum holds the new border already.
            return concat([*parts[:i], head]), concat([tail, *parts[i + 1 :]])
        done += extent(part)
    raise AssertionError(f"a sum of {axis.size} has no position {at}")


def split(dim: Dim, sizes: Sequence[int], blame: Blame) -> list[Dim]:
    """Consecutive parts of the given sizes."""
    out = []
    for size in sizes:
        head, dim = cut(dim, size, blame)
        out.append(head)
    return out


def split_product(dim: Dim, outer: int, blame: Blame) -> tuple[Dim, Dim]:
    """A dimension as `outer x rest`, both returned."""
    pair = fresh(outer), fresh(extent(dim) // outer)
    unify(dim, (*pair[0], *pair[1]), blame)
    return pair


def regroup(dims: Sequence[Dim], sizes: Sequence[int], blame: Blame) -> list[Dim]:
    """The dimensions of a view of `sizes`: all factors in order, regrouped.

    From the right as far as sizes divide, then from the left; what is left in the middle is frozen, so that
    an odd height and width do not freeze channels.
    """
    factors = [axis for dim in dims for axis in atoms(dim)]
    out: list[Dim | None] = [None] * len(sizes)
    low, high = 0, len(sizes) - 1
    while high >= low:
        taken = _take(factors, sizes[high], blame, from_right=True)
        if taken is None:
            break
        out[high], high = taken, high - 1
    while low <= high:
        taken = _take(factors, sizes[low], blame, from_right=False)
        if taken is None:
            break
        out[low], low = taken, low + 1
    if low <= high:
        reason = frozen_reason(factors) if factors else "of size 1"
        if reason is None:
            got = " x ".join(str(axis.size) for axis in factors)
            reason = blame(f"a view of {got} as {' x '.join(map(str, sizes[low : high + 1]))}")
            freeze(factors, reason)
        for i in range(low, high + 1):
            out[i] = fresh(sizes[i], reason)
    return [dim or () for dim in out]


def _take(factors: list[Axis], need: int, blame: Blame, from_right: bool) -> Dim | None:
    """Remove factors of product `need` from one end of `factors`; None if they do not divide: they stay."""
    taken: list[Axis] = []
    rest = list(factors)
    while need > 1:
        if not rest:
            return None
        axis = rest[-1 if from_right else 0]
        if need % axis.size == 0:
            piece, remains = [axis], list[Axis]()
        elif axis.size % need == 0:
            # The axis holds a border of the view: refine it there.
            low = Axis(need if from_right else axis.size // need)
            outer = strip_tail(axis, low, blame)
            if outer is None:
                factors[:] = atoms(factors)
                return None
            piece, remains = (atoms((low,)), atoms(outer)) if from_right else (atoms(outer), atoms((low,)))
        else:
            factors[:] = atoms(factors)
            return None
        need //= extent(piece)
        if from_right:
            rest[-1:] = remains
            taken[:0] = piece
        else:
            rest[:1] = remains
            taken += piece
    factors[:] = atoms(rest)
    return tuple(taken)


def walk(dim: Dim) -> Iterator[Axis]:
    """Leaves in order of position, one for each time that a leaf occurs."""
    for axis in atoms(dim):
        if axis.terms is None:
            yield axis
        else:
            for term in terms_of(axis):
                yield from walk(term)
