"""Winning tickets on scikit-learn's digits, in a minute or two: LeNet-300-100, controls, a picture."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from secateur.demo import digits
from secateur.lottery import Fit, Lottery, RandomTicket, Reinitialised, Twin


class LeNet300(nn.Module):
    """Three linear layers with 300 and 100 units between them.

    Reference: LeCun et al. 1998, Gradient-based learning applied to document recognition.
    """

    def __init__(self, inputs: int, classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x.flatten(1)).relu()
        logits: Tensor = self.fc3(self.fc2(h).relu())
        return logits


def experiment(seeds: Iterable[int] = range(5)) -> Lottery:
    """Down to 2 % of the weights, with re-initialised and random tickets beside."""
    (x, y), test = digits()
    # The last fifth of the training images says where training would have stopped.
    n = len(x) * 4 // 5
    fit = Fit(
        x[:n],
        y[:n],
        steps=300,
        batch=60,
        test=test,
        optimizer=partial(torch.optim.Adam, lr=1.2e-3),
        validation=(x[n:], y[n:]),
    )
    return Lottery(
        partial(LeNet300, 64),
        fit,
        levels=9,
        rate=0.35,
        seeds=seeds,
        controls=[Reinitialised(), RandomTicket(), Twin()],
        name="LeNet-300-100 on digits",
    )
