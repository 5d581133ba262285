"""Re-estimated normalisation statistics against what the definition gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import secateur as sc


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.9), nn.Flatten(), nn.Linear(8 * 36, 4),
        nn.BatchNorm1d(4, momentum=0.3),
    )  # fmt: skip


def test_statistics_of_one_batch_are_its_own_mean_and_variance(generator: torch.Generator) -> None:
    net = network().eval()
    x = torch.randn(16, 3, 8, 8, generator=generator)
    assert sc.reestimate_batchnorm_(net, [(x, None)]) == 2
    with torch.no_grad():
        first = net[0](x)
    torch.testing.assert_close(net[1].running_mean, first.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(net[1].running_var, first.transpose(0, 1).flatten(1).var(dim=1))
    with torch.no_grad():  # dropout is off while measuring
        normal = (first - first.mean(dim=(0, 2, 3), keepdim=True)) / torch.sqrt(
            first.transpose(0, 1).flatten(1).var(dim=1, correction=0)[None, :, None, None] + 1e-5
        )
        second = net[5](normal.relu().flatten(1))
    torch.testing.assert_close(net[6].running_mean, second.mean(dim=0), atol=1e-5, rtol=1e-4)


def test_batches_count_alike_and_only_statistics_change(generator: torch.Generator) -> None:
    net = network().train()
    net[0].eval()
    before = copy.deepcopy(net.state_dict())
    batches = [torch.randn(8, 3, 8, 8, generator=generator) + i for i in range(3)]
    sc.reestimate_batchnorm_(net, batches)
    with torch.no_grad():
        means = torch.stack([net[0](x).mean(dim=(0, 2, 3)) for x in batches])
    torch.testing.assert_close(net[1].running_mean, means.mean(dim=0))
    assert [m.training for m in net] == [False, True, True, True, True, True, True]
    assert net[1].momentum == 0.1 and net[6].momentum == 0.3
    for name, tensor in net.state_dict().items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(tensor, before[name]), name


def test_failure_leaves_everything_as_it_was(generator: torch.Generator) -> None:
    net = network().eval()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(sc.StatsError, match="empty"):
        sc.reestimate_batchnorm_(net, [])
    with pytest.raises(RuntimeError):
        sc.reestimate_batchnorm_(net, [torch.randn(4, 3, 8, 8), torch.randn(4, 5, 8, 8)])

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = network(), nn.BatchNorm1d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    idle = Idle()
    with pytest.raises(sc.StatsError, match="idle"):
        sc.reestimate_batchnorm_(idle, [torch.randn(4, 3, 8, 8)])
    assert torch.equal(idle.used[1].running_var, torch.ones(8))
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(m.training for m in net.modules())


def test_no_normalisation_is_no_work() -> None:
    assert sc.reestimate_batchnorm_(nn.Linear(2, 2), [torch.zeros(1, 2)]) == 0


@pytest.mark.realdata("resnet_cifar10", "cifar10_jpeg")
def test_it_undoes_most_of_the_damage_of_one_shot_pruning() -> None:
    from benchmarks import realdata

    net = realdata.resnet20()
    sc.prune_(net, sc.Magnitude(), 0.7, allocation=sc.global_)
    images, labels = realdata.cifar10("test", 500)
    pruned = realdata.accuracy(net, images, labels)
    sc.reestimate_batchnorm_(net, realdata.calibration("cifar10", 512, 128))
    assert realdata.accuracy(net, images, labels) > pruned + 0.08
