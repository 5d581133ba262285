"""Budgets: what they allow, and what they refuse."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.budget import Budget, format_amount, targets
from secateur.core.errors import BudgetError

FRACTIONS = [Budget.params, Budget.macs, Budget.memory, Budget.seconds]
name_of = {make: make.__name__ for make in FRACTIONS}.get


@pytest.mark.parametrize("make", FRACTIONS, ids=name_of)
def test_a_fraction_of_the_dense_model_may_remain(make):
    assert make(0.25).limit(4096) == 1024
    assert make(1).limit(4096) == 4096


@pytest.mark.parametrize("make", FRACTIONS, ids=name_of)
def test_an_absolute_limit_does_not_depend_on_the_dense_model(make):
    assert make(at_most=300).limit(4096) == make(at_most=300).limit(100) == 300


def test_sparsity_is_the_fraction_removed():
    assert Budget.sparsity(0.75).limit(4096) == 1024
    assert Budget.sparsity(0).limit(7) == 7
    assert Budget.sparsity(1).limit(7) == 0


@given(st.integers(1, 100), st.integers(1, 10**12))
def test_percentages_of_counts_are_exact(percent, hundreds):
    """In floating point 0.29 * 100 is below 29, which would forbid the 29th."""
    assert Budget.macs(percent / 100).limit(100 * hundreds) == percent * hundreds
    assert Budget.sparsity(percent / 100).limit(100 * hundreds) == (100 - percent) * hundreds


@given(st.floats(1e-3, 1), st.integers(1, 10**6))
def test_a_limit_that_is_no_whole_number_is_not_rounded(fraction, dense):
    assert Budget.params(fraction).limit(dense) == pytest.approx(fraction * dense, rel=1e-12, abs=0)
    assert math.floor(Budget.params(1 / 3).limit(100)) == 33


@pytest.mark.parametrize("make", FRACTIONS, ids=name_of)
@pytest.mark.parametrize("fraction", [0, -0.5, 1.01, 50, math.nan, math.inf])
def test_fractions_outside_their_range_are_refused(make, fraction):
    with pytest.raises(BudgetError, match=rf"Budget\.{make.__name__} takes the fraction .* got {fraction}"):
        make(fraction)


@pytest.mark.parametrize("make", FRACTIONS, ids=name_of)
@pytest.mark.parametrize("at_most", [0, -3, math.nan, math.inf])
def test_limits_are_positive_numbers(make, at_most):
    with pytest.raises(BudgetError, match=r"at_most=\.\.\.\) is a positive number of"):
        make(at_most=at_most)


@pytest.mark.parametrize("make", FRACTIONS, ids=name_of)
def test_one_of_fraction_and_limit_is_given(make):
    with pytest.raises(BudgetError, match="got neither"):
        make()
    with pytest.raises(BudgetError, match="got both"):
        make(0.5, at_most=10)


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan])
def test_sparsities_outside_their_range_are_refused(sparsity):
    with pytest.raises(BudgetError, match="between 0 and 1"):
        Budget.sparsity(sparsity)
    with pytest.raises(BudgetError, match="fraction removed"):
        Budget("sparsity", at_most=10)


def test_true_is_no_fraction():
    with pytest.raises(BudgetError):
        Budget.macs(True)


@pytest.mark.parametrize("settings", [{"batch": 0}, {"context": -1}])
def test_a_cache_needs_a_sequence(settings):
    with pytest.raises(BudgetError, match="KV cache"):
        Budget.memory(0.5, **settings)


@pytest.mark.parametrize("dense", [0, -1, math.nan, math.inf])
def test_the_dense_cost_is_a_positive_number(dense):
    with pytest.raises(BudgetError, match="dense model's MACs"):
        Budget.macs(0.5).limit(dense)


def test_budgets_in_words():
    assert Budget.params(0.5).describe() == "at most 50 % of the dense model's parameters"
    assert Budget.macs(at_most=2e9).describe() == "at most 2,000,000,000 MACs"
    assert Budget.seconds(at_most=0.0125).describe() == "at most 0.0125 seconds"
    assert Budget.sparsity(0.3).describe() == "30 % of the prunable weights removed"
    assert Budget.memory(0.5, batch=8, context=4096).describe() == (
        "at most 50 % of the dense model's bytes (KV cache at batch 8, context 4096)"
    )
    assert format_amount(1e15) == "1,000,000,000,000,000"


@pytest.mark.parametrize(
    "budget",
    [
        Budget.params(0.5),
        Budget.macs(at_most=10),
        Budget.memory(0.1, batch=2, context=3),
        Budget.seconds(1),
        Budget.sparsity(0.9),
    ],
    ids=repr,
)
def test_budgets_print_as_they_are_made(budget):
    assert eval(repr(budget), {"Budget": Budget}) == budget
    assert hash(budget) == hash(eval(repr(budget), {"Budget": Budget}))


@given(st.floats(1, 1e6), st.floats(0.01, 0.99), st.integers(1, 20))
def test_steps_remove_the_same_fraction_each(dense, fraction, steps):
    limits = targets(fraction * dense, dense, steps)
    assert len(limits) == steps
    assert limits[-1] == fraction * dense
    for before, after in zip((dense, *limits), limits, strict=False):
        assert after / before == pytest.approx(fraction ** (1 / steps))


def test_steps_of_a_model_that_is_small_enough():
    assert targets(10, 5, 3) == (10, 10, 10)


@pytest.mark.parametrize(("limit", "dense", "steps"), [(1, 2, 0), (0, 2, 1), (1, 0, 1), (1, math.inf, 1)])
def test_impossible_steps_are_refused(limit, dense, steps):
    with pytest.raises(BudgetError):
        targets(limit, dense, steps)
