"""Constraints and clusters: which counts a group may keep."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import BudgetError, SelectionError, SparsityError
from secateur.selection import (
    Constraint,
    Global,
    GroupLike,
    Isomorphic,
    Local,
    Scope,
    constraints,
    signatures,
)
from secateur.selection.ladders import build
from tests.selection.problems import Group, Member, keys, problems


def ladders(groups, clusters=(), given=None, scores=None):
    scores = scores or {g: torch.arange(float(g.size)) for g in groups}
    return build(scores, clusters, given or {}, None, lambda kept: float(sum(kept.values())))


def counts(size, **settings):
    group = Group("g", size)
    (ladder,) = ladders([group], given={group: Constraint(**settings)})
    return ladder.counts.flatten().tolist()


@given(problems())
def test_against_fractions(problem):
    found = build(problem.scores, problem.clusters, problem.constraints, None, problem.cost)
    assert [list(ladder.groups) for ladder in found] == problem.sets()
    assert [ladder.counts.tolist() for ladder in found] == [problem.rungs(s) for s in problem.sets()]
    for ladder in found:
        for level in ladder.counts.tolist():
            assert len({Fraction(n, g.size) for n, g in zip(level, ladder.groups, strict=True)}) == 1
        assert ladder.values.shape == ladder.units.shape == (ladder.steps,)
        assert not ladder.values.isnan().any()
        assert bool((ladder.values[1:] >= ladder.values[:-1]).all())
        left = zip(ladder.counts[0].tolist(), ladder.groups, strict=True)
        as_asked = any(problem.constraint(g).sparsity == pytest.approx(1 - n / g.size) for n, g in left)
        assert (ladder.note is not None) == (ladder.steps == 0 and not as_asked)


@pytest.mark.parametrize(
    ("name", "scope"), [("local", Local()), ("global", Global()), ("isomorphic", Isomorphic())]
)
@settings(max_examples=30)
@given(problems())
def test_scopes_rank_steps_as_fractions_do(name, scope, problem):
    found = scope(build(problem.scores, problem.clusters, problem.constraints, problem.alike, problem.cost))
    for got, asked in zip(found, keys(problem, name), strict=True):
        assert got.tolist() == pytest.approx([float(key) for key in asked], rel=1e-12)


def test_kept_counts_are_multiples_or_the_full_size():
    assert counts(10, multiple_of=4) == [10, 8, 4]
    assert counts(12, multiple_of=4, minimum=5) == [12, 8]
    assert counts(7, multiple_of=8) == [7]
    assert counts(1) == [1]


def test_limits_of_a_group():
    assert counts(10, maximum_sparsity=0.3) == [10, 9, 8, 7]
    assert counts(100, maximum_sparsity=0.29)[-1] == 71  # although 0.29 * 100 is below 29 in floating point
    assert counts(10, maximum_sparsity=0.29) == [10, 9, 8]
    assert counts(5, minimum=9) == [5]
    assert counts(3, maximum_sparsity=0) == [3]


@pytest.mark.parametrize(
    ("sparsity", "multiple_of", "kept"), [(0, 1, 10), (0.5, 1, 5), (0.45, 1, 5), (0.99, 1, 1), (0.5, 4, 4)]
)
def test_a_fixed_sparsity_takes_the_nearest_allowed_count(sparsity, multiple_of, kept):
    assert counts(10, sparsity=sparsity, multiple_of=multiple_of) == [kept]


@settings(max_examples=40)
@given(st.integers(1, 40), st.floats(0, 0.99), st.floats(0, 1), st.sampled_from([1, 2, 4]), st.integers(1, 4))
def test_in_steps_sparsities_count_from_the_dense_group(dense, fixed, most, multiple_of, minimum):
    """What is allowed after a step is what was allowed before it; a fixed sparsity takes nothing more."""
    others = {"multiple_of": multiple_of, "minimum": minimum}
    limited = Constraint(maximum_sparsity=most, **others)
    allowed = counts(dense, maximum_sparsity=most, **others)
    for size in allowed:
        later = limited.later(dense, size)
        assert counts(size, multiple_of=multiple_of, minimum=later.minimum) == [
            n for n in allowed if n <= size
        ]
    (kept,) = counts(dense, sparsity=fixed, **others)
    later = Constraint(sparsity=fixed, **others).later(dense, kept)
    assert counts(kept, sparsity=later.sparsity, minimum=later.minimum, multiple_of=multiple_of) == [kept]


def test_notes_say_what_the_budget_cannot_change():
    a, b, c = Group("a", 10), Group("b", 7), Group("c", 5)
    found = ladders(
        [a, b, c],
        given={a: Constraint(sparsity=0.44), b: Constraint(multiple_of=8), c: Constraint(sparsity=0.4)},
    )
    assert [ladder.note for ladder in found] == [
        "a: sparsity fixed at 0.4, the allowed value nearest to 0.44.",
        "b: kept whole, as no smaller count meets its constraints.",
        None,  # as asked
    ]


def test_a_cluster_of_unlike_sizes_keeps_shares_that_are_whole_everywhere():
    a, b, c = Group("a", 8), Group("b", 12), Group("c", 5)
    found = ladders([a, b, c], [(a, b)])
    assert found[0].counts.tolist() == [[8, 12], [6, 9], [4, 6], [2, 3]]
    assert found[1].counts.flatten().tolist() == [5, 4, 3, 2, 1]
    (together,) = ladders([a, c], [(a, c)])
    assert together.counts.tolist() == [[8, 5]]
    assert "a and 1 more: kept whole" in together.note


def test_clusters_with_a_group_in_common_are_one():
    a, b, c, d = (Group(name, 4) for name in "abcd")
    found = ladders([a, b, c, d], [(c, d), (a, b), (d, b)])
    assert [ladder.groups for ladder in found] == [(a, b, c, d)]


def test_a_constraint_binds_the_cluster():
    a, b = Group("a", 8), Group("b", 8)
    (ladder,) = ladders([a, b], [(a, b)], {a: Constraint(multiple_of=2), b: Constraint(minimum=3)})
    assert ladder.counts.tolist() == [[8, 8], [6, 6], [4, 4]]


def test_a_step_counts_with_the_mean_of_what_it_removes():
    a, b = Group("a", 4), Group("b", 4)
    scores = {a: torch.tensor([4.0, 1.0, 3.0, 2.0]), b: torch.tensor([30.0, 20.0, 10.0, math.inf])}
    (ladder,) = ladders([a, b], [(a, b)], scores=scores)
    assert ladder.values.tolist() == [5.5, 11.0, 16.5]
    (aligned,) = ladders([a], given={a: Constraint(multiple_of=2)}, scores={a: scores[a]})
    assert aligned.values.tolist() == [1.5]
    assert (aligned.price(), ladder.price()) == (1, 1)


def test_a_unit_that_must_stay_outweighs_one_that_must_go():
    a, b = Group("a", 2), Group("b", 2)
    scores = {a: torch.tensor([-math.inf, 0.0]), b: torch.tensor([math.inf, math.inf])}
    (ladder,) = ladders([a, b], [(a, b)], scores=scores)
    assert ladder.values.tolist() == [math.inf]


@given(st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=30))
def test_steps_of_one_unit_have_exactly_its_score(scores):
    group = Group("g", len(scores))
    (ladder,) = ladders([group], scores={group: torch.tensor(scores, dtype=torch.float64)})
    assert ladder.values.tolist() == sorted(scores)[:-1]


def test_settings_by_name_and_kind():
    groups = [
        Group("layers.0.mlp", 8),
        Group("layers.0.attn", 4, "heads"),
        Group("stem", 8, "filters"),
    ]
    mlp, attn, stem = groups
    found = constraints(
        groups, multiple_of=4, minimum={"heads": 2, "*": 3}, sparsity={"stem": 0.0, "layers.*": 0.5}
    )
    assert found == {
        mlp: Constraint(multiple_of=4, minimum=3, sparsity=0.5),
        attn: Constraint(multiple_of=1, minimum=2, sparsity=0.5),
        stem: Constraint(multiple_of=4, minimum=3, sparsity=0.0),
    }
    assert constraints(groups, multiple_of={"heads": 2})[attn].multiple_of == 2
    assert constraints(groups) == dict.fromkeys(groups, Constraint())
    with pytest.raises(SelectionError, match=r"sparsity: 'layer\.\*' matches the name or kind of no group"):
        constraints(groups, sparsity={"layer.*": 0.5})


def test_a_name_in_full_is_that_name_whatever_a_glob_makes_of_it():
    first, second = (Group(f"heads of h.{i}.attn.weight[1]", 8, kind="heads") for i in range(2))
    found = constraints([first, second], sparsity={first.name: 0.5})
    assert found == {first: Constraint(sparsity=0.5), second: Constraint()}


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"multiple_of": 0}, BudgetError),
        ({"minimum": 0}, BudgetError),
        ({"maximum_sparsity": 1.5}, SparsityError),
        ({"maximum_sparsity": math.nan}, SparsityError),
        ({"sparsity": 1.0}, SparsityError),
        ({"sparsity": -0.1}, SparsityError),
        ({"sparsity": 0.6, "maximum_sparsity": 0.5}, SparsityError),
    ],
)
def test_constraints_without_sense_are_refused(settings, error):
    with pytest.raises(error):
        Constraint(**settings)


def test_likeness_is_kind_and_surroundings_but_not_size():
    shapes = {"a": (8, 3), "b": (5, 3), "c": (8, 4), "d": (3, 8), "conv": (8, 3, 3, 3), "bias": (8,)}

    def group(name, kind="neurons", dim=0, role="out", extra=()):
        return Group(name, shapes[name][dim], kind, (Member(name, dim, role), *extra))

    bias = (Member("bias", 0, "along"),)
    groups = {
        "a": group("a"),
        "b": group("b"),
        "c": group("c"),
        "d": group("d", dim=1, role="in"),
        "conv": group("conv"),
        "filters": group("a", kind="filters"),
        "biased": group("a", extra=bias),
    }
    found = signatures(groups.values(), shapes)
    assert found[groups["a"]] == found[groups["b"]]
    assert len(set(found.values())) == len(groups) - 1


def test_the_stand_in_and_the_scopes_are_what_the_protocols_ask_for():
    assert isinstance(Group("g", 1), GroupLike)
    assert isinstance(Local(), Scope)
    assert isinstance(Isomorphic(), Scope)
