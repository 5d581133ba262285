"""One layer at a time: against pruning copies, exact restoration, and the allocations that follow."""

import copy
import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from benchmarks import realdata
from secateur.core.topk import count
from secateur.layerwise import LayerSensitivity, Sensitivity, sensitivity

GRID = (0.5, 0.7, 0.95)


def network() -> nn.Sequential:
    """Convolution, norm, dropout and linear layers, each module in a mode of its own."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.Dropout(0.5),
        nn.Linear(16, 8),
        nn.Linear(8, 3),
    )
    model.train()
    model[1].eval()
    model[6].weight.requires_grad_(False)
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
        model[4].weight[:3] = 0
    return model


def data(sizes: tuple[int, ...] = (6, 2)) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 4, 4, 4), torch.randint(0, 3, (n,))) for n in sizes]


def state(model: nn.Module) -> list[object]:
    """Everything that must be the same afterwards, weights as bits."""
    tensors = [
        (n, t.clone().view(torch.int32)) for n, t in model.state_dict().items() if t.is_floating_point()
    ]
    modes = [m.training for m in model.modules()]
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return [tensors, modes, flags, hooks]


def same(a: list[object], b: list[object]) -> bool:
    (first, *rest_a), (second, *rest_b) = a, b
    return rest_a == rest_b and all(
        n == m and torch.equal(x, y) for (n, x), (m, y) in zip(first, second, strict=True)
    )


def loss_of(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """The mean loss over all examples, as one batch, in evaluation mode."""
    model = copy.deepcopy(model).eval()
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


@pytest.mark.parametrize(
    ("criterion", "pattern"),
    [
        (sc.Magnitude(), None),
        (sc.Wanda(), sc.PerRow()),
        (sc.Taylor(), sc.NM(2, 4)),
        (sc.Taylor(), sc.Block(4, 2)),
        (sc.Random(seed=3), sc.Unstructured()),
        (sc.SynFlow(), None),
    ],
)
def test_equals_pruning_a_copy_for_every_layer_and_sparsity(criterion, pattern):
    model, batches = network(), data()
    before = state(model)
    result = sensitivity(
        model, criterion, sparsities=GRID, pattern=pattern, batches=batches, loss=F.cross_entropy
    )
    assert same(state(model), before)
    assert result.baseline == pytest.approx(loss_of(model, batches), rel=1e-6)
    assert [x.name for x in result.layers] == ["0.weight", "4.weight", "6.weight"]
    for layer in result.layers:
        for sparsity, removed, value in zip(GRID, layer.removed, layer.values, strict=True):
            pruned = copy.deepcopy(model)
            report = sc.prune_(
                pruned,
                criterion,
                sparsity,
                pattern=pattern,
                where=sc.Where(include=layer.name),
                batches=batches,
                loss=F.cross_entropy,
                rounds=1,
            )
            assert removed * (pattern.unit if pattern else 1) == report.removed
            assert value == pytest.approx(loss_of(pruned, batches), rel=1e-6)
    assert len({v for x in result.layers for v in x.values}) > 4


def test_the_metric_sees_exactly_the_pruned_weights_in_evaluation_mode_without_gradients():
    model = network()
    seen: list[dict[str, Tensor]] = []

    def metric(given: nn.Module) -> float:
        assert given is wrapped
        assert not any(m.training for m in given.modules())
        assert not torch.is_grad_enabled()
        seen.append({n: p.clone() for n, p in model.named_parameters()})
        given.train()  # a careless metric
        return float(len(seen))

    wrapped, before = nn.DataParallel(model), state(model)
    result = sensitivity(wrapped, sc.Magnitude(), metric, (0.95, 0.5), higher_is_better=True)
    assert same(state(model), before)
    assert result.sparsities == (0.5, 0.95)
    assert (result.baseline, [x.values for x in result.layers]) == (1.0, [(2.0, 3.0), (4.0, 5.0), (6.0, 7.0)])
    trials = [(x.name, s) for x in result.layers for s in (0.5, 0.95)]
    for (name, sparsity), weights in zip(trials, seen[1:], strict=True):
        pruned = copy.deepcopy(model)
        sc.prune_(pruned, sc.Magnitude(), sparsity, where=sc.Where(include=name))
        assert all(torch.equal(p, weights[n]) for n, p in pruned.named_parameters())


@pytest.mark.parametrize("calls", range(8))
def test_an_exception_at_any_evaluation_leaves_the_model_as_it_was(calls):
    model = network()
    before, done = state(model), []

    def metric(model: nn.Module) -> float:
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(model)
        return 0.0

    if calls == 7:  # all went well
        sensitivity(model, sc.Magnitude(), metric, (0.5, 0.9), higher_is_better=True)
    else:
        with pytest.raises(KeyboardInterrupt):
            sensitivity(model, sc.Magnitude(), metric, (0.5, 0.9), higher_is_better=True)
    assert len(done) == calls
    assert same(state(model), before)


@dataclass(frozen=True)
class Counted:
    """Magnitude that notes whenever it is called."""

    calls: list[torch.Size] = field(default_factory=list, repr=False)
    needs = (sc.InputNorm(),)
    rounds = 5

    def __call__(self, weight: Tensor, stats: dict[object, Tensor]) -> Tensor:
        assert stats.keys() == {sc.InputNorm()}
        self.calls.append(weight.shape)
        return weight.abs()


def test_statistics_and_scores_are_computed_once_and_a_generator_will_do():
    model, batches, criterion = network(), data(), Counted()
    reads = []

    def stream():
        for batch in batches:
            reads.append(batch)
            yield batch

    result = sensitivity(model, criterion, sparsities=GRID, batches=stream(), loss=F.cross_entropy)
    assert criterion.calls == [torch.Size((8, 36)), torch.Size((16, 32)), torch.Size((8, 16))]
    assert len(reads) == 2
    assert result == sensitivity(model, criterion, sparsities=GRID, batches=batches, loss=F.cross_entropy)


def test_drops_say_how_much_worse_in_either_direction():
    model = network()
    values = iter([5.0, 4.0, 7.0, 5.0, 1.0, 2.0, 3.0] * 2)

    def metric(model: nn.Module) -> float:
        return next(values)

    up = sensitivity(model, sc.Magnitude(), metric, (0.5, 0.9), higher_is_better=True)
    down = sensitivity(model, sc.Magnitude(), metric, (0.5, 0.9), higher_is_better=False)
    assert up.drops() == {"0.weight": (1, -2), "4.weight": (0, 4), "6.weight": (3, 2)}
    assert down.drops() == {"0.weight": (-1, 2), "4.weight": (0, -4), "6.weight": (-3, -2)}


def test_bad_input_is_refused_before_anything_is_evaluated():
    model, before = network(), state(network())
    before = state(model)

    def metric(model: nn.Module) -> float:
        raise AssertionError("evaluated")

    def refused(error: type[Exception], match: str, *args: object, **kwargs: object) -> None:
        with pytest.raises(error, match=match):
            sensitivity(model, *args, **kwargs)
        assert same(state(model), before)

    for bad in [(), (0.0, 0.5), (0.5, 1.5), (math.nan,)]:
        refused(sc.SparsityError, "above 0", sc.Magnitude(), metric, bad, higher_is_better=True)
    refused(sc.SecateurError, "which direction", sc.Magnitude(), metric)
    refused(sc.SecateurError, "lower is better", sc.Magnitude(), higher_is_better=True, batches=data())
    refused(sc.StatsError, "the loss is measured: pass batches", sc.Magnitude())
    refused(sc.SecateurError, "not one of its instances", sc.Magnitude, metric, higher_is_better=True)
    refused(
        sc.PatternError,
        "removes at least 0.75",
        sc.Magnitude(),
        metric,
        pattern=sc.NM(1, 4),
        higher_is_better=True,
    )
    refused(sc.StatsError, "batches", sc.Taylor(), metric, higher_is_better=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_is_refused_with_layer_and_sparsity(bad):
    model, values = network(), iter([1.0, 1.0, bad])
    before = state(model)
    with pytest.raises(sc.NonFiniteError, match=r"with 0\.9 of 0\.weight removed"):
        sensitivity(model, sc.Magnitude(), lambda _: next(values), (0.5, 0.9), higher_is_better=True)
    assert same(state(model), before)


def table(
    drops: list[list[float]], units: list[int], grid: tuple[float, ...], gap: bool = False
) -> Sensitivity:
    """A result with given drops from a baseline of 10, higher being better."""
    layers = tuple(
        LayerSensitivity(
            f"{i}.weight", (n,), n, tuple(count(s, n) for s in grid), tuple(10 - x for x in d), gap
        )
        for i, (d, n) in enumerate(zip(drops, units, strict=True))
    )
    return Sensitivity({}, grid, 10.0, True, layers, (), (), {})


def shares(allocation: sc.Custom) -> list[float]:
    return [s for _, s in allocation.sparsities]


def test_allocation_takes_the_largest_sparsity_within_tolerance():
    result = table([[1, 2, 4], [-1, 3, 0.5], [2, 2, 2]], [100, 100, 100], GRID)
    assert shares(result.allocation(0)) == [0, 0.5, 0]
    assert shares(result.allocation(1)) == [0.5, 0.95, 0]
    assert shares(result.allocation(2)) == [0.7, 0.95, 0.95]
    assert shares(result.allocation(9)) == [0.95, 0.95, 0.95]
    for bad in (-0.1, math.nan):
        with pytest.raises(sc.SecateurError, match="at least 0"):
            result.allocation(bad)


def test_a_drop_that_equals_the_tolerance_but_for_rounding_is_within_it():
    result = Sensitivity(
        {}, (0.5,), 0.911, True, (LayerSensitivity("w", (4,), 4, (2,), (0.901,), False),), (), (), {}
    )
    assert result.drops()["w"][0] > 0.01
    assert shares(result.allocation(0.01)) == [0.5]
    assert shares(result.allocation(0.0099)) == [0.0]


def test_allocation_for_in_closed_form():
    # A drop of t is reached at sparsity 5t in the first layer and 2.5t in the second.
    result = table([[0.1, 0.2], [0.2, 0.4]], [1000, 1000], (0.5, 1.0))
    assert shares(result.allocation_for(0.375)) == [0.5, 0.25]
    assert shares(result.allocation_for(0.75)) == [1.0, 0.5]
    assert shares(result.allocation_for(0.9)) == [1.0, 0.8]
    assert shares(result.allocation_for(0)) == [0.0, 0.0]
    assert shares(result.allocation_for(1)) == [1.0, 1.0]
    # What improves the model goes first, then what is free; ties go in step.
    result = table([[-1, 3], [0, 0], [0, 1]], [1000, 500, 500], (0.5, 0.9))
    assert shares(result.allocation_for(0.2)) == [0.4, 0.0, 0.0]
    assert shares(result.allocation_for(0.25)) == [0.5, 0.0, 0.0]
    assert shares(result.allocation_for(0.3)) == [0.6, 0.0, 0.0]
    # From 600 units to 600 + 450 + 250 at a drop of 0: 850 lie 250/700 of the way.
    assert shares(result.allocation_for(0.425)) == [0.6, 161 / 500, 89 / 500]
    assert shares(result.allocation_for(0.65)) == [0.6, 0.9, 0.5]


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[float]], list[int]]:
    layers = draw(st.integers(1, 6))
    units = draw(st.lists(st.integers(20, 4000), min_size=layers, max_size=layers))
    # Multiples of 1/8 tie often, as accuracies do; the others hardly ever.
    drop = st.integers(-8, 40).map(lambda k: k / 8) | st.floats(-1, 5)
    drops = draw(st.lists(st.lists(drop, min_size=3, max_size=3), min_size=layers, max_size=layers))
    return drops, units


def least(layer: LayerSensitivity, drops: tuple[float, ...], removed: float) -> float:
    """The tolerance at which the curve of a layer passes `removed`."""
    points = [0.0, *drops]
    floor = [min(points[i:]) for i in range(len(points))]
    if removed < 0 or removed > layer.removed[-1]:
        return -math.inf if removed < 0 else math.inf
    return float(np.interp(removed, [0, *layer.removed], floor))


@given(tables(), st.floats(0, 0.93), st.floats(0, 0.93))
def test_allocation_for_meets_the_total_with_one_tolerance_and_grows(drawn, low, high):
    result = table(*drawn, GRID)
    units = [x.units for x in result.layers]
    removed = []
    for sparsity in sorted((low, high)):
        got = [count(s, n) for s, n in zip(shares(result.allocation_for(sparsity)), units, strict=True)]
        assert sum(got) == count(sparsity, sum(units))
        # One tolerance explains every layer, to within the rounding of one unit.
        drops = result.drops()
        must = [least(x, drops[x.name], n - 1) for x, n in zip(result.layers, got, strict=True)]
        may = [least(x, drops[x.name], n + 1) for x, n in zip(result.layers, got, strict=True)]
        assert max(must) <= min(may) + 1e-9
        removed.append(got)
    assert all(a <= b + 1 for a, b in zip(*removed, strict=True))


def test_a_total_beyond_the_grid_is_refused():
    result = table([[1, 2, 3], [1, 2, 3]], [100, 300], GRID)
    assert shares(result.allocation_for(0.95)) == [0.95, 0.95]
    with pytest.raises(sc.BudgetError, match=r"0\.9500 can be removed in all, not 0\.96"):
        result.allocation_for(0.96)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(sc.SparsityError):
            result.allocation_for(bad)


def test_a_gap_is_passed_in_one_jump():
    result = table([[1, 2], [3, 4]], [100, 100], (0.5, 0.9), gap=True)
    for total, wanted in [
        (0.0, [0.0, 0.0]),
        (0.25, [0.5, 0.0]),
        (0.35, [0.7, 0.0]),
        (0.45, [0.9, 0.0]),
        (0.7, [0.9, 0.5]),
        (0.8, [0.9, 0.7]),
    ]:
        assert shares(result.allocation_for(total)) == wanted
    with pytest.raises(sc.BudgetError, match=r"takes 0\.2000 of 0\.weight"):
        result.allocation_for(0.1)
    with pytest.raises(sc.BudgetError, match=r"takes 0\.3000 of 1\.weight"):
        result.allocation_for(0.6)


def test_a_pattern_without_low_sparsities_jumps_over_them():
    model, batches = network(), data()
    result = sensitivity(
        model, sc.Magnitude(), sparsities=GRID, pattern=sc.NM(2, 4), batches=batches, loss=F.cross_entropy
    )
    assert all(x.gap for x in result.layers)
    assert not any(
        x.gap
        for pattern in (sc.Unstructured(), sc.PerRow(), sc.Block(2, 2))
        for x in sensitivity(
            model, sc.Magnitude(), lambda _: 1.0, (0.5,), pattern=pattern, higher_is_better=True
        ).layers
    )
    reached = refused = 0
    for sparsity in np.linspace(0, 0.95, 96).tolist():
        try:
            allocation = result.allocation_for(sparsity)
        except sc.BudgetError as error:
            assert "which its pattern may not have" in str(error)
            refused += 1
            continue
        reached += 1
        pruned = copy.deepcopy(model)
        report = sc.prune_(pruned, sc.Magnitude(), sparsity, pattern=sc.NM(2, 4), allocation=allocation)
        assert report.removed == count(sparsity, report.entries)
    assert reached > 20
    assert refused > 0


@pytest.mark.parametrize("pattern", [None, sc.PerRow(), sc.Block(2, 2)])
def test_both_allocations_feed_prune(pattern):
    model, batches = network(), data()
    x = torch.randn(20, 4, 4, 4)
    dense = copy.deepcopy(model).eval()(x).detach()

    def distance(model: nn.Module) -> float:
        return float((model(x) - dense).norm())

    result = sensitivity(
        model, sc.Wanda(), distance, GRID, higher_is_better=False, pattern=pattern, batches=batches
    )
    tried = set()
    for tolerance in sorted({0.0, *(d for drops in result.drops().values() for d in drops if d > 0)}):
        allocation = result.allocation(tolerance)
        report = sc.prune_(
            copy.deepcopy(model), sc.Wanda(), pattern=pattern, allocation=allocation, batches=batches
        )
        for layer, record, share in zip(result.layers, report.layers, shares(allocation), strict=True):
            assert record.removed * layer.units == count(share, layer.units) * record.entries
        tried.add(report.removed)
    assert len(tried) > 3

    unit = pattern.unit if pattern else 1
    for sparsity in (0.0, 0.123, 0.6, 0.9):
        report = sc.prune_(
            copy.deepcopy(model),
            sc.Wanda(),
            sparsity,
            pattern=pattern,
            allocation=result.allocation_for(sparsity),
            batches=batches,
        )
        assert report.removed == unit * count(sparsity, report.entries // unit)


def test_names_with_brackets_are_names_and_not_globs():
    model = nn.Sequential()
    model.add_module("[a]", nn.Linear(4, 4))
    model.add_module("a", nn.Linear(4, 4))
    model.add_module("head", nn.Linear(4, 1))
    result = sensitivity(
        model, sc.Magnitude(), lambda m: float(m[0].weight.abs().sum()), (0.5,), higher_is_better=True
    )
    report = sc.prune_(model, sc.Magnitude(), allocation=result.allocation(0.0))
    assert {r.name: r.removed for r in report.layers} == {"[a].weight": 0, "a.weight": 8}
    assert "[a].weight" in str(result)


def test_saved_as_json_and_printed(tmp_path):
    model, batches = network(), data()
    result = sensitivity(
        model,
        sc.Magnitude(),
        sparsities=GRID,
        where=sc.Where(exclude="6"),
        batches=batches,
        loss=F.cross_entropy,
    )
    result.save(tmp_path / "sensitivity.json")
    read = json.loads((tmp_path / "sensitivity.json").read_text(), parse_constant=pytest.fail)
    assert read == json.loads(json.dumps(result.to_dict()))
    assert [x["name"] for x in read["layers"]] == ["0.weight", "4.weight"]
    assert read["baseline"] == result.baseline
    assert tuple(read["layers"][1]["drops"]) == result.drops()["4.weight"]
    assert read["skipped"][0] == {"name": "6.weight", "reason": "in exclude='6'"}
    text = str(result)
    assert f"{result.baseline:.5g} with none, lower is better" in text
    assert all(f"{v:.5g}" in text for x in result.layers for v in x.values)


@pytest.mark.realdata("fashion_mnist")
def test_lenet5_is_most_sensitive_in_its_first_layer_and_beats_uniform_pruning():
    model = realdata.lenet5()
    before = state(model)
    train, test = realdata.fashion_mnist("train", 500), realdata.fashion_mnist("test", 500)
    result = sensitivity(model, sc.Magnitude(), lambda m: realdata.accuracy(m, *train), higher_is_better=True)
    assert same(state(model), before)
    assert result.baseline == realdata.accuracy(model, *train) > 0.9
    drops = result.drops()
    # The first convolution has 500 weights and no redundancy; the first linear layer 400,000.
    for conv1, conv2, fc1 in zip(*(drops[f"{n}.weight"] for n in ("conv1", "conv2", "fc1")), strict=True):
        assert fc1 <= conv2 <= conv1
    assert drops["fc1.weight"][0] < 0.01
    assert drops["conv1.weight"][-1] > 0.3

    allocation = result.allocation_for(0.8)
    assert shares(allocation) == sorted(shares(allocation))
    accuracies = []
    for chosen in (allocation, sc.uniform):
        pruned = copy.deepcopy(model)
        report = sc.prune_(pruned, sc.Magnitude(), 0.8, allocation=chosen)
        assert report.removed == count(0.8, report.entries)
        accuracies.append(realdata.accuracy(pruned, *test))
    assert accuracies[0] > accuracies[1] + 0.1
