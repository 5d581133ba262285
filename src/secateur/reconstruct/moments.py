"""Means and covariances of a layer's inputs, summed in float64 over blocks of tokens.

Shapes: T tokens (or positions) of a block, I inputs of a row of the layer's matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.errors import StatsError


@dataclass(frozen=True, eq=False)
class Moments:
    r"""First and second moments of the inputs $x$ of a layer's matrix.

    Attributes:
        count: tokens, over all calls; positions of a convolution.
        mean: $E[x]$, float64 `[inputs]`.
        covariance: $E[(x - E[x]) (x - E[x])^T]$, float64 `[inputs, inputs]`.
    """

    count: int
    mean: Float[Tensor, " inputs"]
    covariance: Float[Tensor, "inputs inputs"]

    @property
    def gram(self) -> Float[Tensor, "inputs inputs"]:
        """`E[x x^T]`."""
        return self.covariance + torch.outer(self.mean, self.mean)

    @classmethod
    def of(cls, x: Float[Tensor, "tokens inputs"]) -> Moments:
        """Moments of explicit rows."""
        sums = Covariance()
        sums.add(x, x)
        return sums.moments()


@dataclass(frozen=True, eq=False)
class CrossMoments:
    r"""Moments of the inputs $x$ of a layer in the dense model and $z$ in the pruned one, token by token.

    Attributes:
        dense: of $x$.
        pruned: of $z$.
        cross: $E[(x - E[x]) (z - E[z])^T]$, float64 `[inputs, inputs]`.
    """

    dense: Moments
    pruned: Moments
    cross: Float[Tensor, "inputs inputs"]

    @classmethod
    def same(cls, moments: Moments) -> CrossMoments:
        """A pruned model whose inputs are still those of the dense one."""
        return cls(moments, moments, moments.covariance)

    @classmethod
    def of(cls, x: Float[Tensor, "tokens inputs"], z: Float[Tensor, "tokens inputs"]) -> CrossMoments:
        """Moments of explicit rows."""
        sums = Joint()
        sums.add(x, z)
        return sums.moments()


class Covariance:
    """Running means and centred sum of products of two streams of rows.

    Blocks are centred by their own means before they are merged, so that a large mean costs no digits.

    Reference: Chan, Golub and LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample
    variances.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean_a = self.mean_b = self.scatter = torch.zeros(())

    def add(self, a: Float[Tensor, "T I"], b: Float[Tensor, "T J"]) -> None:
        """Take in a block of rows, `a` and `b` token by token; both may be the same tensor."""
        n, same = len(a), a is b
        if n == 0:
            return
        a_mean = a.double().mean(0)
        a = a.double() - a_mean
        b_mean = a_mean if same else b.double().mean(0)
        b = a if same else b.double() - b_mean
        if self.count == 0:
            self.mean_a, self.mean_b, self.scatter = a_mean, b_mean, a.T @ b
        else:
            shift_a, shift_b = a_mean - self.mean_a, b_mean - self.mean_b
            total = self.count + n
            self.scatter.addmm_(a.T, b).addr_(shift_a, shift_b, alpha=self.count * n / total)
            self.mean_a = self.mean_a + shift_a * (n / total)
            self.mean_b = self.mean_b + shift_b * (n / total)
        self.count += n

    def plus(self, other: Covariance) -> Covariance:
        """The sums over the rows of both."""
        if not self.count or not other.count:
            return self if self.count else other
        total, both = self.count + other.count, Covariance()
        shift_a, shift_b = other.mean_a - self.mean_a, other.mean_b - self.mean_b
        both.count = total
        both.mean_a = self.mean_a + shift_a * (other.count / total)
        both.mean_b = self.mean_b + shift_b * (other.count / total)
        both.scatter = (self.scatter + other.scatter).addr_(
            shift_a, shift_b, alpha=self.count * other.count / total
        )
        return both

    @property
    def value(self) -> Tensor:
        """The covariance, over the count itself."""
        if self.count == 0:
            raise StatsError("Moments were read before any token was measured.")
        return self.scatter / self.count

    def moments(self) -> Moments:
        """The moments of a stream that was added with itself."""
        return Moments(self.count, self.mean_a, self.value)


class Joint:
    """Running moments of the inputs of a layer in two models."""

    def __init__(self) -> None:
        self.dense, self.pruned, self.cross = Covariance(), Covariance(), Covariance()

    def add(self, x: Float[Tensor, "T I"], z: Float[Tensor, "T I"]) -> None:
        """Take in a block of rows, token by token."""
        self.dense.add(x, x)
        self.pruned.add(z, z)
        self.cross.add(x, z)

    @property
    def count(self) -> int:
        """Rows so far."""
        return self.dense.count

    def plus(self, other: Joint) -> Joint:
        """The sums over the rows of both."""
        both = Joint()
        both.dense, both.pruned = self.dense.plus(other.dense), self.pruned.plus(other.pruned)
        both.cross = self.cross.plus(other.cross)
        return both

    def moments(self) -> CrossMoments:
        """The moments so far."""
        return CrossMoments(self.dense.moments(), self.pruned.moments(), self.cross.value)


M = TypeVar("M", Moments, CrossMoments)


@dataclass(frozen=True, eq=False)
class Halves(Generic[M]):
    """Moments over all rows, and over two halves of them, of which one can tell what fits the other only.

    Attributes:
        whole: over all rows.
        parts: over the halves; None if one of them has no rows.
    """

    whole: M
    parts: tuple[M, M] | None = None


class Splitting:
    """Running moments of two halves of the rows: batches in turn, or halves of each block of a lone batch."""

    def __init__(self, make: Callable[[], Covariance | Joint], in_turn: bool) -> None:
        self._sums: tuple[Any, Any] = make(), make()
        self._in_turn = in_turn

    def add(self, i: int, a: Float[Tensor, "T I"], b: Float[Tensor, "T I"]) -> None:
        """Take in a block of rows of batch `i`."""
        if self._in_turn:
            self._sums[i % 2].add(a, b)
            return
        middle, same = (len(a) + 1) // 2, a is b
        for sums, part in zip(self._sums, (slice(middle), slice(middle, None)), strict=True):
            one = a[part]
            sums.add(one, one if same else b[part])

    @property
    def count(self) -> int:
        """Rows so far."""
        return int(self._sums[0].count + self._sums[1].count)

    def moments(self) -> Halves[Any]:
        """The moments so far."""
        first, second = self._sums
        parts = (first.moments(), second.moments()) if first.count and second.count else None
        return Halves(first.plus(second).moments(), parts)
