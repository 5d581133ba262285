"""Exact selection of the k smallest scores, over one tensor or many, in little memory.

A threshold comparison prunes too many or too few where scores tie (bfloat16 weights have thousands of
ties). Here the count is a promise: exactly `k` entries go, and among equal scores the first in storage
order (over tensors: in the order given) go first.

Large inputs are never sorted or concatenated. The k-th smallest score is bracketed from a strided
sample, one pass counts what lies below the bracket and gathers what lies inside it, and only those few
are ranked: the selection algorithm of Floyd and Rivest (1975), with the bracket checked by exact counts
and widened if the sample misled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from secateur.core.bulk import CHUNK
from secateur.core.errors import NonFiniteError, SparsityError

# Up to this many entries over all tensors together are ranked outright.
_SMALL = 1 << 14


_SHORT = 16  # entries of a row up to which comparing all pairs is faster than selecting
_VERY_SHORT = 8  # up to which that is faster where the rows lie than between two transpositions


def count(sparsity: float, n: int) -> int:
    """Entries that go from `n` at `sparsity`: `floor(sparsity * n + 1/2)`, the one rounding rule used."""
    if not 0.0 <= sparsity <= 1.0:  # also refuses NaN
        raise SparsityError(f"Sparsity is the fraction removed, between 0 and 1; got {sparsity}.")
    return min(n, math.floor(sparsity * n + 0.5))


@dataclass(frozen=True)
class Cut:
    """Where a ranking is cut: every score below `value` goes, and the first `ties` that equal it."""

    value: float
    ties: int


def find_cut(
    scores: Sequence[Callable[[], Shaped[Tensor, "..."]]], sizes: Sequence[int], k: int
) -> tuple[Cut, list[int]]:
    """Cut of the `k` smallest scores over several tensors, and how many of each tensor go.

    `scores` are functions, so that only one tensor of scores exists at a time; each is called two or
    three times and must return the same `sizes[i]` values each time. `-inf` is allowed and goes first.
    Raises `NonFiniteError` on NaN and `SparsityError` if `k` is negative or above the number of scores.
    """
    if not 0 <= k <= sum(sizes):
        raise SparsityError(f"Cannot remove {k} of {sum(sizes)} entries.")
    lo, hi, dtype = _bracket(scores, sizes, k)
    if k == 0:
        return Cut(-math.inf, 0), [0] * len(sizes)
    while True:
        below, inside = _count_pass(scores, lo, hi, dtype)
        rank = k - sum(below)
        found = sum(t.numel() for t in inside)
        if rank < 1:
            lo, hi = -math.inf, lo
        elif rank > found:
            lo, hi = hi, math.inf
        else:
            break
    value = torch.cat(inside).kthvalue(rank).values.item()
    taken = [b + int((t < value).count_nonzero()) for b, t in zip(below, inside, strict=True)]
    ties = left = k - sum(taken)
    for i, t in enumerate(inside):
        equal = min(left, int((t == value).count_nonzero()))
        taken[i] += equal
        left -= equal
    return Cut(value, ties), taken


def keep_above(scores: Shaped[Tensor, "*shape"], cut: Cut) -> Bool[Tensor, "*shape"]:
    """Mask of the scores that survive `cut`; the first `cut.ties` equal ones in storage order go."""
    scores = scores.contiguous()
    if scores.is_floating_point() and torch.tensor(cut.value, dtype=scores.dtype).item() != cut.value:
        scores = scores.double()  # a comparison would round the value to the narrower type of the scores
    keep = scores > cut.value
    equal = scores == cut.value
    spared = int(equal.count_nonzero()) - cut.ties
    if spared > 0:
        where = equal.view(-1).nonzero().view(-1)
        keep.view(-1)[where[cut.ties :]] = True
    return keep


def keep_largest(scores: Shaped[Tensor, "*shape"], remove: int) -> Bool[Tensor, "*shape"]:
    """Mask that drops exactly the `remove` smallest scores; ties go in storage order, first one first."""
    scores = scores.contiguous()
    cut, _ = find_cut([lambda: scores], [scores.numel()], remove)
    return keep_above(scores, cut)


def keep_largest_rows(scores: Shaped[Tensor, "rows n"], remove: int) -> Bool[Tensor, "rows n"]:
    """Mask that drops exactly the `remove` smallest scores of every row; the first ties go."""
    if not 0 <= remove <= scores.shape[1]:
        raise SparsityError(f"Cannot remove {remove} of {scores.shape[1]} entries of each row.")
    refuse_nan(scores, "A score matrix")
    if remove == 0:
        return torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    if scores.shape[1] <= _VERY_SHORT:
        return _keep_largest_of_few(scores, remove)
    if scores.shape[1] <= _SHORT:
        return keep_largest_columns(scores.T.contiguous(), remove).T.contiguous()
    kth = scores.kthvalue(remove, dim=1, keepdim=True).values
    keep = scores > kth
    short = (keep.count_nonzero(dim=1) < scores.shape[1] - remove).nonzero().view(-1)
    if short.numel():  # rows with more entries equal to the k-th than must go: spare the last of them
        equal = scores[short] == kth[short]
        spare = scores.shape[1] - remove - keep[short].count_nonzero(dim=1)
        from_end = equal.flip(1).cumsum(1).flip(1)
        keep[short] = keep[short] | (equal & (from_end <= spare[:, None]))
    return keep


def keep_largest_columns(scores: Shaped[Tensor, "n columns"], remove: int) -> Bool[Tensor, "n columns"]:
    """Mask that drops exactly the `remove` smallest scores of every column; the first ties go.

    For columns of a few entries, in rows that lie side by side; NaN is not looked for.
    """
    if len(scores) > _SHORT:
        return keep_largest_rows(scores.T.contiguous(), remove).T.contiguous()
    return _ranks_of_columns(scores) >= remove


def _ranks_of_columns(scores: Tensor) -> Tensor:
    """How many entries of its column go before an entry, smaller or equal and earlier ones.

    By comparing all pairs, whole rows at a time.
    """
    n = len(scores)
    ranks = torch.empty(scores.shape, dtype=torch.int8, device=scores.device)
    ranks[0] = n - 1  # as if all that follow were smaller
    for j in range(1, n):
        not_above = (scores[:j] <= scores[j]).view(torch.int8)  # these come before j, so j not before them
        torch.add(not_above.sum(0, dtype=torch.int8), n - 1 - j, out=ranks[j])
        ranks[:j] -= not_above
    return ranks


def _keep_largest_of_few(scores: Tensor, remove: int) -> Tensor:
    """`keep_largest_rows` by comparing all pairs of columns, one pair at a time."""
    columns = scores.unbind(1)
    n = len(columns)
    ranks = torch.empty(n, len(scores), dtype=torch.int8, device=scores.device)
    ranks[0] = n - 1  # as in `_ranks_of_columns`
    for j in range(1, n):
        ranks[j] = n - 1 - j
        for i in range(j):
            not_above = (columns[i] <= columns[j]).view(torch.int8)
            ranks[j] += not_above
            ranks[i] -= not_above
    keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for rank, out in zip(ranks, keep.unbind(1), strict=True):
        torch.ge(rank, remove, out=out)
    return keep


def refuse_nan(scores: Tensor, what: str) -> None:
    """Raise `NonFiniteError` if `scores` holds a NaN; `what` names it in the message."""
    if scores.numel() and bool(torch.isnan(scores.min())):  # min propagates NaN, and reads once
        raise NonFiniteError(
            f"{what} holds NaN: repair it or exclude the layer with where=Where(exclude=...)."
        )


def _bracket(
    scores: Sequence[Callable[[], Tensor]], sizes: Sequence[int], k: int
) -> tuple[float, float, torch.dtype]:
    """An interval that almost surely holds the k-th smallest score, and the type that represents all scores.

    Refuses NaN on the way.
    """
    total = sum(sizes)
    # n^(2/3) samples balance the cost of sorting them with that of ranking what the bracket holds; an
    # odd stride does not fall into step with row lengths.
    stride = 1 if total <= _SMALL else round(total ** (1 / 3)) | 1
    parts: list[Tensor] = []
    dtypes: list[torch.dtype] = []
    for i, make in enumerate(scores):
        flat = make().reshape(-1)
        refuse_nan(flat, f"Score tensor {i}")
        dtypes.append(flat.dtype)
        parts.append(flat[::stride].to("cpu", torch.float32, copy=True))
    dtype = reduce(torch.promote_types, dtypes) if dtypes else torch.float32
    if stride == 1 or not 0 < k < total:
        return -math.inf, math.inf, dtype
    sample = torch.cat(parts).sort().values
    # Five standard errors of a sample quantile, and never less than a few entries.
    n, p = sample.numel(), k / total
    slack = 5 * math.sqrt(n * p * (1 - p)) + 4
    lo, hi = math.floor(n * p - slack), math.ceil(n * p + slack)
    return sample[lo].item() if lo >= 0 else -math.inf, sample[hi].item() if hi < n else math.inf, dtype


def _count_pass(
    scores: Sequence[Callable[[], Tensor]], lo: float, hi: float, dtype: torch.dtype
) -> tuple[list[int], list[Tensor]]:
    """For each tensor: how many scores lie below `lo`, and the scores within [lo, hi]."""
    below: list[int] = []
    inside: list[Tensor] = []
    for make in scores:
        # In a narrower type, the comparison with a number would round the number.
        flat = make().reshape(-1).to(dtype)
        under, found = 0, []
        for chunk in flat.split(CHUNK):
            not_below = chunk >= lo
            under += chunk.numel() - int(not_below.count_nonzero())
            found.append(chunk[not_below.logical_and_(chunk <= hi)])
        below.append(under)
        inside.append(torch.cat(found))
    return below, inside
