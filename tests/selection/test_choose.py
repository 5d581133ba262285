"""Budgets are met as closely as the steps allow, by the units that the ranking says."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import BudgetError, NonFiniteError, SelectionError
from secateur.core.topk import count
from secateur.selection import Constraint, Global, Isomorphic, Local, choose
from tests.selection.problems import Group, Problem, dense, kept_at, least, prefix, problems

SCOPES = {"local": Local(), "global": Global(), "isomorphic": Isomorphic()}
scopes = st.sampled_from(sorted(SCOPES))
shares = st.floats(0, 1)  # of the way from the smallest model to the dense one


def run(problem, scope, limit, **others):
    return choose(
        problem.scores,
        problem.cost,
        limit,
        SCOPES[scope] if isinstance(scope, str) else scope,
        clusters=problem.clusters,
        constraints=problem.constraints,
        alike=problem.alike or None,
        **others,
    )


def between(problem, share):
    return least(problem) + share * (dense(problem) - least(problem))


@given(problems(), scopes, shares)
def test_against_steps_taken_one_by_one(problem, scope, share):
    """Cut where brute force cuts the ranking; what is put back fits, nothing else would; lowest scores go."""
    limit = between(problem, share)
    levels = prefix(problem, scope, limit)
    choice = run(problem, scope, limit)
    assert choice.cost == problem.cost(choice.counts) <= limit
    assert limit - choice.cost <= max(0.01 * limit, choice.step) or choice.step == 0

    sets = problem.sets()
    rungs = [problem.rungs(s) for s in sets]
    got = [[choice.counts[g] for g in s] for s in sets]
    reached = [r.index(counts) for r, counts in zip(rungs, got, strict=True)]  # an allowed count, or an error
    assert all(n <= m for n, m in zip(reached, levels, strict=True))  # at most put back
    met = limit - problem.cost(kept_at(sets, rungs, levels)) <= 0.01 * limit
    even = scope == "local"
    if met or even:
        assert all(m - n <= 1 for n, m in zip(reached, levels, strict=True))
    for i, level in enumerate(reached):
        left_alone = level == levels[i] or (limit - choice.cost > 0.01 * limit and not even)
        if level > 0 and left_alone:
            larger = [*reached[:i], level - 1, *reached[i + 1 :]]
            assert problem.cost(kept_at(sets, rungs, larger)) > limit

    for group, kept in choice.kept.items():
        assert kept.dtype == torch.int64
        assert kept.tolist() == sorted(problem.ranked(group)[group.size - len(kept) :])
        assert len(kept) >= 1
    again = run(problem, scope, limit)
    assert all(torch.equal(again.kept[g], kept) for g, kept in choice.kept.items())


@settings(max_examples=50)
@given(problems(clustered=False, constrained=False), shares)
def test_local_is_at_least_as_close_as_any_common_sparsity(problem, share):
    limit = between(problem, share)
    sizes = [g.size for g in problem.groups]
    costs = [
        problem.cost({g: max(1, n - count(s, n)) for g, n in zip(problem.groups, sizes, strict=True)})
        for s in {0.0, 1.0} | {(j - 0.5) / n for n in sizes for j in range(1, n + 1)}
    ]
    assert run(problem, "local", limit).cost >= max(c for c in costs if c <= limit)


@settings(max_examples=50)
@given(problems(clustered=False, constrained=False), shares)
def test_global_is_at_least_as_close_as_any_threshold(problem, share):
    limit = between(problem, share)
    thresholds = {-math.inf} | {s for scores in problem.scores.values() for s in scores.tolist()}
    costs = [
        problem.cost({g: max(1, int((s > t).sum())) for g, s in problem.scores.items()}) for t in thresholds
    ]
    assert run(problem, "global", limit).cost >= max(c for c in costs if c <= limit)


@settings(max_examples=30)
@given(problems(), scopes, shares, shares)
def test_a_larger_limit_keeps_more(problem, scope, share, other):
    """The cut of the ranking; what is put back after it may differ by the steps that fit."""
    low, high = sorted((between(problem, share), between(problem, other)))
    fewer, more = prefix(problem, scope, low), prefix(problem, scope, high)
    assert all(a <= b for a, b in zip(more, fewer, strict=True))
    below, above = run(problem, scope, low), run(problem, scope, high)
    assert below.cost <= above.cost + max(above.step, 0.01 * high)


def wide(groups=40, size=1000, **settings):
    """Layers in a chain, with random scores."""
    made = [Group(f"g{i}", size, **settings) for i in range(groups)]
    generator = torch.Generator().manual_seed(0)
    scores = {g: torch.rand(g.size, generator=generator) for g in made}
    layers = [(a, b, 1) for a, b in zip(made, [*made[1:], None], strict=True)]
    return Problem(made, scores, layers, alike=dict.fromkeys(made, "a"))


@pytest.mark.parametrize("scope", [Local(), Global(), Global(per_cost=True), Isomorphic()], ids=repr)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_wide_models_need_few_calls_and_are_met_closely(scope, share):
    problem = wide()
    limit = share * dense(problem)
    problem.calls = 0
    choice = run(problem, scope, limit)
    assert limit * 0.999 <= choice.cost <= limit
    assert problem.calls <= 3 * len(problem.groups) + 2 * math.log2(40 * 1000)


@pytest.mark.parametrize("scope", ["local", "isomorphic"])
def test_a_step_too_large_does_not_leave_the_budget_unused(scope):
    """A cluster that halves at once is passed over; fine groups fill what it left, unless shares are even."""
    coarse = [Group("c0", 2), Group("c1", 2)]
    fine = Group("f", 1000)
    problem = Problem(
        [*coarse, fine],
        {coarse[0]: torch.rand(2), coarse[1]: torch.rand(2), fine: torch.rand(1000)},
        [(coarse[0], None, 500), (coarse[1], None, 500), (fine, None, 1)],
        clusters=[coarse],
        alike={coarse[0]: 0, coarse[1]: 0, fine: 1},
    )
    choice = run(problem, scope, 0.6 * dense(problem))
    assert choice.counts[coarse[0]] == choice.counts[coarse[1]] == 1
    if scope == "local":
        assert 250 <= choice.counts[fine] <= 751 and choice.limit - choice.cost < choice.step
    else:
        assert choice.cost >= 0.99 * choice.limit


def test_what_is_left_of_the_budget_is_filled():
    """After the cut 5 is left: the other groups' last units go back, the best first, while they fit."""
    sizes = {"big": 50, "a": 4, "b": 4, "c": 4}
    big, a, b, c = groups = [Group(name, size) for name, size in sizes.items()]
    scores = {a: [0.0, 0.1, 5, 5], b: [0.2, 0.3, 5, 5], c: [0.4, 0.5, 5, 5], big: [0.6, *range(1, 50)]}
    problem = Problem(groups, {g: torch.tensor(s) for g, s in scores.items()}, [(big, None, 10)])
    problem.layers += [(a, None, 1), (b, None, 1), (c, None, 1)]
    limit = 3 * (490 + 2 + 2 + 2) + 7
    choice = run(problem, "global", limit)
    assert [choice.counts[g] for g in groups] == [49, 2, 3, 3]
    assert choice.kept[b].tolist() == [1, 2, 3]
    assert choice.step == 30


