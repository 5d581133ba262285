"""Small experiments that the tests of tickets share."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.lottery import Fit, Lottery, Store


def task(n: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points in the plane and eight useless dimensions; three classes by angle."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 10, generator=g)
    return x, ((torch.atan2(x[:, 0], x[:, 1]) + torch.pi) / (2 * torch.pi) * 3).long().clamp(max=2)


def net(width: float = 1.0) -> nn.Module:
    a, b = max(1, round(24 * width)), max(1, round(16 * width))
    return nn.Sequential(nn.Linear(10, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 3))


def fit(steps: int = 60, **more: Any) -> Fit:
    adam = partial(torch.optim.Adam, lr=0.01)
    given: dict[str, Any] = {"batch": 32, "optimizer": adam, "validation": task(100, 2)} | more
    return Fit(*task(), steps=steps, test=task(300, 1), **given)


class Noisy(nn.Module):
    """With all that a step may change: batch normalisation, dropout, parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(10, 24), nn.BatchNorm1d(24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(F.dropout(self.norm(self.first(x)).relu(), 0.3, self.training))
        return out


def train_noisy(model: nn.Module, trial: sc.Trial) -> None:
    """A loop of one's own: momentum, a schedule, noise on the data."""
    x, y = task()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [20, 30])
    for _ in trial.steps(40, optimizer, scheduler):
        i = trial.batch(len(x), 32)
        noise = 0.1 * torch.randn(32, 10, generator=trial.generator())
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[i] + noise), y[i])
        loss.backward()
        optimizer.step()
        trial.log(loss=loss.item(), rate=optimizer.param_groups[0]["lr"])


def accuracy(model: nn.Module) -> float:
    x, y = task(300, 1)
    return float((model(x).argmax(1) == y).float().mean())


def noisy(**more: Any) -> Lottery:
    given: dict[str, Any] = {"evaluate": accuracy, "levels": 3, "rate": 0.4, "seeds": (0, 1)} | more
    return Lottery(Noisy, train_noisy, **given)


def finished(lottery: Lottery, folder: Path) -> Store:
    lottery(folder)
    return Store(folder)
