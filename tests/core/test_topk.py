"""Exact selection against a stable sort of everything."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.core.errors import NonFiniteError, SparsityError
from secateur.core.topk import count, find_cut, keep_above, keep_largest, keep_largest_rows

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HUGE = 2_000_003


def expected(scores: torch.Tensor, remove: int) -> torch.Tensor:
    """The definition: sort everything, stably, and drop the first `remove`."""
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    order = np.argsort(scores.reshape(-1).double().numpy(), kind="stable")
    keep[torch.from_numpy(order[:remove].copy())] = False
    return keep.view(scores.shape)


def expected_taken(tensors: list[torch.Tensor], k: int) -> list[int]:
    keep = expected(torch.cat([t.reshape(-1).double() for t in tensors]), k)
    return [int((~part).count_nonzero()) for part in keep.split([t.numel() for t in tensors])]


def taken(tensors: list[torch.Tensor], k: int) -> list[int]:
    return find_cut([lambda t=t: t for t in tensors], [t.numel() for t in tensors], k)[1]


values = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 1e-30, 0.5, 1.0, 3e38, math.inf])
few_valued = st.lists(values, min_size=1, max_size=60)


@given(few_valued, st.data(), st.sampled_from(DTYPES))
def test_keep_largest_is_a_stable_sort(entries, data, dtype):
    scores = torch.tensor(entries, dtype=torch.float64).to(dtype)
    remove = data.draw(st.integers(0, len(entries)))
    assert torch.equal(keep_largest(scores, remove), expected(scores, remove))


@given(st.integers(1, 7), st.integers(1, 9), st.data(), st.sampled_from(DTYPES))
def test_rows_are_stable_sorts_of_their_own(rows, columns, data, dtype):
    entries = data.draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    scores = torch.tensor(entries, dtype=torch.float64).to(dtype).view(rows, columns)
    remove = data.draw(st.integers(0, columns))
    keep = keep_largest_rows(scores, remove)
    assert torch.equal(keep, torch.stack([expected(row, remove) for row in scores]))


@given(st.lists(few_valued, min_size=1, max_size=6), st.data())
def test_the_cut_over_several_tensors_counts_what_goes_from_each(lists, data):
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=len(lists), max_size=len(lists)))
    tensors = [torch.tensor(x, dtype=torch.float64).to(d) for x, d in zip(lists, dtypes, strict=True)]
    k = data.draw(st.integers(0, sum(t.numel() for t in tensors)))
    assert taken(tensors, k) == expected_taken(tensors, k)


def tricky(kind: str, n: int) -> torch.Tensor:
    """Score vectors that mislead a sample taken at a fixed stride, beside honest ones."""
    g = torch.Generator().manual_seed(n)
    stride = round(n ** (1 / 3)) | 1
    match kind:
        case "random":
            return torch.randn(n, generator=g)
        case "constant":
            return torch.full((n,), 0.25)
        case "sorted":
            return torch.arange(n, dtype=torch.float32)
        case "reversed":
            return torch.arange(n, 0, -1, dtype=torch.float32)
        case "three values":
            return torch.randint(0, 3, (n,), generator=g).float()
        case "sample too low":  # every sampled entry is 0, all others are above
            x = torch.rand(n, generator=g) + 1
            x[::stride] = 0
            return x
        case "sample too high":
            x = torch.rand(n, generator=g)
            x[::stride] = 7
            return x
        case "infinities":
            return torch.tensor([-math.inf, 0.0, math.inf])[torch.randint(0, 3, (n,), generator=g)]
        case "beyond float32":
            return torch.randn(n, generator=g).double() * 1e-60
        case "finer than float32":
            return 1 + torch.rand(n, generator=g).double() * 1e-9
    raise AssertionError(kind)


KINDS = [
    "random",
    "constant",
    "sorted",
    "reversed",
    "three values",
    "sample too low",
    "sample too high",
    "infinities",
    "beyond float32",
    "finer than float32",
]


@pytest.mark.parametrize("kind", KINDS)
def test_large_inputs_that_mislead_the_sample(kind):
    n = 40_009  # sampled, and larger than what is ranked outright
    scores = tricky(kind, n)
    sampled = len(range(0, n, round(n ** (1 / 3)) | 1))
    for remove in (0, 1, 2, sampled, sampled + 1, n // 3, n // 2, n - sampled, n - sampled + 1, n - 1, n):
        assert torch.equal(keep_largest(scores, remove), expected(scores, remove)), remove


@pytest.mark.parametrize("kind", ["three values", "sample too low", "sample too high"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_millions_of_entries_over_many_chunks(kind, dtype):
    scores = tricky(kind, HUGE).to(dtype)
    order = torch.sort(scores.float(), stable=True).indices
    for remove in (1_000, HUGE // 2, HUGE - 5):
        keep = torch.ones(HUGE, dtype=torch.bool)
        keep[order[:remove]] = False
        assert torch.equal(keep_largest(scores, remove), keep), remove


def test_the_cut_over_large_tensors_of_unlike_sizes_and_scales():
    tensors = [tricky(kind, n) for kind, n in zip(KINDS, range(9_001, 10_000, 100), strict=True)]
    tensors += [torch.zeros(1), torch.full((3, 5), -math.inf), torch.zeros(0)]
    total = sum(t.numel() for t in tensors)
    for k in (0, 1, 500, total // 4, total // 2, total - 300, total):
        assert taken(tensors, k) == expected_taken(tensors, k), k


def test_types_are_compared_by_value():
    # In bfloat16 1 + 1e-3 is 1, in float32 1 + 1e-9 is: a comparison in the narrower type calls them equal.
    tensors = [
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.tensor([1.0 + 1e-9, 1.0 - 1e-9], dtype=torch.float64),
        torch.tensor([1.0 + 1e-3], dtype=torch.float32),
    ]
    for k in range(6):
        assert taken(tensors, k) == expected_taken(tensors, k), k


@given(st.lists(few_valued, min_size=1, max_size=4), st.data())
def test_one_cut_applied_to_each_tensor_is_the_global_selection(lists, data):
    tensors = [torch.tensor(x, dtype=torch.float32) for x in lists]
    k = data.draw(st.integers(0, sum(t.numel() for t in tensors)))
    cut, found = find_cut([lambda t=t: t for t in tensors], [t.numel() for t in tensors], k)
    ties = cut.ties
    for t, n in zip(tensors, found, strict=True):
        # The ties of the cut are spent in the order of the tensors.
        here = min(ties, int((t == cut.value).count_nonzero()))
        keep = keep_above(t, type(cut)(cut.value, here))
        assert int((~keep).count_nonzero()) == n
        assert torch.equal(keep, expected(t, n))
        ties -= here
    assert ties == 0


def test_a_cut_finer_than_the_scores_is_not_rounded_to_them():
    cut, _ = find_cut([lambda: torch.tensor([1.0 + 1e-9, 3.0], dtype=torch.float64)], [2], 1)
    assert keep_above(torch.tensor([1.0, 2.0]), cut).tolist() == [False, True]
    assert keep_above(torch.tensor([1.0, 2.0]), type(cut)(1.0 - 1e-9, 1)).tolist() == [True, True]


def test_the_layout_in_memory_does_not_matter():
    scores = torch.randint(0, 3, (30, 20)).float()
    for remove in (1, 200, 599):
        assert torch.equal(keep_largest(scores.t().contiguous().t(), remove), keep_largest(scores, remove))
        cut, _ = find_cut([lambda: scores.t()], [600], remove)
        assert torch.equal(keep_above(scores.t(), cut), expected(scores.t(), remove))
    for remove in (1, 10, 19):
        strided = keep_largest_rows(scores.t().contiguous().t(), remove)
        assert torch.equal(strided, keep_largest_rows(scores, remove))


@given(st.fractions(0, 1, max_denominator=1000), st.integers(0, 10**6))
def test_count_rounds_half_up(sparsity, n):
    exact = math.floor(sparsity * n + Fraction(1, 2))
    got = count(float(sparsity), n)
    # A float may fall on the other side of a half that its fraction stands for.
    assert got == exact or (2 * sparsity * n % 2 == 1 and got == exact - 1)


@given(st.integers(1, 10**12), st.data())
def test_a_count_survives_the_way_through_a_sparsity(n, data):
    removed = data.draw(st.integers(0, n))
    assert count(removed / n, n) == removed


@pytest.mark.parametrize(("n", "sparsity", "want"), [(2, 0.25, 1), (3, 0.5, 2), (10, 0.04, 0), (7, 1.0, 7)])
def test_count_of_known_cases(n, sparsity, want):
    assert count(sparsity, n) == want


@pytest.mark.parametrize("sparsity", [-1e-9, 1.0000001, math.nan, math.inf, -math.inf])
def test_a_sparsity_that_is_no_fraction_is_refused(sparsity):
    with pytest.raises(SparsityError, match="between 0 and 1"):
        count(sparsity, 10)


@pytest.mark.parametrize("remove", [-1, 5])
def test_more_than_there_is_cannot_go(remove):
    with pytest.raises(SparsityError, match=f"Cannot remove {remove} of 4 entries"):
        keep_largest(torch.ones(4), remove)
    with pytest.raises(SparsityError, match=f"Cannot remove {remove} of 4 entries of each row"):
        keep_largest_rows(torch.ones(2, 4), remove)


@pytest.mark.parametrize("n", [4, 50_000])
def test_nan_is_refused_wherever_it_lies(n):
    for where in (0, n // 2, n - 1):
        scores = torch.zeros(n)
        scores[where] = math.nan
        for remove in (0, 1, n):
            with pytest.raises(NonFiniteError, match="NaN"):
                keep_largest(scores, remove)
            with pytest.raises(NonFiniteError, match="NaN"):
                keep_largest_rows(scores.view(2, -1), min(remove, n // 2))
