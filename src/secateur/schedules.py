"""How sparsity grows while a model trains, and at which steps masks change.

Steps count optimizer steps that were taken: step 0 is before the first, step 1 after it. A gradient that an
AMP scaler skips, or one that is only accumulated, is no step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from secateur.core.errors import ScheduleError, SparsityError


@runtime_checkable
class Schedule(Protocol):
    """Sparsity as a function of the step: 0 before `begin`, its last value from `end` on."""

    @property
    def begin(self) -> int:
        """First step at which masks change."""

    @property
    def end(self) -> int:
        """Step from which on the sparsity is the final one."""

    def __call__(self, step: int) -> float:
        """Fraction to be removed after `step` optimizer steps."""


@dataclass(frozen=True)
class Polynomial:
    r"""Sparsity that rises fast at first: :math:`s_f + (s_i - s_f)(1 - p)^{power}`, p the progress in [0, 1].

    Zhu & Gupta 2017, To prune, or not to prune, eq. 1, with their exponent 3 (`cubic`).

    Raises:
        SparsityError: a sparsity outside [0, 1].
        ScheduleError: `begin` is negative or after `end`, or `power` is not above 0.
    """

    initial: float
    final: float
    begin: int
    end: int
    power: float = 3.0

    def __post_init__(self) -> None:
        _check(self.initial, self.final, self.begin, self.end)
        if not self.power > 0:
            raise ScheduleError(f"The power of a schedule is above 0; got {self.power}.")

    def __call__(self, step: int) -> float:
        if step < self.begin:
            return 0.0
        left = (1 - _progress(self, step)) ** self.power
        return self.final + (self.initial - self.final) * left


@dataclass(frozen=True)
class Exponential:
    r"""Density that falls by the same factor a step: :math:`d_i^{1-p} d_f^{p}`, p the progress in [0, 1].

    The schedule of SynFlow (Tanaka et al. 2020) and, over rounds, that of iterative magnitude pruning.

    Raises:
        SparsityError: a sparsity outside [0, 1), from which no factor leads on.
        ScheduleError: `begin` is negative or after `end`.
    """

    initial: float
    final: float
    begin: int
    end: int

    def __post_init__(self) -> None:
        _check(self.initial, self.final, self.begin, self.end)
        if self.initial == 1 or self.final == 1:
            raise SparsityError("An exponential schedule never reaches a sparsity of 1.")

    def __call__(self, step: int) -> float:
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return self.final  # without the rounding of a power
        p = _progress(self, step)
        return float(1 - (1 - self.initial) ** (1 - p) * (1 - self.final) ** p)


@dataclass(frozen=True)
class Cosine:
    r"""Half a cosine, slow at both ends: :math:`s_i + (s_f - s_i)(1 - \cos \pi p) / 2`, p the progress.

    Raises:
        SparsityError: a sparsity outside [0, 1].
        ScheduleError: `begin` is negative or after `end`.
    """

    initial: float
    final: float
    begin: int
    end: int

    def __post_init__(self) -> None:
        _check(self.initial, self.final, self.begin, self.end)

    def __call__(self, step: int) -> float:
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return self.final
        return (
            self.initial + (self.final - self.initial) * (1 - math.cos(math.pi * _progress(self, step))) / 2
        )


def cubic(initial: float, final: float, *, begin: int, end: int) -> Polynomial:
    """The schedule of gradual magnitude pruning; see `Polynomial`.

    >>> schedule = cubic(0.0, 0.8, begin=100, end=300)
    >>> [round(schedule(step), 3) for step in (99, 100, 200, 300, 400)]
    [0.0, 0.0, 0.7, 0.8, 0.8]
    """
    return Polynomial(initial, final, begin, end, 3.0)


def linear(initial: float, final: float, *, begin: int, end: int) -> Polynomial:
    """The same rise at every step."""
    return Polynomial(initial, final, begin, end, 1.0)


def exponential(initial: float, final: float, *, begin: int, end: int) -> Exponential:
    """The same share of what is left at every step; see `Exponential`."""
    return Exponential(initial, final, begin, end)


def cosine(initial: float, final: float, *, begin: int, end: int) -> Cosine:
    """Slow, fast, slow; see `Cosine`."""
    return Cosine(initial, final, begin, end)


def constant(sparsity: float, *, begin: int = 0, end: int | None = None) -> Polynomial:
    """The same sparsity from `begin` on; masks may go on changing until `end`."""
    return Polynomial(sparsity, sparsity, begin, begin if end is None else end, 1.0)


def one_shot(sparsity: float, *, at: int = 0) -> Polynomial:
    """Everything at one step."""
    return Polynomial(0.0, sparsity, at, at, 1.0)


@runtime_checkable
class When(Protocol):
    """At which steps masks change, as a function of the steps since a schedule began."""

    def __call__(self, since: int) -> bool:
        """Whether masks change so many steps after the beginning."""


@dataclass(frozen=True)
class Every:
    """Every so many steps, counted from where a schedule begins.

    >>> [since for since in range(7) if every(3)(since)]
    [0, 3, 6]
    """

    interval: int

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ScheduleError(f"every(n) takes a number of steps, at least 1; got {self.interval}.")

    def __call__(self, since: int) -> bool:
        return since % self.interval == 0


def every(interval: int) -> Every:
    """Every `interval` steps; see `Every`."""
    return Every(interval)


def is_due(schedule: Schedule, when: When, step: int) -> bool:
    """Whether masks change at `step`: as `when` says, and always at the first and the last of a schedule.

    Where an interval does not divide the length of a schedule, the final sparsity is reached all the same.
    """
    if not schedule.begin <= step <= schedule.end:
        return False
    return step in (schedule.begin, schedule.end) or when(step - schedule.begin)


def check_schedule(schedule: object) -> None:
    """Raise `ScheduleError` unless it is a schedule: a number says how much, but not when."""
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            "A schedule says how much is removed at each step, such as "
            f"sc.cubic(0, 0.9, begin=1000, end=9000); got {schedule!r}."
        )


def _progress(schedule: Schedule, step: int) -> float:
    length = schedule.end - schedule.begin
    return 1.0 if length == 0 else min(1.0, (step - schedule.begin) / length)


def _check(initial: float, final: float, begin: int, end: int) -> None:
    for sparsity in (initial, final):
        if not 0 <= sparsity <= 1:
            raise SparsityError(f"A schedule goes between sparsities in [0, 1]; got {sparsity}.")
    if not 0 <= begin <= end:
        raise ScheduleError(
            f"A schedule begins at a step of at least 0 and ends no earlier; got begin={begin}, end={end}."
        )
