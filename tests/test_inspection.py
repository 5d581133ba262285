"""Descriptions of weights against closed forms, numpy and scipy."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import secateur as sc
from benchmarks import realdata
from secateur import inspection
from secateur.inspection import BINS, NEAR, REACH, LayerInspection, inspect


def layer_of(weight: torch.Tensor) -> LayerInspection:
    """The inspection of one weight, by way of a model."""
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = nn.Parameter(weight.reshape(1, -1) if weight.dim() < 2 else weight)
    return inspect(linear).layers[0]


def sample(kind: str, n: int, location: float, scale: float) -> torch.Tensor:
    family = stats.laplace if kind == "laplace" else stats.norm
    return torch.from_numpy(family.rvs(location, scale, size=n, random_state=n))


def alive(weight: torch.Tensor) -> np.ndarray:
    w = weight.detach().double().numpy().ravel()
    return w[w != 0]


def agrees_with_scipy(x: LayerInspection, w: np.ndarray) -> None:
    """Everything that is said of the non-zero weights `w`, in float64."""
    assert (x.minimum, x.maximum) == (w.min(), w.max())
    assert x.median == np.median(w)
    assert x.mean == pytest.approx(w.mean(), rel=1e-9, abs=1e-12)
    assert x.sd == pytest.approx(w.std(), rel=1e-10)
    assert x.excess_kurtosis == pytest.approx(stats.kurtosis(w), rel=1e-9, abs=1e-9)
    for fit, family in ((x.gaussian, stats.norm), (x.laplace, stats.laplace)):
        assert (fit.location, fit.scale) == pytest.approx(family.fit(w), rel=1e-9, abs=1e-12)
        frozen = family(fit.location, fit.scale)
        assert fit.log_likelihood == pytest.approx(frozen.logpdf(w).mean(), rel=1e-9, abs=1e-9)
        assert fit.distance == pytest.approx(stats.kstest(w, frozen.cdf).statistic, abs=1e-12)
    assert [n.within for n in x.near_zero] == list(NEAR)
    for near in x.near_zero:
        reach = near.within * x.sd
        assert near.share == (np.abs(w) < reach).mean()
        for said, fit, family in (
            (near.gaussian, x.gaussian, stats.norm),
            (near.laplace, x.laplace, stats.laplace),
        ):
            frozen = family(fit.location, fit.scale)
            assert said == pytest.approx(frozen.cdf(reach) - frozen.cdf(-reach), abs=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 3, 1000, 4321])
def test_statistics_fits_and_distances_are_those_of_scipy(kind, dtype, n):
    weight = sample(kind, n, 0.03, 0.2).to(dtype)
    agrees_with_scipy(layer_of(weight), alive(weight))


def test_chunks_change_nothing(monkeypatch):
    weight = sample("laplace", 1000, 0.1, 1.0).float()
    whole = layer_of(weight)
    monkeypatch.setattr(inspection, "_CHUNK", 7)
    agrees_with_scipy(layer_of(weight), alive(weight))
    assert layer_of(weight).histogram.densities == pytest.approx(whole.histogram.densities, rel=1e-9)


@given(st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0]), min_size=2, max_size=40))
def test_ties_and_zeros_of_any_kind(values):
    weight = torch.tensor(values)
    x = layer_of(weight)
    w = alive(weight)
    assert x.weights == len(values)
    assert x.zeros == values.count(0.0)
    if len(set(w)) > 1:
        agrees_with_scipy(x, w)
    else:
        assert x.gaussian is x.laplace is x.histogram is x.better is x.gain is x.excess_kurtosis is None
        assert x.near_zero == ()


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
@pytest.mark.parametrize(("location", "scale"), [(0.0, 1.0), (-0.4, 0.02), (1e-3, 1e-6)])
def test_samples_are_recognised(kind, location, scale):
    n = 40_000
    x = layer_of(sample(kind, n, location, scale))
    fit, other = (x.gaussian, x.laplace) if kind == "gaussian" else (x.laplace, x.gaussian)
    assert x.better == kind
    assert fit.location == pytest.approx(location, abs=5 * scale / math.sqrt(n))
    assert fit.scale == pytest.approx(scale, rel=5 / math.sqrt(n))
    assert fit.distance < 1.6 / math.sqrt(n) < other.distance
    # Laplace minus Gaussian in closed form: a Gaussian has b = sd sqrt(2/pi), a Laplace sd = b sqrt(2).
    expected = {
        "gaussian": math.log(2 * math.pi * math.e) / 2 - math.log(2 * math.e * math.sqrt(2 / math.pi)),
        "laplace": math.log(math.pi / math.e) / 2,
    }
    assert x.gain == pytest.approx(expected[kind], abs=0.02)
    assert x.excess_kurtosis == pytest.approx(0 if kind == "gaussian" else 3, abs=0.5)


def test_share_near_zero_has_its_closed_forms():
    gaussian = layer_of(sample("gaussian", 100_000, 0.0, 2.0)).near_zero
    laplace = layer_of(sample("laplace", 100_000, 0.0, 2.0)).near_zero
    for g, p in zip(gaussian, laplace, strict=True):
        assert g.share == pytest.approx(math.erf(g.within / math.sqrt(2)), abs=0.01)
        assert p.share == pytest.approx(1 - math.exp(-p.within * math.sqrt(2)), abs=0.01)
        assert g.share == pytest.approx(g.gaussian, abs=0.01)
        assert p.share == pytest.approx(p.laplace, abs=0.01)
    # The observation: a Laplace layer has 13 % of its weights within a tenth of sd, a Gaussian one 8 %.
    assert laplace[0].share > 1.5 * gaussian[0].share


def test_histogram_is_that_of_numpy_and_accounts_for_every_weight():
    weight = sample("laplace", 5000, 0.1, 1.0).float()
    w, x = alive(weight), layer_of(weight)
    h = x.histogram
    assert len(h.edges) == BINS + 1
    assert h.edges[0] == pytest.approx(x.mean - REACH * x.sd)
    assert h.edges[-1] == pytest.approx(x.mean + REACH * x.sd)
    counts, _ = np.histogram(w, bins=h.edges)
    width = h.edges[1] - h.edges[0]
    assert np.allclose(np.array(h.densities) * width * len(w), counts)
    assert h.below == (w < h.edges[0]).sum() > 0
    assert h.above == (w > h.edges[-1]).sum() > 0
    assert sum(h.densities) * width + (h.below + h.above) / len(w) == pytest.approx(1)


def test_the_last_bin_holds_its_right_edge():
    h = layer_of(torch.tensor([-1.0] * 16 + [16.0])).histogram  # mean 0, sd 4
    assert h.edges[-1] == 16.0
    assert (h.densities[-1], h.below, h.above) == (pytest.approx(1 / 17 / 0.4), 0, 0)


def test_float32_values_are_compared_without_rounding_the_bound():
    values = np.array([-0.1, 0.1], dtype=np.float32)  # both a little further out than 0.1
    assert [inspection._position(values, x, after=True) for x in (-0.1, 0.1)] == [1, 1]
    assert [inspection._position(values, x) for x in map(float, values)] == [0, 1]


def test_zeros_are_counted_and_left_out_of_everything_else():
    dense = sample("gaussian", 400, 0.0, 1.0).float().reshape(20, 20)
    holes = torch.cat([dense, torch.zeros(20, 20), -torch.zeros(20, 20)])
    x, y = layer_of(dense), layer_of(holes)
    assert (x.zeros, x.sparsity) == (0, 0.0)
    assert (y.weights, y.zeros, y.sparsity) == (1200, 800, 2 / 3)
    assert (y.mean, y.sd, y.median, y.laplace, y.histogram) == (
        x.mean,
        x.sd,
        x.median,
        x.laplace,
        x.histogram,
    )


@pytest.mark.parametrize("weight", [torch.full((3, 5), 0.1), torch.tensor([[-2.5]])])
def test_weights_that_are_all_alike(weight):
    x = layer_of(weight)
    assert x.minimum == x.maximum == x.mean == x.median == float(weight[0, 0])
    assert x.sd == 0.0
    assert x.gaussian is x.laplace is x.histogram is None


def test_a_layer_of_zeros_has_no_statistics():
    x = layer_of(torch.zeros(3, 4))
    assert (x.zeros, x.sparsity) == (12, 1.0)
    assert x.minimum is x.maximum is x.mean is x.sd is x.median is x.better is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused_with_the_layers_name(bad):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    with torch.no_grad():
        model[1].weight[1, 1] = bad
    with pytest.raises(sc.NonFiniteError, match=r"1\.weight holds NaN or infinite"):
        inspect(model)


def test_selection_totals_and_the_untouched_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 2))
    sc.prune_(model, sc.Magnitude(), 0.25, where=sc.Where(include="0"))
    before = copy.deepcopy(model.state_dict())
    result = inspect(model, sc.Where(exclude="3"))
    assert [(x.name, x.shape, x.zeros) for x in result.layers] == [("0.weight", (8, 3, 3, 3), 54)]
    assert dict(result.skipped) == {"3.weight": "in exclude='3'", "4.weight": "part of the output head"}
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.zeros == 54
    assert result.sparsity == 54 / result.parameters
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_saved_as_json_and_printed(tmp_path):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"[red]": nn.Linear(30, 30), "none": nn.Linear(2, 2)})
            self.head = nn.Linear(2, 2)

    model = Named()
    nn.init.zeros_(model.parts["none"].weight)
    result = inspect(model)
    result.save(tmp_path / "inspection.json")
    data = json.loads((tmp_path / "inspection.json").read_text(), parse_constant=pytest.fail)
    assert data == json.loads(json.dumps(result.to_dict()))
    first, second = data["layers"]
    assert first["laplace"]["distance"] == result.layers[0].laplace.distance
    assert first["better"] == "gaussian"  # uniform weights: the lighter tails are nearer
    assert second["laplace"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["inspection.json"]
    text = str(result)
    assert "parts.[red]" in text
    assert "part of the output head" in text
    assert f"{result.parameters:,} parameters" in text


@pytest.mark.realdata("fashion_mnist")
def test_a_trained_lenet_against_scipy():
    model = realdata.lenet300()
    result = inspect(model)
    assert [x.name for x in result.layers] == ["fc1.weight", "fc2.weight"]
    for x, layer in zip(result.layers, (model.fc1, model.fc2), strict=True):
        agrees_with_scipy(x, alive(layer.weight))
        # Training has piled weights up near zero, more than in a Gaussian with the same spread.
        assert x.excess_kurtosis > 0
        assert x.near_zero[0].share > x.near_zero[0].gaussian


@pytest.mark.realdata("resnet_cifar10")
def test_some_layers_of_a_resnet_are_laplace_and_some_gaussian():
    found = {x.better for x in inspect(realdata.resnet20()).layers}
    assert found == {"laplace", "gaussian"}
