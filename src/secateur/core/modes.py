"""Evaluation mode, transformers without their fused kernel for a while, and caches that go with a mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for all modules, each put back to its own mode afterwards."""
    # Not `model.train(was)`: a frozen norm inside a training model has a mode of its own.
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def unfused() -> Iterator[None]:
    """Transformer layers of torch call their parts; without gradients they are one kernel no hook sees."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Mixtures of transformers multiply with one expert after the other, not with all in one kernel."""
    changed: list[tuple[Any, str]] = []
    for module in model.modules():
        config = getattr(module, "config", None) if hasattr(module, "is_transposed") else None
        chosen = getattr(config, "_experts_implementation", None)
        if isinstance(chosen, str) and chosen != "eager":
            changed.append((config, chosen))
            config._experts_implementation = "eager"  # type: ignore[union-attr]
    try:
        yield
    finally:
        for config, chosen in reversed(changed):
            config._experts_implementation = chosen


def drop_caches(model: nn.Module) -> None:
    """Forget what some models compute from their weights once, in evaluation mode, and drop on `train`."""
    modules = list(model.modules())
    if all(type(m).train is nn.Module.train and "train" not in vars(m) for m in modules):
        return
    modes = [(module, module.training) for module in modules]
    try:
        model.train()
    finally:
        for module, training in modes:
            module.training = training
