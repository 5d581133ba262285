"""What an optimizer remembers of single weights: moments, averages, step sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Update each entry from its own gradient and history alone. Others (Muon, Adafactor, LBFGS, Shampoo) mix
# entries, so that the gradient of a weight that is gone would move those that stay.
_ENTRYWISE = frozenset(
    {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop"}
)


def mixes_entries(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a weight's update may depend on the gradients of other weights of its parameter."""
    kind = type(optimizer)
    return not (kind.__module__.startswith("torch.optim") and kind.__name__ in _ENTRYWISE)


@torch.no_grad()
def forget_(optimizer: torch.optim.Optimizer, parameter: Tensor, which: Tensor) -> None:
    """Reset what `optimizer` remembers of the entries of `parameter` that `which` marks, as if they were new.

    Every tensor of the parameter's shape in its state: momentum, both moments of Adam and their running
    maximum alike. What is kept for a parameter as a whole (the step that bias correction counts from,
    factored second moments) cannot be reset for single entries, and stays.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.masked_fill_(which.to(value.device), _fresh(optimizer, parameter, key))


def _fresh(optimizer: torch.optim.Optimizer, parameter: Tensor, key: str) -> float:
    """The value that an entry of the state starts from: 0 but for two optimizers of torch."""
    settings: dict[str, Any] = next(
        (g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), {}
    )
    if key == "step_size":  # Rprop multiplies it: from 0 it would never move
        return float(settings.get("lr", 0.0))
    if key == "sum":  # Adagrad
        return float(settings.get("initial_accumulator_value", 0.0))
    return 0.0
