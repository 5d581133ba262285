"""The training loop that all methods share."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import realdata
from benchmarks.training.nets import Net

Attach = Callable[[torch.optim.Optimizer], AbstractContextManager[Any]]


class Fit:
    """Training of one network with one seed: order of the data and augmentation.

    With `dev`, a random tenth of the training images is left out and is what accuracy is measured on.
    """

    def __init__(self, net: Net, seed: int, dev: bool = False) -> None:
        self.net, self.seed = net, seed
        images, labels = net.data("train")
        tenth = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)) % 10 == 0
        self.images, self.labels = (images[~tenth], labels[~tenth]) if dev else (images, labels)
        self._held = (images[tenth], labels[tenth]) if dev else net.data("test")
        self.per_epoch = len(self.images) // net.batch
        self._runs = 0

    def steps(self, epochs: float) -> int:
        """Optimizer steps of so many epochs."""
        return round(epochs * self.per_epoch)

    def train(self, model: nn.Module, attach: Attach | None = None, epochs: float | None = None) -> nn.Module:
        """One cosine from the network's learning rate to zero, under what `attach` puts on the optimizer."""
        steps = self.steps(self.net.epochs if epochs is None else epochs)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=self.net.rate, momentum=0.9, weight_decay=self.net.decay
        )
        plan = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
        )
        self._runs += 1  # another order in every round
        generator = torch.Generator().manual_seed(1000 * self.seed + self._runs)
        model.train()
        with attach(optimizer) if attach else nullcontext():
            order = torch.empty(0, dtype=torch.int64)
            for _ in range(steps):
                if len(order) < self.net.batch:
                    order = torch.randperm(len(self.images), generator=generator)
                part, order = order[: self.net.batch], order[self.net.batch :]
                x = self.images[part]
                optimizer.zero_grad()
                loss = F.cross_entropy(
                    model(augmented(x, generator) if self.net.augmented else x), self.labels[part]
                )
                loss.backward()
                optimizer.step()
                plan.step()
        return model.eval()

    def accuracy(self, model: nn.Module) -> float:
        """On the test images, all of them, or on those left out."""
        return realdata.accuracy(model, *self._held)


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts by up to four pixels over zeros, and mirror images, each image its own."""
    n, _, height, width = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    down, right = torch.randint(0, 9, (2, n), generator=generator)
    mirrored = torch.rand(n, generator=generator) < 0.5
    rows = down[:, None] + torch.arange(height)
    columns = torch.arange(width).expand(n, width)
    columns = right[:, None] + torch.where(mirrored[:, None], columns.flip(1), columns)
    index = torch.arange(n)[:, None, None]
    shifted = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
