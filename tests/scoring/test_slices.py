"""Geometric median and scales of batch norms, against loops."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.errors import StatsError
from secateur.scoring import FPGM, BNScale, score_groups
from tests.reference import close
from tests.scoring.standins import Group, Member, attention, by_loop, cnn, entries, labels, mlp, seeded


@pytest.mark.parametrize("make", [mlp, cnn, attention])
def test_distances_by_loops(make):
    model, groups = make()
    found = score_groups(model, groups, labels, FPGM())
    for group in groups:
        out = [m for m in group.members if m.role == "out"]

        def slice_of(unit, group=group, out=out):
            parts = [entries(model, group, unit, m) for m in out]
            return torch.cat([tensor[mask] for tensor, mask in parts]).double()

        def distances(unit, group=group):
            return sum((slice_of(unit) - slice_of(other)).norm() for other in range(group.size))

        assert close(found[group].values, by_loop(group, distances), 1e-9)


def test_a_filter_that_others_stand_for_goes_first():
    model = nn.Linear(2, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, -4.0], [0.1, 0.1]]))
    group = Group("g", "neurons", 4, (Member("weight", 0, "out"),))
    scores = score_groups(model, [group], labels, FPGM())[group].values
    assert scores.argmin() == 3
    # Pruned filters neither gather the median at zero nor outlive others.
    with torch.no_grad():
        model.weight[3] = 0
    scores = score_groups(model, [group], labels, FPGM())[group].values
    apart = torch.cdist(model.weight[:3].detach().double(), model.weight[:3].detach().double()).sum(1)
    assert close(scores[:3], apart, 1e-9)
    assert scores[3] == 0
    with torch.no_grad():
        model.weight.zero_()
    assert not score_groups(model, [group], labels, FPGM())[group].values.any()


def test_many_units_in_blocks(monkeypatch):
    model = seeded(nn.Linear(7, 33))
    group = Group("g", "neurons", 33, (Member("weight", 0, "out"),))
    whole = score_groups(model, [group], labels, FPGM())[group].values
    monkeypatch.setattr("secateur.scoring.slices._BLOCK", 70)
    assert close(score_groups(model, [group], labels, FPGM())[group].values, whole, 1e-6)


def test_indices_of_no_unit_take_no_part():
    model, (first, _) = mlp()
    pairs = torch.tensor([1, -1, 0, 0, -1, 1])
    group = Group("pairs", "neurons", 2, first.members[:1], {("0.weight", 0): pairs})
    w = model[0].weight.detach().double()
    expected = (w[[2, 3]] - w[[0, 5]]).norm()
    assert close(score_groups(model, [group], labels, FPGM())[group].values, expected.repeat(2), 1e-9)


def test_groups_without_distances():
    model, (first, _) = mlp()
    only = Group("only", "neurons", 6, first.members[1:])
    with pytest.raises(StatsError, match="only has none of role 'out'"):
        score_groups(model, [only], labels, FPGM())
    uneven = {("0.weight", 0): torch.tensor([0, 0, 0, 1, 1, -1])}
    group = Group("uneven", "neurons", 2, first.members[:1], uneven)
    with pytest.raises(StatsError, match=r"those of uneven differ in 0\.weight"):
        score_groups(model, [group], labels, FPGM())


class Frozen(nn.Module):
    """Batch norm as detection models write it: its scale is a parameter here, its class is not torch's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.register_buffer("running_var", torch.ones(size))


def test_scales_of_batch_norms():
    model, groups = cnn()
    found = score_groups(model, groups[:1], labels, BNScale())[groups[0]].values
    assert torch.equal(found, model[1].weight.detach().abs().double())
    with pytest.raises(StatsError, match="BNScale cannot score second: its units pass no batch norm"):
        score_groups(model, groups, labels, BNScale())

    both = nn.ModuleDict({"a": nn.BatchNorm1d(6), "b": Frozen(3), "c": nn.LayerNorm(3)})
    seeded(both)
    members = tuple(Member(f"{m}.weight", 0, "along") for m in "abc")
    pairs = {("a.weight", 0): torch.arange(3).repeat_interleave(2)}
    group = Group("g", "filters", 3, members, pairs)
    expected = (both["a"].weight.view(3, 2).abs().sum(1) + both["b"].weight.abs()) / 3
    assert close(score_groups(both, [group], labels, BNScale())[group].values, expected.detach(), 1e-6)
    half = Group("half", "filters", 3, members[1:2], {("b.weight", 0): torch.tensor([0, 1, -1])})
    with pytest.raises(StatsError, match="not all of its units pass a batch norm"):
        score_groups(both, [half], labels, BNScale())


def test_units_of_a_model_that_trains_stay_apart_from_autograd():
    model, groups = cnn()
    for criterion in (FPGM(), BNScale(), sc.Magnitude()):
        found = score_groups(model, groups[:1], labels, criterion)[groups[0]].values
        assert not found.requires_grad
        assert found.dtype == torch.float64