def test_nothing_goes_from_a_model_that_is_small_enough():
    problem = wide(3, 10)
    choice = run(problem, "local", dense(problem))
    assert choice.counts == {g: 10 for g in problem.groups}
    assert (choice.cost, choice.step, choice.notes) == (dense(problem), 0, ())


@settings(max_examples=30)
@given(problems(), scopes)
def test_what_can_be_reached_is_reached_and_no_less(problem, scope):
    lowest = least(problem)
    assert run(problem, scope, lowest).cost == lowest
    with pytest.raises(BudgetError, match="cannot be reached"):
        run(problem, scope, lowest - 0.5)


def test_an_unreachable_budget_says_what_can_be_reached():
    problem = wide(2, 10)
    lowest = problem.cost(dict.fromkeys(problem.groups, 1))
    with pytest.raises(BudgetError, match=rf"At most {lowest - 1} MACs cannot .* still has {lowest} MACs\."):
        run(problem, "global", lowest - 1, unit="MACs")


def test_minus_infinity_goes_first_and_infinity_stays():
    a, b = Group("a", 4), Group("b", 4)
    scores = {a: torch.tensor([9.0, -math.inf, 8.0, 7.0]), b: torch.tensor([math.inf, 1.0, -math.inf, 2.0])}
    problem = Problem([a, b], scores, [(a, None, 1), (b, None, 1)])
    kept = run(problem, "global", 3 * 6).kept
    assert (kept[a].tolist(), kept[b].tolist()) == ([0, 2, 3], [0, 1, 3])
    kept = run(problem, "global", 3 * 2).kept
    assert (kept[a].tolist(), kept[b].tolist()) == ([0], [0])


def test_of_equal_scores_the_first_go_and_the_first_group_loses_first():
    a, b = Group("a", 3), Group("b", 3)
    problem = Problem([a, b], {a: torch.ones(3), b: torch.ones(3)}, [(a, None, 1), (b, None, 1)])
    kept = run(problem, "global", 3 * 5).kept
    assert (kept[a].tolist(), kept[b].tolist()) == ([1, 2], [0, 1, 2])


def test_scores_per_cost_prefer_what_is_dear():
    """Equal scores, unlike costs: only the ranking per cost takes from the dear group first."""
    cheap, dear = Group("cheap", 10), Group("dear", 10)
    scores = {cheap: torch.arange(10.0), dear: torch.arange(10.0) + 0.5}
    problem = Problem([cheap, dear], scores, [(cheap, None, 1), (dear, None, 20)])
    limit = 0.7 * dense(problem)
    plain, priced = run(problem, Global(), limit), run(problem, Global(per_cost=True), limit)
    assert plain.counts[cheap] <= 8
    assert priced.counts[cheap] == 10
    ratio = torch.cat([scores[cheap] / 3, scores[dear] / 60])  # 3 and 60 are the costs of a unit
    assert int((ratio[10:] < ratio[:10].min() + 0.15).sum()) >= 10 - priced.counts[dear]


