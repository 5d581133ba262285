"""Every pattern against its definition, entry by entry, and against the published contract."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secateur as sc
from secateur.core.errors import NonFiniteError, PatternError, SparsityError
from secateur.core.topk import count
from secateur.testing import check_pattern

MEMBERS = [
    sc.Unstructured(),
    sc.PerRow(),
    sc.NM(2, 4),
    sc.NM(1, 4),
    sc.NM(3, 4),
    sc.NM(4, 8),
    sc.NM(1, 3),
    sc.Block(1, 1),
    sc.Block(4, 1),
    sc.Block(1, 8),
    sc.Block(2, 2),
    sc.Block(16, 16),
]


@pytest.mark.parametrize("pattern", MEMBERS, ids=repr)
def test_members_meet_the_contract(pattern):
    check_pattern(pattern)
    assert isinstance(pattern, sc.Pattern)
    assert isinstance(hash(pattern), int)


values = st.sampled_from([-math.inf, -2.0, -1.0, 0.0, 0.25, 1.0, 7.0])


@st.composite
def matrices(draw, rows: int = 1, columns: int = 1):
    """Scores [out, in], full of ties, of sizes that are multiples of `rows` and `columns`."""
    out = rows * draw(st.integers(1, 6))
    width = columns * draw(st.integers(1, 6))
    entries = draw(st.lists(values, min_size=out * width, max_size=out * width))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    return torch.tensor(entries, dtype=dtype).view(out, width)


sparsities = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))


def drop_lowest(scored: list[tuple[float, tuple[int, ...]]], remove: int) -> set[tuple[int, ...]]:
    """Positions of the lowest scores; among equal ones, the first in storage order."""
    return {position for _, position in sorted(scored)[:remove]}


def dropped(keep: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(p) for p in (~keep).nonzero().tolist()}


def entries(scores: torch.Tensor) -> list[tuple[float, tuple[int, int]]]:
    out, width = scores.shape
    return [(scores[i, j].item(), (i, j)) for i in range(out) for j in range(width)]


@given(matrices(), sparsities)
def test_unstructured_drops_the_lowest(scores, sparsity):
    expected = drop_lowest(entries(scores), count(sparsity, scores.numel()))
    assert dropped(sc.Unstructured().keep(scores, sparsity)) == expected


@given(matrices(), sparsities)
def test_per_row_drops_the_lowest_of_each_row_and_the_lowest_next_ones(scores, sparsity):
    out, width = scores.shape
    each, over = divmod(count(sparsity, scores.numel()), out)
    rows = [sorted((scores[i, j].item(), j) for j in range(width)) for i in range(out)]
    expected = {(i, j) for i, row in enumerate(rows) for _, j in row[:each]}
    following = sorted((row[each][0], i) for i, row in enumerate(rows)) if over else []
    expected |= {(i, rows[i][each][1]) for _, i in following[:over]}
    assert dropped(sc.PerRow().keep(scores, sparsity)) == expected


def test_per_row_is_exact_among_infinite_scores():
    scores = torch.tensor([[1.0, math.inf, math.inf], [2.0, math.inf, math.inf]])
    assert sc.PerRow().keep(scores, 0.5).tolist() == [[False, False, True], [False, True, True]]


@given(matrices(columns=4), sparsities, st.integers(1, 3))
def test_nm_drops_the_lowest_of_each_group_then_the_lowest_survivors(scores, sparsity, n):
    pattern = sc.NM(n, 4)
    out, width = scores.shape
    remove, forced = count(sparsity, scores.numel()), scores.numel() // 4 * (4 - n)
    if 0 < remove < forced:
        for refused in (pattern.reachable, lambda _, s: pattern.keep(scores, s)):
            with pytest.raises(PatternError, match=f"NM\\({n}, 4\\) removes at least {1 - n / 4}"):
                refused(scores.shape, sparsity)
        return
    expected: set[tuple[int, ...]] = set()
    if remove:
        for i in range(out):
            for g in range(0, width, 4):
                group = [(scores[i, j].item(), (i, j)) for j in range(g, g + 4)]
                expected |= drop_lowest(group, 4 - n)
        survivors = [(s, p) for s, p in entries(scores) if p not in expected]
        expected |= drop_lowest(survivors, remove - forced)
    keep = pattern.keep(scores, sparsity)
    assert dropped(keep) == expected
    assert pattern.reachable(scores.shape, sparsity) == remove / scores.numel()
    if remove:
        assert int(keep.view(-1, 4).count_nonzero(dim=1).max()) <= n


@given(
    st.sampled_from([(2, 3), (3, 1), (1, 4), (2, 2)]).flatmap(
        lambda size: st.tuples(st.just(size), matrices(*size))
    ),
    sparsities,
)
def test_block_drops_the_blocks_of_the_lowest_sums(sized, sparsity):
    (rows, columns), scores = sized
    out, width = scores.shape
    blocks = []
    for i in range(0, out, rows):
        for j in range(0, width, columns):
            inside = [scores[i + a, j + b].item() for a in range(rows) for b in range(columns)]
            living = [s for s in inside if s > -math.inf]  # what is gone already weighs nothing
            blocks.append((sum(living) if living else -math.inf, (i, j)))
    corners = drop_lowest(blocks, count(sparsity, len(blocks)))
    expected = {(i + a, j + b) for i, j in corners for a in range(rows) for b in range(columns)}
    pattern = sc.Block(rows, columns)
    assert dropped(pattern.keep(scores, sparsity)) == expected
    assert pattern.units(scores).tolist() == [s for s, _ in blocks]


def test_one_entry_of_one_group_goes():
    assert sc.NM(3, 4).keep(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), 0.25).tolist() == [
        [True, False, True, True]
    ]


def test_the_groups_of_a_convolution_run_along_the_channels_of_one_tap():
    torch.manual_seed(1)
    conv = torch.nn.Conv2d(8, 4, 3)
    before = conv.weight.detach().clone()
    sc.prune_(conv, sc.Magnitude(), 0.5, pattern=sc.NM(2, 4))
    for o in range(4):
        for y in range(3):
            for x in range(3):
                for c in (0, 4):
                    group = before[o, c : c + 4, y, x].abs()
                    kept = conv.weight[o, c : c + 4, y, x] != 0
                    assert kept.sum() == 2
                    assert group[kept].min() > group[~kept].max()


# ------ what does not fit


@pytest.mark.parametrize(
    ("pattern", "shape", "run", "says"),
    [
        (sc.NM(2, 4), (8, 6), 6, r"multiple of 4, but a\.b has 6"),
        (sc.NM(2, 4), (8, 12), 3, r"multiple of 4, but a\.b has 3"),  # 4 taps of 3 channels
        (sc.Block(4, 1), (6, 8), 8, r"Block\(4, 1\) must divide .* but a\.b has 6 x 8"),
        (sc.Block(1, 4), (8, 12), 3, r"a\.b has 8 x 3"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_with_the_way_out(pattern, shape, run, says):
    with pytest.raises(PatternError, match=says) as caught:
        pattern.check(torch.Size(shape), run, "a.b")
    assert "where=Where(exclude='a.b')" in str(caught.value)


@pytest.mark.parametrize("pattern", [sc.NM(2, 4), sc.Block(1, 4), sc.Block(3, 1)])
def test_groups_never_run_across_rows_even_without_a_check(pattern):
    scores = torch.ones(4, 6)  # 24 entries, but no row divides by 4, nor the 4 rows by 3
    with pytest.raises(PatternError, match="multiples of"):
        pattern.keep(scores, 0.5)
    with pytest.raises(PatternError, match="multiples of"):
        pattern.reachable(scores.shape, 0.5)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 2)])
def test_nm_keeps_some_and_drops_some(n, m):
    with pytest.raises(PatternError, match="0 < n < m"):
        sc.NM(n, m)


@pytest.mark.parametrize(("rows", "columns"), [(0, 1), (1, 0), (-2, 4)])
def test_blocks_have_a_size(rows, columns):
    with pytest.raises(PatternError, match="positive sizes"):
        sc.Block(rows, columns)


@pytest.mark.parametrize("pattern", MEMBERS, ids=repr)
def test_bad_scores_and_sparsities_are_refused(pattern):
    scores = torch.ones(48, 48)
    for sparsity in (-0.1, 1.1, math.nan):
        with pytest.raises(SparsityError):
            pattern.keep(scores, sparsity)
        with pytest.raises(SparsityError):
            pattern.reachable(scores.shape, sparsity)
    scores[17, 5] = math.nan
    for sparsity in (0.0, 0.75, 1.0):
        with pytest.raises(NonFiniteError):
            pattern.keep(scores, sparsity)


# ------ the contract itself: patterns that are wrong in one way each


@dataclass(frozen=True)
class Threshold(sc.Unstructured):
    """The usual bug: everything at or below the k-th score goes, ties and all."""

    def keep(self, scores, sparsity):
        k = count(sparsity, scores.numel())
        return (
            scores > scores.reshape(-1).sort().values[k - 1]
            if k
            else torch.ones_like(scores, dtype=torch.bool)
        )


@dataclass(frozen=True)
class Upside(sc.Unstructured):
    """Removes the largest."""

    def keep(self, scores, sparsity):
        return super().keep(-scores, sparsity)


@dataclass(frozen=True)
class Moody(sc.Unstructured):
    """Breaks ties at random."""

    def keep(self, scores, sparsity):
        order = torch.randperm(scores.numel())
        keep = super().keep(scores.reshape(-1)[order].view(scores.shape), sparsity)
        return torch.empty_like(keep).view(-1).scatter_(0, order, keep.view(-1)).view(scores.shape)


@dataclass(frozen=True)
class Liar(sc.NM):
    """Says that everything can be reached."""

    def reachable(self, shape, sparsity):
        return count(sparsity, shape.numel()) / shape.numel()

    def keep(self, scores, sparsity):
        try:
            return super().keep(scores, sparsity)
        except PatternError:
            return super().keep(scores, 1 - self.n / self.m)


@dataclass(frozen=True)
class Timid(sc.NM):
    """Refuses in `reachable` what `keep` then does."""

    def keep(self, scores, sparsity):
        try:
            return super().keep(scores, sparsity)
        except PatternError:
            return sc.Unstructured().keep(scores, sparsity)


@dataclass(frozen=True)
class Careless(sc.Unstructured):
    """Overwrites the scores."""

    def keep(self, scores, sparsity):
        keep = super().keep(scores, sparsity)
        scores[~keep] = -torch.inf
        return keep


@dataclass(frozen=True)
class Fickle(sc.Unstructured):
    """Not nested: above one half it removes the first entries instead of the lowest."""

    def keep(self, scores, sparsity):
        if sparsity <= 0.5:
            return super().keep(scores, sparsity)
        return super().keep(torch.arange(scores.numel(), dtype=torch.float32).view(scores.shape), sparsity)


@dataclass(frozen=True)
class Torn(sc.Block):
    """Removes the right number of entries, but not in whole blocks."""

    def keep(self, scores, sparsity):
        units = scores.numel() // self.unit
        return sc.Unstructured().keep(scores, count(sparsity, units) / units)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (Threshold(), "removes"),
        (Upside(), "largest score is removed|keeps what less"),
        (Moody(), "two calls differ"),
        (Liar(2, 4), "instead of"),
        (Timid(2, 4), "reachable refuses"),
        (Careless(), "changes the scores"),
        (Fickle(), "keeps what less sparsity removes"),
        (Torn(2, 2), "a unit is kept in part|keeps what less"),
        (sc.Block(7, 1000), "fits none"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else "",
)
def test_the_contract_finds_what_is_wrong(pattern, says):
    with pytest.raises(AssertionError, match=says):
        check_pattern(pattern)
