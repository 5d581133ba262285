"""Scores from activations, against explicit forward passes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.core.errors import SecateurError, StatsError
from secateur.scoring import ActivationNorm, APoZ, score_groups
from tests.reference import close, gpt2
from tests.scoring.standins import Group, Member, attention, cnn, labels, mlp, seeded


def images(n: int = 5):
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 1, 3)])
def test_activation_norm_of_filters(p, sizes):
    model, groups = cnn()
    x = images()
    # The second convolution has two groups, so its input has twice the channels that its weight shows.
    model[3] = seeded(nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False))
    model.train()
    inner = Group("inner", "filters", 2, (Member("3.weight", 1, "in"),))
    found = score_groups(model, [inner, groups[1]], labels, ActivationNorm(p), x.split(sizes))
    assert all(m.training for m in model.modules())
    with torch.no_grad():
        model.eval()
        first = model[:3](x)
        second = model[3:5](first)
    # Channel c of the input belongs to index c % 2 of the weight's input dimension.
    channels = (first.abs() ** p).mean(dim=(0, 2, 3)).view(2, 2).sum(0) ** (1 / p)
    assert close(found[inner].values, channels, 1e-6)
    columns = (second.abs() ** p).sum(dim=(2, 3)).mean(0) ** (1 / p)
    assert close(found[groups[1]].values, columns, 1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_average_percentage_of_zeros(threshold):
    model, groups = cnn()
    x = images()
    with torch.no_grad():
        first = model[:3](x)
        second = model[3:5](first)
    found = score_groups(model, groups, labels, APoZ(threshold), x.split(2))
    for group, a in zip(groups, (first, second), strict=True):
        assert close(found[group].values, (a > threshold).double().mean(dim=(0, 2, 3)), 1e-12)
        assert found[group].notes == ()
        assert found[group].values.min() < 1


def test_activations_that_are_never_zero_are_noted():
    model, groups = mlp()
    model[1] = model[3] = nn.GELU()
    found = score_groups(model, groups, labels, APoZ(), [torch.randn(4, 5)])
    assert all("No activation is zero" in s.notes[0] for s in found.values())


class Forked(nn.Module):
    """Two layers take in the same axis, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.a = nn.Linear(6, 3)
        self.b = nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x).relu()
        return self.a(h) + self.b(h) + self.b(input=2 * h)


def test_consumers_are_averaged_and_calls_pooled():
    model = seeded(Forked())
    group = Group("g", "neurons", 6, (Member("a.weight", 1, "in"), Member("b.weight", 1, "in")))
    x = torch.randn(7, 5)
    h = model.first(x).relu().detach().square().mean(0)
    found = score_groups(model, [group], labels, ActivationNorm(), [x])[group].values
    assert close(found, ((h + (h + 4 * h) / 2) / 2).sqrt(), 1e-6)


def test_heads_and_transposed_layers():
    model, groups = attention()
    x = torch.randn(3, 4, 8)
    seen = []
    handle = model.o.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(x)
    handle.remove()
    found = score_groups(model, groups, labels, ActivationNorm(), [x])
    heads = seen[0].view(12, 4, 3).square().sum(2).mean(0)
    assert close(found[groups[0]].values, heads.sqrt(), 1e-6)
    assert close(found[groups[1]].values, heads.view(2, 2).sum(1).sqrt(), 1e-6)

    gpt = seeded(gpt2())
    name = "transformer.h.1.mlp.c_proj"
    group = Group("mlp", "neurons", 64, (Member(f"{name}.weight", 0, "in"),))
    seen.clear()
    gpt.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    ids = torch.randint(0, 50, (2, 5))
    found = score_groups(gpt, [group], labels, ActivationNorm(1), [ids])
    assert close(found[group].values, seen[0].abs().mean(dim=(0, 1)), 1e-6)


def test_transposed_convolutions():
    model = seeded(nn.Sequential(nn.Conv2d(2, 4, 1), nn.ConvTranspose2d(4, 6, 2, groups=2)))
    group = Group("g", "filters", 4, (Member("1.weight", 0, "in"),))
    x = images(2)
    found = score_groups(model, [group], labels, ActivationNorm(), [x])[group].values
    assert close(found, model[0](x).detach().square().mean(dim=(0, 2, 3)).sqrt(), 1e-6)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        return self.lstm(self.first(x))[0]


class Unused(Forked):
    def forward(self, x):
        return self.a(self.first(x).relu())


def test_what_cannot_be_measured():
    model = Recurrent()
    group = Group("g", "neurons", 4, (Member("lstm.weight_ih_l0", 1, "in"),))
    with pytest.raises(StatsError, match=r"none that is a linear or convolution.*lstm\.weight_ih_l0.*Use"):
        score_groups(model, [group], labels, ActivationNorm(), [torch.randn(2, 3, 5)])
    group = Group("g", "neurons", 6, (Member("a.weight", 1, "in"), Member("b.weight", 1, "in")))
    found = score_groups(Unused(), [group], labels, ActivationNorm(), [torch.randn(2, 5)])[group]
    assert found.notes == ("Left out, because its module was never called: b.weight.",)
    group = Group("g", "neurons", 6, (Member("b.weight", 1, "in"),))
    for criterion in (ActivationNorm(), APoZ()):
        with pytest.raises(StatsError, match="no layer that takes it in was called"):
            score_groups(Unused(), [group], labels, criterion, [torch.randn(2, 5)])
        with pytest.raises(StatsError, match=r"must be measured on data: pass batches"):
            score_groups(Unused(), [group], labels, criterion)
    with pytest.raises(SecateurError):
        ActivationNorm(3)
    with pytest.raises(SecateurError):
        APoZ(-1.0)


def test_a_model_that_fails_is_left_as_it_was():
    model, groups = mlp()
    model.train()
    with pytest.raises(RuntimeError):
        score_groups(model, groups, labels, ActivationNorm(), [torch.randn(4, 5), torch.randn(4, 6)])
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert F.relu(model(torch.randn(1, 5))).shape == (1, 3)
