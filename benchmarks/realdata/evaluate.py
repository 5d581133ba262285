"""Evaluation that leaves the model as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in.

    Uses `no_grad`, not `inference_mode`: it is as fast, and a module that caches a tensor in its forward pass
    can still be trained afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 100) -> float:
    """The fraction, in [0, 1], of images [N, ...] whose largest logit is at their label [N].

    On a CPU, 50 to 100 images at a time are fastest (1.6 times as fast as 500 for ResNet-20).
    """
    if len(images) != len(labels) or not len(labels):
        raise ValueError(
            f"accuracy needs one label for each image and at least one image, but {len(images)} images and "
            f"{len(labels)} labels were given."
        )
    with evaluating(model):
        pieces = zip(torch.split(images, batch), torch.split(labels, batch), strict=True)
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in pieces)
    return right / len(labels)