def test_units_that_save_nothing_stay():
    free, dear = Group("free", 5), Group("dear", 5)
    negative = torch.tensor([-math.inf, -2.0, -1.0, 0.0, 1.0])
    problem = Problem([free, dear], {free: negative, dear: torch.ones(5)}, [(dear, None, 1)])
    counts = run(problem, Global(per_cost=True), 6).counts
    assert counts == {free: 5, dear: 2}  # the one of -inf went first, and came back as it costs nothing


def test_a_price_other_than_the_cost():
    a, b = Group("a", 10), Group("b", 10)
    problem = Problem([a, b], {a: torch.ones(10), b: torch.ones(10)}, [(a, None, 1), (b, None, 1)])
    choice = run(problem, Global(per_cost=True), 48, price=lambda kept: kept[a] + 10 * kept[b])
    assert choice.counts == {a: 10, b: 6}


def noisy(problem, spread, seed):
    generator = torch.Generator().manual_seed(seed)

    def cost(kept):
        factor = 1 + spread * (2 * torch.rand((), generator=generator).item() - 1)
        return 1e-9 * problem.cost(kept) * factor

    return cost


@pytest.mark.parametrize("scope", [Local(), Global(), Isomorphic()], ids=repr)
@settings(max_examples=20)
@given(st.floats(0.1, 0.95), st.integers(0, 1000))
def test_a_measured_cost_is_met_within_its_noise_in_few_calls(scope, share, seed):
    problem = wide(8, 100)
    limit = 1e-9 * share * dense(problem)
    problem.calls = 0
    choice = choose(
        problem.scores, noisy(problem, 0.02, seed), limit, scope, alike=problem.alike, measured=True, unit="s"
    )
    assert problem.calls <= 12
    assert 0.95 * limit <= choice.cost <= limit
    assert 0.93 * limit <= 1e-9 * problem.cost(choice.counts) <= 1.03 * limit


def test_a_measured_cost_in_stairs_ends_below_the_stair():
    problem = wide(1, 64000)
    (group,) = problem.groups
    asked = []

    def stairs(kept):
        asked.append(kept[group])
        return float(-(-kept[group] // 12800))

    choice = choose(problem.scores, stairs, 3.7, Local(), measured=True)
    assert choice.cost == 3
    assert 38400 - 64000 / 2**9 <= choice.counts[group] <= 38400
    assert choice.step == 1
    assert len(asked) == 12


def test_a_measured_cost_that_cannot_be_reached():
    problem = wide(2, 10)
    with pytest.raises(BudgetError, match="cannot be reached"):
        choose(problem.scores, lambda kept: 2.0, 1.0, Local(), measured=True)
    with pytest.raises(SelectionError, match="pass price="):
        choose(problem.scores, lambda kept: 2.0, 1.0, Global(per_cost=True), measured=True)


def test_problems_without_sense_are_refused():
    a, b = Group("a", 3), Group("b", 3)
    problem = Problem([a], {a: torch.ones(3)}, [(a, None, 1)])
    with pytest.raises(SelectionError, match="no group"):
        choose({}, problem.cost, 1, Local())
    with pytest.raises(SelectionError, match=r"a has 3 units, but scores of shape \(4,\)"):
        choose({a: torch.ones(4)}, problem.cost, 1, Local())
    with pytest.raises(NonFiniteError, match="score of a"):
        choose({a: torch.tensor([1.0, math.nan, 2.0])}, problem.cost, 1, Local())
    with pytest.raises(SelectionError, match="a and b must keep the same share"):
        choose(problem.scores, problem.cost, 1, Local(), clusters=[(a, b)])
    with pytest.raises(SelectionError, match="alike=signatures"):
        choose(problem.scores, problem.cost, 1, Isomorphic())
    with pytest.raises(BudgetError, match=r"fixed sparsities \[0\.1, 0\.2\]"):
        both = {a: torch.ones(3), b: torch.ones(3)}
        fixed = {a: Constraint(sparsity=0.1), b: Constraint(sparsity=0.2)}
        choose(both, problem.cost, 1, Local(), clusters=[(a, b)], constraints=fixed)
    assert choose(problem.scores, problem.cost, 9, Local(), clusters=[(b,)]).counts == {a: 3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_scores_of_any_type_that_need_gradients(dtype):
    problem = wide(3, 10)
    exact = {g: (10 * s).round() for g, s in problem.scores.items()}
    limit = 0.5 * dense(problem)
    asked = run(Problem(problem.groups, exact, problem.layers), "global", limit)
    leaf = {g: s.to(dtype).requires_grad_(dtype.is_floating_point) for g, s in exact.items()}
    got = run(Problem(problem.groups, leaf, problem.layers), "global", limit)
    assert all(torch.equal(asked.kept[g], got.kept[g]) for g in problem.groups)
