"""Networks that are trained together against the same one after the other."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.errors import ScheduleError, SecateurError
from secateur.lottery import Lottery, Store
from secateur.lottery.together import batchable
from secateur.lottery.trial import Trial
from tests.lottery.helpers import Noisy, fit, net, noisy

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}


def trials(n: int = 4, steps: int = 8) -> list[Trial]:
    found = []
    for seed in range(n):
        torch.manual_seed(seed)
        model = net()
        masks = sc.prune_(model, sc.Random(seed), 0.2 * seed).masks
        found.append(Trial(model, masks, seed=seed))
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_steps_are_equal_to_tolerance(name: str) -> None:
    train = fit(8, optimizer=OPTIMIZERS[name], schedule=sc.milestones(4, factor=0.5, warmup=3), every=2)
    alone, together = trials(), trials()
    for trial in alone:
        trial.model.train()
        train(trial.model, trial)
    train.many(together)
    for a, b in zip(alone, together, strict=True):
        for (n, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=n)
        b.masks.check(b.model)
        assert [s for s, _ in a.log_] == [s for s, _ in b.log_] == [1, 3, 5, 7]
        assert a.log_[-1][1]["loss"] == pytest.approx(b.log_[-1][1]["loss"], rel=1e-4)
        assert a.end is not None and b.end is not None and a.end.step == b.end.step
        assert a.end.optimizer.keys() == b.end.optimizer.keys()
        for key, value in a.end.optimizer.items():
            torch.testing.assert_close(value, b.end.optimizer[key], rtol=1e-3, atol=1e-6)


class Mixed(nn.Module):
    """Linear layers on sequences and without bias, a convolution, a normalisation, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.token, self.last = nn.Linear(4, 6, bias=False), nn.Linear(60, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.conv(x[:, None])).relu().transpose(1, 2)  # [B, 10, 4]
        h = self.token(h) + torch.arange(6) / 6
        out: torch.Tensor = self.last(h.tanh().flatten(1))
        return out


def test_any_architecture_is_batched() -> None:
    train = fit(8, optimizer=OPTIMIZERS["SGD"])
    alone, together = [], []
    for seed in range(3):
        for found in (alone, together):
            torch.manual_seed(seed)
            model = Mixed()
            masks = sc.prune_(model, sc.Magnitude(), 0.3, allocation=sc.global_).masks
            found.append(Trial(model, masks, seed=seed))
    for trial in alone:
        train(trial.model, trial)
    train.many(together)
    for a, b in zip(alone, together, strict=True):
        for (n, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=n)


def test_a_rewound_start_goes_on_with_the_optimizer(tmp_path: Path) -> None:
    """Two experiments that differ only in how they are trained."""
    given = {"levels": 2, "rate": 0.5, "seeds": range(3), "rewind": sc.rewind_to(6)}
    tables = []
    for small in (True, False):
        run = Lottery(net, fit(24, optimizer=OPTIMIZERS["SGD"]), small=small, **given)  # type: ignore[arg-type]
        tables.append(run(tmp_path / str(small)))
    a, b = (Store(tmp_path / name) for name in ("True", "False"))
    assert [r.key for r in tables[0]] == [r.key for r in tables[1]]
    for row in tables[0]:
        assert a.masks(row.key).iou(b.masks(row.key)) > 0.99
        for name, tensor in a.weights(row.key).items():
            torch.testing.assert_close(tensor, b.weights(row.key)[name], rtol=1e-2, atol=1e-3)


def test_only_networks_without_state_are_trained_together(tmp_path: Path) -> None:
    assert batchable(net()) and batchable(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2)))
    assert not batchable(Noisy()) and not batchable(nn.BatchNorm1d(3)) and not batchable(nn.Dropout(0.1))
    assert batchable(nn.Sequential(net(), nn.Dropout(0.0)))
    frozen = net()
    frozen[0].bias.requires_grad_(False)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert not batchable(frozen) and not batchable(tied)
    table = Lottery(Noisy, fit(12), levels=1, seeds=range(2))(tmp_path)  # one after the other
    assert len(table) == 4 and noisy().small


class Drawing(nn.Sequential):
    """Noise that no module says of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, True))


def test_what_does_not_fit_together_is_refused() -> None:
    own = net()
    own.register_buffer("draw", torch.randn(3))  # another one in each network
    assert not batchable(own)
    drawing = [Trial(Drawing(*net()), sc.Masks({}), seed=s) for s in range(2)]
    with pytest.raises(SecateurError, match="pass small=False"):
        fit().many(drawing)
    odd = trials(2)
    odd[1].start = 3
    with pytest.raises(SecateurError, match="one architecture and start"):
        fit().many(odd)
    with pytest.raises(SecateurError, match="one architecture"):
        fit().many([trials(1)[0], Trial(net(2.0), sc.Masks({}), seed=1)])
    late = trials(1)
    late[0].start = 60
    with pytest.raises(ScheduleError, match="cannot start at step 60"):
        fit(60).many(late)
    with pytest.raises(ScheduleError, match="a batch of 1 to 400"):
        fit(batch=500)
