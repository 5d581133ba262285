"""Whole models."""

import copy
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from benchmarks import realdata
from secateur.core.errors import MaskError, NonFiniteError, SecateurError, SelectionError, StatsError
from secateur.reconstruct import CrossMoments, Moments, Tokens, consumers_of, moments, reconstruct, repair_


def strongest(*norms: Tensor, count: int) -> Tensor:
    """The `count` units of largest norm, summed over several tensors of one row a unit."""
    total = torch.stack(list(norms)).sum(0)
    return torch.zeros(len(total), dtype=torch.bool).index_fill(0, total.topk(count).indices, True)


def mlp(generator: torch.Generator, *sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
    return model


def halves(model: nn.Sequential) -> tuple[dict[str, Tensor], dict[tuple[str, int], Tensor]]:
    """Half of the neurons of every hidden layer of an `mlp` by the norm of their rows."""
    keeps, slices = {}, {}
    linears = [str(i) for i, m in enumerate(model) if isinstance(m, nn.Linear)]
    for here, following in pairwise(linears):
        rows = model.get_submodule(here).weight.detach().norm(dim=1)
        keep = strongest(rows, count=len(rows) // 2)
        slices[f"{here}.weight", 0] = slices[f"{here}.bias", 0] = keep
        keeps[f"{following}.weight"] = keep
    return keeps, slices


def shrunk(model: nn.Sequential, keeps: dict[str, Tensor]) -> nn.Sequential:
    """An ordinary smaller network, cut by hand."""
    small, keep = copy.deepcopy(model), None
    for i, m in enumerate(small):
        if isinstance(m, nn.Linear):
            if keep is not None:
                m.weight = nn.Parameter(m.weight[:, keep])
            keep = keeps.get(f"{i + 2}.weight")
            if keep is not None:
                m.weight, m.bias = nn.Parameter(m.weight[keep]), nn.Parameter(m.bias[keep])
    return small


def error(dense: nn.Module, small: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y = dense(x)
        return float((y - small(x)).square().sum() / y.square().sum())


@pytest.mark.parametrize("seed", range(5))
def test_sequential_beats_parallel_beats_removal(seed):
    g = torch.Generator().manual_seed(seed)
    dense = mlp(g, 16, 32, 32, 8)
    x = torch.randn(600, 16, generator=g)
    keeps, slices = halves(dense)
    errors = {"plain": error(dense, shrunk(dense, keeps), x)}
    for mode in ("parallel", "sequential"):
        model = copy.deepcopy(dense)
        report = repair_(model, keeps, list(x.split(100)), slices=slices, mode=mode)
        small = shrunk(model, keeps)
        errors[mode] = error(dense, small, x)
        assert [r.name for r in report.layers] == ["2.weight", "4.weight"]
        if mode == "sequential":  # the last layer's own error is that of the network
            assert report.layers[-1].error_after == pytest.approx(errors[mode], rel=1e-3)
    assert errors["sequential"] < errors["parallel"] < errors["plain"]


def test_a_network_with_duplicates_is_recovered(generator):
    model = mlp(generator, 5, 8, 8, 3)
    with torch.no_grad():
        for i in (0, 2):
            model[i].weight[4:], model[i].bias[4:] = 2 * model[i].weight[:4], 2 * model[i].bias[:4]
    keep = torch.arange(8) >= 4
    keeps = {"2.weight": keep, "4.weight": keep}
    slices = {(f"{i}.{what}", 0): keep for i in (0, 2) for what in ("weight", "bias")}
    x = torch.randn(200, 5, generator=generator)
    dense = copy.deepcopy(model)
    repair_(model, keeps, [x], slices=slices, damping=1e-8)
    assert error(dense, shrunk(model, keeps), x) < 1e-8 < 0.05 < error(dense, shrunk(dense, keeps), x)


class Counting:
    """Batches, and how often they were read."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return iter(self.batches)


def test_parallel_is_each_layer_by_itself(generator):
    dense = mlp(generator, 6, 10, 10, 4)
    x = torch.randn(100, 6, generator=generator)
    keeps, slices = halves(dense)
    consumers = consumers_of(dense, keeps)[0]
    wanted, *parts = (moments(dense, consumers, [rows]).moments for rows in (x, x[:50], x[50:]))
    for memory, passes in ((1, 3), (4 << 30, 2)):  # one for each layer or for all, after that for the order
        model, data = copy.deepcopy(dense), Counting([x])
        repair_(model, keeps, data, slices=slices, mode="parallel", memory=memory)
        assert data.passes == passes
        for i in (2, 4):
            layer = dense[i]
            name = f"{i}.weight"
            first, second = (part[name] for part in parts)
            alone = reconstruct(layer.weight, layer.bias, keeps[name], wanted[name], halves=(first, second))
            assert torch.equal(model[i].weight, alone.weight) and torch.equal(model[i].bias, alone.bias)
        assert torch.equal(model[0].weight, dense[0].weight)


def test_order_is_that_of_execution_and_errors_of_rows_that_stay(generator):
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = nn.Linear(8, 2), nn.Linear(8, 8), nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))

    model, x = Backwards(), torch.randn(64, 4, generator=generator)
    keep = torch.arange(8) % 2 == 0
    keeps = {"last.weight": keep, "middle.weight": keep}
    slices = {(f"{n}.{what}", 0): keep for n in ("first", "middle") for what in ("weight", "bias")}
    dense = copy.deepcopy(model)
    report = repair_(model, keeps, [x], slices=slices)
    assert [r.name for r in report.layers] == ["middle.weight", "last.weight"]
    with torch.no_grad():
        h = torch.tanh(dense.first(x))
        y, z = dense.middle(h)[:, keep], (h * keep) @ model.middle.weight[keep].T + model.middle.bias[keep]
    assert report.layers[0].error_after == pytest.approx(
        float((y - z).square().sum() / y.square().sum()), rel=1e-3
    )


def test_sequential_sees_what_the_masked_network_passes_on(generator):
    """A norm mixes the neurons, so those removed from a layer that was repaired must not speak in it."""
    first, middle, last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
    model = nn.Sequential(first, nn.Tanh(), middle, nn.LayerNorm(6, elementwise_affine=False), last)
    dense, x = copy.deepcopy(model), torch.randn(80, 4, generator=generator)
    keep = torch.tensor([True, False, True, True, False, True])
    slices = {(f"{n}.{what}", 0): keep for n in (0, 2) for what in ("weight", "bias")}
    repair_(model, {"2.weight": keep, "4.weight": keep}, [x], slices=slices)
    with torch.no_grad():
        h, z = dense[:4](x), model[3](model[:3](x) * keep)
    alone = reconstruct(dense[4].weight, dense[4].bias, keep, CrossMoments.of(h, z))
    torch.testing.assert_close(last.weight, alone.weight)
    torch.testing.assert_close(last.bias, alone.bias)


class Residual(nn.Module):
    """A block with batch normalisation whose input goes through a projection too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.conv1, self.conv2 = (
            nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        self.bn = nn.BatchNorm2d(8)
        self.project, self.head = nn.Conv2d(6, 8, 1, stride=2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        y = self.conv2(torch.relu_(self.bn(self.conv1(h)))) + self.project(h)
        return self.head(torch.relu(y).mean((2, 3)))


def without(model: Residual, keep6: Tensor, keep8: Tensor, x: Tensor) -> Tensor:
    """The network without channels, written out."""
    h = torch.relu(model.stem(x)) * keep6[:, None, None]
    inner = torch.relu(model.bn(model.conv1(h))) * keep8[:, None, None]
    return model.conv2(inner) + model.project(h)


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_convolutions(generator, mode):
    model = Residual().eval()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.3
    model.bn.running_mean.normal_(generator=generator)
    x = torch.randn(24, 2, 10, 10, generator=generator)
    keep6, keep8 = torch.arange(6) < 4, torch.arange(8) > 2
    keeps = {"conv2.weight": keep8, "conv1.weight": keep6, "project.weight": keep6}
    slices = {("stem.weight", 0): keep6, ("stem.bias", 0): keep6, ("conv1.weight", 0): keep8}
    slices |= {(f"bn.{what}", 0): keep8 for what in ("weight", "bias", "running_mean", "running_var")}
    dense = copy.deepcopy(model)
    report = repair_(model, keeps, list(x.split(10)), slices=slices, mode=mode)
    assert [r.name for r in report.layers] == ["conv1.weight", "project.weight", "conv2.weight"]
    assert not model.conv2.weight[:, ~keep8].any() and not model.project.weight[:, ~keep6].any()
    all6, all8 = torch.ones(6), torch.ones(8)
    with torch.no_grad():
        y = without(dense, all6, all8, x)
        plain, repaired = (without(m, keep6, keep8, x) for m in (dense, model))
    assert (y - repaired).square().sum() < 0.7 * (y - plain).square().sum()
    assert all(r.error_after <= r.error_bias <= r.error_before for r in report.layers)
    sampled = repair_(dense, keeps, list(x.split(10)), slices=slices, mode=mode, tokens=Tokens(positions=9))
    assert [r.tokens for r in sampled.layers] == [24 * 9] * 3 and report.layers[0].tokens == 24 * 25


def test_what_is_left_out_is_said(generator):
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.depthwise, self.b = (
                nn.Conv1d(2, 4, 1),
                nn.Conv1d(4, 4, 3, groups=4),
                nn.Conv1d(4, 2, 1),
            )
            self.idle = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.depthwise(self.a(x)))

    keep = torch.tensor([True, True, False, True])
    names = ["idle.weight", "b.weight", "depthwise.weight"]
    slices = {("depthwise.weight", 0): keep, ("depthwise.bias", 0): keep}
    keeps = {n: keep if n != "depthwise.weight" else torch.ones(1, dtype=torch.bool) for n in names}
    report = repair_(Some(), keeps, [torch.randn(9, 2, 8, generator=generator)], slices=slices)
    assert [r.name for r in report.layers] == ["b.weight"]
    assert [n for n, _ in report.skipped] == ["idle.weight", "depthwise.weight"]
    assert "b.weight" in str(report) and report.to_dict()["layers"][0]["kept"] == 3


def test_experts_with_other_tokens_are_fitted_to_the_dense_ones(generator):
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.expert, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.lift(x)
            chosen = h.sum(1) > 0
            return self.last(h.masked_scatter(chosen[:, None], self.expert(h[chosen])))

    model, keep = Routed(), torch.tensor([True, False, True, True])
    slices = {("lift.weight", 0): keep, ("lift.bias", 0): keep}
    dense, x = copy.deepcopy(model), torch.randn(50, 3, generator=generator)
    report = repair_(model, {"expert.weight": keep, "last.weight": keep}, [x], slices=slices)
    expert, last = report.layers
    assert any("dense model" in note for note in expert.notes)
    assert not any("dense model" in note for note in last.notes)
    h = dense.lift(x)
    alone = reconstruct(dense.expert.weight, dense.expert.bias, keep, Moments.of(h[h.sum(1) > 0]))
    torch.testing.assert_close(model.expert.weight, alone.weight)


def test_errors_leave_the_model_alone(generator):
    model = mlp(generator, 4, 6, 6, 2)
    keeps, slices = halves(model)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(20, 4, generator=generator)
    for wrong, match, kwargs in (
        (MaskError, "6 features", {"keeps": {"2.weight": torch.ones(5, dtype=torch.bool)}}),
        (MaskError, "boolean", {"keeps": {"2.weight": torch.ones(6)}}),
        (MaskError, r"Dimension 0 of 0\.weight", {"slices": {("0.weight", 0): torch.ones(4) > 0}}),
        (MaskError, "differ", {"slices": {("2.weight", 1): ~keeps["2.weight"]}}),
        (SelectionError, "nothing", {"slices": {("nothing", 0): torch.ones(4) > 0}}),
        (SecateurError, "mode", {"mode": "both"}),
        (StatsError, "empty", {"batches": []}),
        (NonFiniteError, r"2\.weight", {"batches": [x, x / 0]}),
    ):
        arguments = {"keeps": keeps, "batches": [x], "slices": slices} | kwargs
        with pytest.raises(wrong, match=match):
            repair_(model, arguments.pop("keeps"), arguments.pop("batches"), **arguments)
    model[4].weight.data[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"4\.weight"):
        repair_(model, keeps, [x], slices=slices)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items() if n != "4.weight")


@pytest.mark.realdata("fashion_mnist")
def test_lenet_without_half_of_its_neurons():
    """Half of both hidden layers by the norm of a neuron's incoming weights; fitted to training images."""
    images, labels = realdata.fashion_mnist("test")
    dense = realdata.lenet300()
    linears = [n for n, m in dense.named_modules() if isinstance(m, nn.Linear)]
    keeps, slices = {}, {}
    for here, following in pairwise(linears):
        norms = dense.get_submodule(here).weight.detach().norm(dim=1)
        keep = strongest(norms, count=len(norms) // 2)
        slices[f"{here}.weight", 0] = slices[f"{here}.bias", 0] = keep
        keeps[f"{following}.weight"] = keep
    batches = realdata.calibration("fashion_mnist", 2000, 500)
    whole = realdata.accuracy(dense, images, labels, batch=1000)
    plain = copy.deepcopy(dense)
    with torch.no_grad():
        for name, keep in keeps.items():
            plain.get_parameter(name)[:, ~keep] = 0
    lost = whole - realdata.accuracy(plain, images, labels, batch=1000)
    assert lost > 0.08
    for mode in ("parallel", "sequential"):
        model = copy.deepcopy(dense)
        repair_(model, keeps, batches, slices=slices, mode=mode)
        assert whole - realdata.accuracy(model, images, labels, batch=1000) < lost / 4
