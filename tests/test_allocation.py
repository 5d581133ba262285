"""How much goes from each layer, against slow and independent solutions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import secateur as sc
from secateur.core.errors import BudgetError, SecateurError, SelectionError, SparsityError
from secateur.core.topk import count
from secateur.testing import check_allocation

PATTERNS = [sc.Unstructured(), sc.PerRow(), sc.Block(2, 2), sc.Block(4, 1)]
TAKING_A_TOTAL = [
    sc.uniform,
    sc.global_,
    sc.erk,
    sc.lamp,
    sc.owl,
    sc.threshold,
    sc.Threshold(scale=sc.laplace_scale),
]


def name_of(member: object) -> str:
    return getattr(member, "__name__", repr(member))


def layer(name: str, weight: torch.Tensor, pattern=None, kernel: tuple[int, ...] | None = None) -> sc.Layer:
    kernel_shape = torch.Size(kernel or weight.shape)
    return sc.Layer(
        name, weight.shape, kernel_shape, pattern or sc.Unstructured(), lambda: weight, weight.abs
    )


def layers_of(*weights: torch.Tensor, pattern=None) -> list[sc.Layer]:
    return [layer(f"l{i}", w, pattern) for i, w in enumerate(weights)]


def removed(layers: list[sc.Layer], shares: dict[str, float]) -> list[int]:
    return [count(shares[x.name], x.units) for x in layers]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("allocation", TAKING_A_TOTAL, ids=name_of)
def test_members_meet_the_contract(allocation, pattern):
    check_allocation(allocation, pattern)


sparsities = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6)


@st.composite
def weight_lists(draw):
    """Weights of a few small layers, whole numbers, so that ties abound and squares are exact."""
    numbers = st.integers(-3, 3).map(float)
    lists = draw(st.lists(st.lists(numbers, min_size=1, max_size=30), min_size=1, max_size=5))
    return [torch.tensor([x]) for x in lists]


def ranked(scores: list[list[float]], total: int) -> list[int]:
    """How many of each list are among the `total` lowest; earlier lists, then earlier entries, go first."""
    order = sorted((s, i, j) for i, inside in enumerate(scores) for j, s in enumerate(inside))[:total]
    return [sum(i == n for _, i, _ in order) for n in range(len(scores))]


# ------ uniform and global


@given(shapes, sparsities)
def test_uniform_is_within_one_unit_of_the_same_fraction_everywhere(sizes, sparsity):
    layers = layers_of(*(torch.ones(s) for s in sizes))
    got = removed(layers, sc.uniform(layers, sparsity))
    assert sum(got) == count(sparsity, sum(x.units for x in layers))
    for x, n in zip(layers, got, strict=True):
        assert abs(n - sparsity * x.units) <= 1


def test_what_is_left_of_a_uniform_share_goes_to_the_largest_remainder_then_the_first():
    layers = layers_of(torch.ones(1, 3), torch.ones(1, 9), torch.ones(1, 3))
    # 3.9 of 15 is 4; exact shares 0.78, 2.34, 0.78: whole parts 0, 2, 0, and two units for the two of .78.
    assert removed(layers, sc.uniform(layers, 0.26)) == [1, 2, 1]
    layers = layers_of(torch.ones(1, 3), torch.ones(1, 3))
    assert removed(layers, sc.uniform(layers, 0.5)) == [2, 1]


@given(weight_lists(), sparsities)
def test_global_is_one_stable_ranking_of_all_scores(weights, sparsity):
    layers = layers_of(*weights)
    total = count(sparsity, sum(w.numel() for w in weights))
    expected = ranked([w.abs().view(-1).tolist() for w in weights], total)
    assert removed(layers, sc.global_(layers, sparsity)) == expected


def test_global_ranks_blocks_by_their_sums():
    weights = [torch.tensor([[1.0, 1.0, 5.0, 0.0]]), torch.tensor([[3.0, 3.0, 0.0, 4.0]])]
    layers = layers_of(*weights, pattern=sc.Block(1, 2))  # sums 2, 5 and 6, 4
    assert [removed(layers, sc.global_(layers, k / 4)) for k in range(5)] == [
        [0, 0],
        [1, 0],
        [1, 1],
        [2, 1],
        [2, 2],
    ]


# ------ Erdős-Rényi


def erk_by_bisection(kernels: list[tuple[int, ...]], kept: float) -> list[float]:
    """Kept weights of each layer: min(n, epsilon * sum of dimensions), epsilon found by halving."""

    def keeps(epsilon: float) -> list[float]:
        return [min(float(math.prod(k)), epsilon * sum(k)) for k in kernels]

    low, high = 0.0, float(max(math.prod(k) for k in kernels))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(keeps(middle)) < kept else (low, middle)
    return keeps(high)


kernels = st.one_of(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 5)),
)


@given(st.lists(kernels, min_size=1, max_size=8), sparsities)
def test_erk_solves_its_equation(kinds, sparsity):
    weights = [torch.empty(k[0], math.prod(k[1:])) for k in kinds]
    layers = [layer(f"l{i}", w, kernel=k) for i, (w, k) in enumerate(zip(weights, kinds, strict=True))]
    units = sum(x.units for x in layers)
    got = removed(layers, sc.erk(layers, sparsity))
    assert sum(got) == count(sparsity, units)
    exact = erk_by_bisection(kinds, units - count(sparsity, units))
    for x, n, kept in zip(layers, got, exact, strict=True):
        assert abs((x.units - n) - kept) < 1 + 1e-6


def test_erk_of_a_known_network():
    # LeNet-300-100 at density 0.1: raw densities 1084/235200, 400/30000, 110/1000; none is kept whole.
    sizes = [(300, 784), (100, 300), (10, 100)]
    layers = layers_of(*(torch.empty(s) for s in sizes))
    epsilon = (266_200 - count(0.9, 266_200)) / (1084 + 400 + 110)
    expected = [s[0] * s[1] - epsilon * sum(s) for s in sizes]
    # The last layer's density would be 1.84: it is whole, the other two share the rest.
    assert expected[2] < 0
    epsilon = (26_620 - 1000) / (1084 + 400)
    got = removed(layers, sc.erk(layers, 0.9))
    assert got[2] == 0
    assert got[:2] == pytest.approx([235_200 - epsilon * 1084, 30_000 - epsilon * 400], abs=1)


# ------ LAMP


def lamp_naive(weight: torch.Tensor) -> list[float]:
    squares = sorted(float(w) ** 2 for w in weight.view(-1).tolist())
    return [s / t if (t := math.fsum(squares[i:])) else 0.0 for i, s in enumerate(squares)]


@given(weight_lists(), sparsities)
def test_lamp_is_its_formula(weights, sparsity):
    layers = layers_of(*weights)
    total = count(sparsity, sum(w.numel() for w in weights))
    expected = ranked([lamp_naive(w) for w in weights], total)
    assert removed(layers, sc.lamp(layers, sparsity)) == expected


def test_lamp_is_its_formula_where_a_subtracted_sum_would_cancel(generator):
    # One weight outweighs the rest by 12 digits: "total minus cumulative sum" gives 0 for all of them.
    spread = 10.0 ** torch.randint(-6, 7, (1, 300), generator=generator)
    weights = [torch.randn(1, 300, generator=generator) * spread for _ in range(3)]
    layers = layers_of(*weights)
    for sparsity in (0.1, 0.5, 0.9, 0.99):
        expected = ranked([lamp_naive(w) for w in weights], count(sparsity, 900))
        assert removed(layers, sc.lamp(layers, sparsity)) == expected


def test_lamp_does_not_see_the_scale_of_a_layer(generator):
    weights = [torch.randn(4, n, generator=generator) for n in (5, 50, 20)]
    for sparsity in (0.2, 0.7, 0.95):
        plain = sc.lamp(layers_of(*weights), sparsity)
        assert sc.lamp(layers_of(weights[0] * 2.0**-20, weights[1], weights[2] * 1024), sparsity) == plain


@settings(max_examples=30)
@given(weight_lists())
def test_lamp_empties_no_layer_before_every_other_holds_one_weight(weights):
    weights = [w.where(w != 0, 1.0) for w in weights]
    layers = layers_of(*weights)
    units = sum(w.numel() for w in weights)
    for spare in range(len(weights), units + 1):
        kept = [
            x.units - n
            for x, n in zip(layers, removed(layers, sc.lamp(layers, 1 - spare / units)), strict=True)
        ]
        assert sum(kept) == spare
        assert min(kept) >= 1


def test_the_largest_weight_of_every_layer_scores_exactly_one(generator):
    # So they tie, and the first layers lose theirs first.
    layers = layers_of(*(torch.randn(30, 40, generator=generator) * 10.0**i for i in range(-3, 4)))
    units = sum(x.units for x in layers)
    for spare in range(1, 8):
        kept = [
            x.units - n
            for x, n in zip(layers, removed(layers, sc.lamp(layers, 1 - spare / units)), strict=True)
        ]
        assert kept == [0] * (7 - spare) + [1] * spare


def test_lamp_removes_zeros_first():
    layers = layers_of(torch.tensor([[0.0, 0.0, 1.0, 2.0]]), torch.tensor([[1e-6, 1e6, 1e-6, 0.0]]))
    assert removed(layers, sc.lamp(layers, 3 / 8)) == [2, 1]


def test_lamp_of_blocks_takes_sums_of_squares(generator):
    weights = [torch.randn(4, 8, generator=generator) for _ in range(2)]
    sums = [w.square().view(2, 2, 4, 2).double().sum(dim=(1, 3)).sqrt().view(1, -1) for w in weights]
    blocks, singles = layers_of(*weights, pattern=sc.Block(2, 2)), layers_of(*sums)
    for sparsity in (0.25, 0.5, 0.8):
        assert sc.lamp(blocks, sparsity) == sc.lamp(singles, sparsity)


# ------ threshold


def laplace(n: int, generator: torch.Generator) -> torch.Tensor:
    uniform = torch.rand(1, n, generator=generator, dtype=torch.float64) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs())


CLOSED_FORMS = [
    ("laplace", sc.standard_deviation, lambda q: 1 - math.exp(-q * math.sqrt(2))),
    ("laplace", sc.laplace_scale, lambda q: 1 - math.exp(-q)),
    ("gauss", sc.standard_deviation, lambda q: math.erf(q / math.sqrt(2))),
]


@pytest.mark.parametrize(("kind", "scale", "form"), CLOSED_FORMS)
@pytest.mark.parametrize("quality", [0.1, 0.5, 1.0, 2.0])
def test_threshold_follows_the_distribution(kind, scale, form, quality, generator):
    n = 400_000
    sample = laplace(n, generator) if kind == "laplace" else torch.randn(1, n, generator=generator)
    layers = layers_of(sample * 3.5, sample.float() * 1e-4)
    shares = sc.Threshold(quality, scale)(layers, None)
    expected = form(quality)
    noise = 5 * math.sqrt(expected * (1 - expected) / n) + 5 * quality / math.sqrt(
        n
    )  # of the count, of the scale
    assert list(shares.values()) == pytest.approx([expected] * 2, abs=noise)


@given(weight_lists(), st.floats(0, 3))
def test_threshold_counts_what_lies_below(weights, quality):
    layers = layers_of(*weights)
    expected = []
    for w in weights:
        size, sigma = np.abs(w.numpy().astype(float)), np.std(w.numpy().astype(float))
        # Nudged by a few ulps, since the two sides of the comparison are rounded differently.
        least, most = (int((size < quality * sigma * (1 + e)).sum()) for e in (-1e-12, 1e-12))
        expected.append((least, most) if sigma > 0 else (0, 0))
    got = removed(layers, sc.Threshold(quality)(layers, None))
    assert all(low <= n <= high for n, (low, high) in zip(got, expected, strict=True))


@given(weight_lists(), sparsities)
def test_threshold_with_a_total_ranks_by_size_over_scale(weights, sparsity):
    layers = layers_of(*weights)
    relative = []
    for w in weights:
        sigma = float(w.double().std(correction=0))
        relative.append([x / sigma if sigma > 0 else math.inf for x in w.abs().view(-1).tolist()])
    total = count(sparsity, sum(w.numel() for w in weights))
    assert removed(layers, sc.threshold(layers, sparsity)) == ranked(relative, total)


def test_threshold_of_blocks_takes_the_root_mean_square():
    weight = torch.tensor([[3.0, 4.0, 0.1, 0.1, -5.0, 5.0]])
    sigma = sc.standard_deviation(weight)
    # Root mean squares 3.54, 0.1 and 5.
    for size, gone in ((0.05, 0), (0.2, 1), (3.6, 2), (5.1, 3)):
        layers = layers_of(weight, pattern=sc.Block(1, 2))
        assert removed(layers, sc.Threshold(size / sigma)(layers, None)) == [gone]


def test_scales_are_their_definitions(generator):
    weight = torch.randn(31, 33, generator=generator).bfloat16()
    exact = weight.double().numpy()
    assert sc.standard_deviation(weight) == pytest.approx(np.std(exact), rel=1e-12)
    assert sc.laplace_scale(weight) == pytest.approx(np.abs(exact - np.median(exact)).mean(), rel=1e-12)


def test_threshold_says_what_it_cannot_do():
    layers = layers_of(torch.ones(2, 2))
    with pytest.raises(BudgetError, match="decides the sparsity itself"):
        sc.Threshold(0.5)(layers, 0.5)
    for quality in (-1.0, math.nan):
        with pytest.raises(SecateurError, match="not negative"):
            sc.Threshold(quality)


# ------ given by hand


def named(*names: str) -> list[sc.Layer]:
    return [layer(name, torch.ones(2, 5)) for name in names]


# ------ outliers


def _named(weights: dict[str, torch.Tensor]) -> list[sc.Layer]:
    return [layer(name, w) for name, w in weights.items()]


def test_owl_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"h.{b}.{x}.weight": torch.randn(8, 50, generator=generator).exp() ** (1 + b)
        for b in range(4)
        for x in ("a", "b")
    }
    shares = sc.OWL(outlier=3, width=0.1)(_named(weights), 0.7)
    ratios = []
    for b in range(4):
        scores = torch.cat([weights[f"h.{b}.{x}.weight"].flatten() for x in ("a", "b")])
        ratios.append(float((scores > 3 * scores.mean()).float().mean()))
    r = np.array(ratios)
    density = (r - r.min()) / (r.max() - r.min()) * 0.2
    density += 0.3 - density.mean()
    for b in range(4):
        for x in ("a", "b"):
            assert shares[f"h.{b}.{x}.weight"] == pytest.approx(1 - density[b], abs=2 / 400)


def test_owl_meets_the_total_with_blocks_of_unlike_size_and_at_its_bounds():
    generator = torch.Generator().manual_seed(1)
    sizes = {"h.0.a": 10, "h.1.a": 1000, "h.2.a": 77, "head": 5}
    weights = {n: torch.randn(1, k, generator=generator).exp() for n, k in sizes.items()}
    for sparsity in (0.02, 0.5, 0.97):
        layers = _named(weights)
        shares = sc.OWL(width=0.3)(layers, sparsity)
        assert sum(removed(layers, shares)) == count(sparsity, 1092)
        assert all(0 <= s <= 1 for s in shares.values())


def test_owl_treats_blocks_alike_where_outliers_are_and_refuses_nonsense():
    layers = _named({"h.0.a": torch.ones(1, 10), "h.1.a": torch.ones(1, 10)})
    assert set(sc.owl(layers, 0.3).values()) == {0.3}
    with pytest.raises(SecateurError, match="outlier is above 0"):
        sc.OWL(outlier=0)


def test_custom_takes_the_first_pattern_that_matches():
    layers = named("a.q.weight", "a.k.weight", "b.q.weight")
    given_ = sc.custom({"a.q": 0.1, "a.*": 0.3, "*": 0.64})
    assert given_(layers, None) == {"a.q.weight": 0.1, "a.k.weight": 0.3, "b.q.weight": 0.6}
    assert sc.custom({"*.weight": 0.55})(layers[:1], None) == {"a.q.weight": 0.6}  # to whole units, half up


def test_custom_says_what_it_cannot_do():
    layers = named("a.weight", "b.weight")
    with pytest.raises(SelectionError, match="'c' matches none of the selected layers"):
        sc.custom({"c": 0.5, "*": 0.1})(layers, None)
    with pytest.raises(SelectionError, match=r"no entry for b\.weight"):
        sc.custom({"a": 0.5})(layers, None)
    for sparsity in (1.5, -0.1, math.nan):
        with pytest.raises(SparsityError):
            sc.custom({"*": sparsity})(layers, None)
    with pytest.raises(BudgetError, match=r"add up to 0\.1000, not to the asked 0\.5000"):
        sc.custom({"*": 0.1})(layers, 0.5)
    assert sc.custom({"a": 0.2, "b": 0.8})(layers, 0.5) == {"a.weight": 0.2, "b.weight": 0.8}


@pytest.mark.parametrize("allocation", TAKING_A_TOTAL, ids=name_of)
def test_a_total_is_needed_and_lies_between_0_and_1(allocation):
    layers = layers_of(torch.ones(2, 2))
    with pytest.raises(SparsityError, match="needs a sparsity between 0 and 1"):
        allocation(layers, None)
    for sparsity in (-0.01, 1.01, math.nan):
        with pytest.raises(SparsityError, match="between 0 and 1"):
            allocation(layers, sparsity)


# ------ the contract itself


def in_each(layers, sparsity):
    """Rounds in every layer, so that the total drifts."""
    return {x.name: count(sparsity, x.units) / x.units for x in layers}


def forgetful(layers, sparsity):
    return {k: v for k, v in sc.uniform(layers, sparsity).items() if k != "layer0"}


def beyond(layers, sparsity):
    return {name: share - 1e-6 for name, share in sc.uniform(layers, sparsity).items()}


def rewriting(layers, sparsity):
    for x in layers:
        x.weight().mul_(0.5)
    return sc.uniform(layers, sparsity)


def drawn(layers, sparsity):
    shuffled = [layers[i] for i in torch.randperm(len(layers))]
    return sc.uniform(shuffled, sparsity)


@pytest.mark.parametrize(
    ("allocation", "says"),
    [
        (in_each, "units instead of"),
        (forgetful, "covers"),
        (beyond, r"outside \[0, 1\]"),
        (rewriting, "changed the weights"),
        (drawn, "two calls differ"),
    ],
    ids=name_of,
)
def test_the_contract_finds_what_is_wrong(allocation, says):
    with pytest.raises(AssertionError, match=says):
        check_allocation(allocation)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=200), st.floats(0, 1))
def test_totals_are_exact_at_any_size(sizes, sparsity):
    weights = [torch.empty(1, n, device="meta") for n in sizes]
    layers = layers_of(*weights)
    for allocation in (sc.uniform, sc.erk):
        assert sum(removed(layers, allocation(layers, sparsity))) == count(sparsity, sum(sizes))
