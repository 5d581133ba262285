"""Synaptic flow: conservation, a closed form, depth, and the layer collapse that it is there to avoid."""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from tests.reference import Tied, close

CRITERION = sc.SynFlow()
EVERYTHING = sc.Where(also="*.weight")


def scores(model: nn.Module, x: Tensor, where: sc.Where | None = None) -> dict[str, Tensor]:
    stats = sc.collect(model, CRITERION.needs, [x], where=where).stats
    targets = sc.select(model, where).targets
    return {t.name: CRITERION(t.matrix, stats[t.name]) for t in targets}


def mlp(*sizes: int) -> nn.Sequential:
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


def cnn() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, groups=2, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(5),
        nn.Linear(5, 4),
    )
    for _ in range(3):
        model(torch.randn(8, 3, 12, 12) + 1)  # running statistics that are not neutral
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    return model


@pytest.mark.parametrize(
    ("model", "x"),
    [(mlp(6, 9, 4, 7, 3), torch.randn(5, 6)), (cnn(), torch.randn(2, 3, 12, 12))],
    ids=["mlp", "cnn with batch norm"],
)
def test_every_layer_passes_on_the_same_flow(model, x):
    found = scores(model, x, sc.Where(also="*weight"))
    sums = [s.sum().item() for s in found.values()]
    assert len(sums) >= 4
    assert sums == pytest.approx([sums[0]] * len(sums), rel=1e-10)


def test_a_linear_network_of_two_layers_in_closed_form():
    # R = 1^T |B| |A| 1, so the score of A_ij is |A_ij| sum_k |B_ki| and that of B_ki is |B_ki| sum_j |A_ij|.
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    a, b = (layer.weight.detach().double().abs() for layer in model)
    found = scores(model, torch.randn(7, 4), sc.Where(also="1.weight"))
    assert close(found["0.weight"], a * b.sum(0)[:, None], 1e-12)
    assert close(found["1.weight"], b * a.sum(1)[None, :], 1e-12)


def test_signs_biases_data_and_norm_statistics_do_not_matter():
    model, x = cnn(), torch.randn(2, 3, 12, 12)
    other = copy.deepcopy(model).train()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(torch.randint(0, 2, p.shape) * 2 - 1)
        for layer in (other[0], other[4], other[8]):
            layer.bias.normal_()
        other(torch.randn(2, 3, 12, 12) * 7)
    found, again = scores(model, x), scores(other, -3 * torch.randn(5, 3, 12, 12))
    for name in found:
        assert torch.equal(found[name], again[name])


def test_biases_of_any_name_are_left_out():
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
            self.in_proj_bias = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) + self.in_proj_bias)

    found = scores(Module(), torch.randn(1, 3), sc.Where(also="last"))
    assert found["first.weight"].sum().item() == pytest.approx(found["last.weight"].sum().item(), rel=1e-10)


def test_tied_weights_collect_the_flow_of_both_uses():
    model = Tied()
    with torch.no_grad():
        w, head = model.first.weight.double().abs(), model.head.weight.double().abs()
    # tanh would not conserve the flow: the closed form is for the linear network.
    model.forward = lambda x: model.head(model.second(model.first(x)))
    one = torch.ones(5).double()
    down = head.sum(0)
    expected = w * (torch.outer(w.T @ down, one) + torch.outer(down, w @ one))
    assert close(scores(model, torch.randn(2, 5))["first.weight"], expected, 1e-12)


def test_fifty_layers_neither_overflow_nor_underflow():
    for gain in (1e-3, 30.0):
        model = mlp(*[40] * 51)
        for layer in model[::2]:
            nn.init.normal_(layer.weight, std=gain)
        found = scores(model, torch.randn(1, 40))
        sums = [s.sum().item() for s in found.values()]
        assert all(math.isfinite(s) and s > 0 for s in sums)
        assert not all(0 < s < torch.finfo(torch.float32).max and s > 1e-38 for s in sums)
        assert sums == pytest.approx([sums[0]] * len(sums), rel=1e-10)


def kept(report: sc.Report) -> list[int]:
    return [int(mask.count_nonzero()) for mask in report.masks.values()]


def flows(model: nn.Module) -> bool:
    """Whether any path of weights is left from input to output."""
    reach = torch.ones(1, model[0].in_features)
    for layer in model[::2]:
        reach = reach @ layer.weight.detach().abs().T
    return bool(reach.sum() > 0)


def test_iterating_avoids_the_layer_collapse_of_a_single_shot():
    # Wide layers hold many small shares of the same flow, so a single shot empties the widest first; by
    # magnitude, the layers of the smallest initial scale go.
    def prune(criterion: sc.Criterion, rounds: int) -> tuple[list[int], bool]:
        torch.manual_seed(1)
        model = mlp(20, 200, 200, 20, 20, 10)
        report = sc.prune_(
            model,
            criterion,
            0.998,
            allocation=sc.global_,
            where=EVERYTHING,
            rounds=rounds,
            batches=[torch.ones(1, 20)],
        )
        return kept(report), flows(model)

    total = 20 * 200 + 200 * 200 + 200 * 20 + 20 * 20 + 20 * 10
    for criterion, rounds, survives in [
        (sc.SynFlow(), 100, True),
        (sc.SynFlow(), 1, False),
        (sc.Magnitude(), 1, False),
    ]:
        counts, flowing = prune(criterion, rounds)
        assert sum(counts) == total - math.floor(0.998 * total + 0.5)
        assert (min(counts) > 0 and flowing) == survives, (criterion, rounds, counts)


def test_the_criterions_own_rounds_are_used():
    report = sc.prune_(mlp(4, 6, 3), sc.SynFlow(rounds=7), 0.5, batches=[torch.ones(1, 4)])
    assert report.settings["rounds"] == "7"
    with pytest.raises(sc.SecateurError, match="is at least 1"):
        sc.SynFlow(rounds=0)


def test_the_model_is_not_touched():
    model = cnn().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    scores(model, torch.randn(2, 3, 12, 12))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert model.training


def test_a_model_of_several_float_outputs_sums_them_all():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, object]:
            return {"a": self.a(x), "other": [self.b(x), x.argmax(1)]}

    model = Two()
    found = scores(model, torch.randn(1, 3), sc.Where(also="b.weight"))
    for name, s in found.items():
        assert close(s, model.get_parameter(name).detach().abs().double(), 1e-12)


def refused(model: nn.Module, x: Tensor, message: str) -> None:
    with pytest.raises(sc.StatsError, match=message):
        sc.collect(model, CRITERION.needs, [x])


def test_token_ids_cannot_be_all_ones():
    model = nn.Sequential(nn.Embedding(50, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 50))
    refused(model, torch.randint(0, 50, (2, 5)), "needs a floating-point input; this model takes integers")


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.BatchNorm1d(4, track_running_stats=False)],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_of_the_data_at_hand_do_not_conserve_the_flow(norm):
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.ReLU(), nn.Linear(4, 2))
    refused(model, torch.randn(2, 3), rf"1 \({type(norm).__name__}\) normalises by the data")


def test_an_output_without_floats_has_no_flow():
    class Index(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight).argmax(1)

    refused(Index(3, 2), torch.randn(2, 3), "a Tensor holds no float tensor")
