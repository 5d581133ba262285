"""What the methods share: a pretrained model with its data, what is to be removed, and the interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

import secateur as sc

Batch = tuple[Any, torch.Tensor]
Split = Literal["valid", "test"]


class Unsupported(Exception):
    """A method cannot do a cell; the reason stands in the table."""


@dataclass(frozen=True)
class Target:
    """What is removed: a fraction of the MACs, all heads, the FFN neurons, blocks' MACs (width) or layers."""

    kind: Literal["macs", "heads", "ffn", "width", "layers"]
    removed: float
    label: str


@dataclass(frozen=True)
class Task:
    """A pretrained model, its data and its metric.

    Attributes:
        make: a fresh model in evaluation mode.
        example: keyword or positional arguments of one forward pass, for the counter of MACs.
        calibration: batches (inputs, target) from training data; the argument is the seed.
        metric: the model on validation data (held out from training) or test data.
        higher: whether a larger metric is better.
        tune: fine-tunes in place by the recipe of the task; the second argument limits the steps.
        probe: steps of fine-tuning by which variants are compared; 0 if the task does not fine-tune.
        tuned: the kinds of target after which the model is fine-tuned.
        share: of the MACs, the part that targets "macs" and "width" are fractions of.
    """

    name: str
    what: str
    targets: tuple[Target, ...]
    make: Callable[[], nn.Module]
    example: Callable[[], Any]
    calibration: Callable[[int], list[Batch]]
    loss: Callable[..., torch.Tensor]
    metric: Callable[[nn.Module, Split], float]
    higher: bool = True
    batchnorm: bool = False
    tune: Callable[[nn.Module, int | None, int], None] | None = None
    probe: int = 0
    tuned: tuple[str, ...] = ()
    share: float = 1.0

    def remains(self, target: Target) -> float:
        """The fraction of the dense model's MACs that a target leaves, where that is what it states."""
        return 1 - target.removed * self.share


class Method(Protocol):
    """A way to prune. `variants` are the settings among which validation data chooses, cell by cell."""

    @property
    def name(self) -> str: ...

    def variants(self, task: Task, target: Target) -> tuple[str, ...]: ...

    def prune(self, model: nn.Module, task: Task, target: Target, variant: str, seed: int) -> nn.Module:
        """The pruned model; may change `model`. Raises `Unsupported` with the reason."""
        ...


def macs(model: nn.Module, task: Task) -> int:
    """Multiply-accumulates of one forward pass on the example of the task."""
    counted = sc.measure(model, task.example(), runs=1).macs
    assert counted is not None
    return counted


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
