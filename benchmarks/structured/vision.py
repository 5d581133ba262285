"""ResNet-20 on CIFAR-10 (JPEG): data, metric and the recipe of fine-tuning."""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import realdata

from .task import Batch, Split, Target, Task

TRAIN = 45_000  # the last 5,000 training images are for validation
EPOCHS, BATCH, RATE, SHIFT = 3, 128, 0.02, 4
CALIBRATION = 1024


@cache
def _data(split: Split | Literal["train"]) -> tuple[Tensor, Tensor]:
    images, labels = realdata.cifar10("test" if split == "test" else "train", None)
    part = {"test": slice(None), "train": slice(TRAIN), "valid": slice(TRAIN, None)}[split]
    # A copy: a view would keep the other part in memory.
    return images[part].clone(memory_format=torch.channels_last), labels[part]


def _metric(model: nn.Module, split: Split) -> float:
    return realdata.accuracy(model, *_data(split))


def _calibration(seed: int) -> list[Batch]:
    batches = realdata.calibration("cifar10", CALIBRATION * (seed + 1), 128)
    return batches[-CALIBRATION // 128 :]


def tune_(model: nn.Module, steps: int | None, seed: int) -> None:
    """SGD with momentum 0.9, batches of 128, cosine rate from 0.02, weight decay 5e-4, flips and shifts by 4.

    With `steps` the schedule of the rate is that of a run of so many steps.
    """
    images, labels = _data("train")
    pixels_NHWC = images.permute(0, 2, 3, 1)
    draw = torch.Generator().manual_seed(seed)
    per_epoch = TRAIN // BATCH
    total = EPOCHS * per_epoch if steps is None else steps
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    model.train()
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(TRAIN, generator=draw)
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / total))
        rows = order[step % per_epoch * BATCH :][:BATCH]
        loss = F.cross_entropy(model(augment(pixels_NHWC[rows], draw)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def augment(x_NHWC: Tensor, draw: torch.Generator) -> Tensor:
    """Each image shifted by -4..4 pixels and flipped half of the time, as [N, C, H, W], channels_last."""
    n, size = len(x_NHWC), x_NHWC.shape[1]
    padded = F.pad(x_NHWC, (0, 0, SHIFT, SHIFT, SHIFT, SHIFT))
    shift_N2 = torch.randint(0, 2 * SHIFT + 1, (n, 2), generator=draw)
    flip_N1 = torch.rand(n, 1, generator=draw) < 0.5
    along = torch.arange(size)
    rows_NH = shift_N2[:, :1] + along
    columns_NW = shift_N2[:, 1:] + torch.where(flip_N1, size - 1 - along, along)
    taken = padded[torch.arange(n)[:, None, None], rows_NH[:, :, None], columns_NW[:, None, :]]
    return taken.permute(0, 3, 1, 2)


RESNET20 = Task(
    "resnet20",
    "ResNet-20, CIFAR-10 (JPEG): accuracy on the 10,000 test images",
    tuple(Target("macs", 1 - 1 / times, f"MACs / {times:g}") for times in (1.5, 2.0, 3.0)),
    realdata.resnet20,
    lambda: torch.zeros(1, 3, 32, 32),
    _calibration,
    F.cross_entropy,
    _metric,
    batchnorm=True,
    tune=tune_,
    probe=40,
    tuned=("macs",),
)
