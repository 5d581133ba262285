"""Schedules against their formulas, and the promise that the last step is always taken."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import secateur as sc
from secateur.core.errors import ScheduleError, SparsityError
from secateur.schedules import Schedule, is_due

SHAPES = (sc.cubic, sc.linear, sc.exponential, sc.cosine)
spans = st.tuples(st.integers(0, 50), st.integers(0, 200)).map(lambda x: (x[0], x[0] + x[1]))
rising = st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(sorted)


@pytest.mark.parametrize("shape", SHAPES)
@given(span=spans, sparsities=rising)
def test_a_schedule_rises_from_its_first_sparsity_to_its_last_and_stays_there(shape, span, sparsities):
    (begin, end), (low, high) = span, sparsities
    schedule = shape(low, high, begin=begin, end=end)
    assert isinstance(schedule, Schedule)
    values = [schedule(step) for step in range(begin, end + 1)]
    assert values[-1] == high == schedule(end + 1000)  # exactly, without the rounding of a power
    assert end == begin or math.isclose(values[0], low, abs_tol=1e-12)
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))
    assert begin == 0 or schedule(begin - 1) == 0.0


def test_the_cubic_schedule_is_that_of_zhu_and_gupta():
    s_i, s_f, t_0, n, dt = 0.1, 0.9, 20, 8, 10  # their symbols
    schedule = sc.cubic(s_i, s_f, begin=t_0, end=t_0 + n * dt)
    for t in range(t_0, t_0 + n * dt + 1, dt):
        assert schedule(t) == pytest.approx(s_f + (s_i - s_f) * (1 - (t - t_0) / (n * dt)) ** 3)
    assert sc.cubic(0, 0.8, begin=0, end=10)(5) == pytest.approx(0.875 * 0.8)
    # An even exponent written as (p - 1)^k + 1 begins at twice the target.
    assert sc.schedules.Polynomial(0.0, 0.8, 0, 10, power=2)(0) == 0.0


def test_other_shapes_by_their_formulas():
    assert sc.linear(0.2, 0.6, begin=0, end=4)(1) == pytest.approx(0.3)
    assert sc.exponential(0, 0.9, begin=0, end=100)(25) == pytest.approx(1 - 0.1**0.25)
    assert sc.cosine(0, 0.8, begin=0, end=4)(1) == pytest.approx(0.8 * (1 - math.cos(math.pi / 4)) / 2)
    assert [sc.one_shot(0.7, at=3)(t) for t in (2, 3, 4)] == [0.0, 0.7, 0.7]
    assert [sc.constant(0.7, begin=2)(t) for t in (1, 2, 9)] == [0.0, 0.7, 0.7]


@given(span=spans, interval=st.integers(1, 300))
def test_the_first_and_the_last_step_are_due_whatever_the_interval(span, interval):
    """An interval that does not divide the length, or is longer, must not keep the target from being met."""
    begin, end = span
    schedule = sc.linear(0, 0.5, begin=begin, end=end)
    due = [step for step in range(end + 20) if is_due(schedule, sc.every(interval), step)]
    assert due[0] == begin and due[-1] == end
    assert set(due) == {*range(begin, end + 1, interval), end}


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: sc.cubic(0, 1.1, begin=0, end=1), SparsityError),
        (lambda: sc.cubic(math.nan, 0.5, begin=0, end=1), SparsityError),
        (lambda: sc.cubic(0, 0.5, begin=2, end=1), ScheduleError),
        (lambda: sc.cubic(0, 0.5, begin=-1, end=1), ScheduleError),
        (lambda: sc.exponential(0, 1.0, begin=0, end=1), SparsityError),
        (lambda: sc.cosine(0, 0.5, begin=5, end=1), ScheduleError),
        (lambda: sc.schedules.Polynomial(0, 0.5, 0, 1, power=0), ScheduleError),
        (lambda: sc.every(0), ScheduleError),
        (lambda: sc.phases(begin=5, period=0, dense_from=10, sparse_from=20), ScheduleError),
        (lambda: sc.phases(begin=5, period=2, dense_from=5, sparse_from=20), ScheduleError),
        (lambda: sc.Phases((1, 2)), ScheduleError),
        (lambda: sc.Phases((3, 2, 5)), ScheduleError),
    ],
)
def test_what_makes_no_sense_is_refused(make, error):
    with pytest.raises(error):
        make()


@given(begin=st.integers(0, 20), period=st.integers(1, 9), more=st.integers(1, 60), tail=st.integers(1, 20))
def test_phases_take_turns_and_end_sparse(begin, period, more, tail):
    plan = sc.phases(begin=begin, period=period, dense_from=begin + more, sparse_from=begin + more + tail)
    sparse = [sum(step >= s for s in plan.switches) % 2 == 1 for step in range(begin + more + tail + 5)]
    assert not any(sparse[:begin]) and sparse[begin]
    assert not any(sparse[begin + more : begin + more + tail]) and all(sparse[begin + more + tail :])
    for step in range(begin, begin + more):
        assert sparse[step] == ((step - begin) // period % 2 == 0)
