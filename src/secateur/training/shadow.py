"""Weights behind the weights: the model computes with what a method makes of them, the optimizer moves them.

Movement pruning, L0 gates and STR train dense weights but run the model on masked, gated or thresholded
ones. Between steps a parameter holds the latter, so that the model is a plain module that any loop, wrapper
or compiler runs, and its gradient is the dense one with respect to what it holds. For the step the parameter
holds the dense weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import MaskError
from secateur.core.names import Target


class Shadow:
    """Dense weights of some parameters, by name."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = tuple(targets)
        self.dense = {t.name: t.weight.detach().clone() for t in targets}
        self._begun = False

    @torch.no_grad()
    def show(self) -> None:
        """Parameters hold the dense weights."""
        for t in self.targets:
            t.weight.detach().copy_(self.dense[t.name])

    def begin(self) -> None:
        """The first time, take what the parameters hold: the model may have been loaded since."""
        if not self._begun:
            self.take()
        self._begun = True

    @torch.no_grad()
    def take(self) -> None:
        """The dense weights are what the parameters hold."""
        for t in self.targets:
            self.dense[t.name].copy_(t.weight.detach())

    def state_dict(self) -> dict[str, Tensor]:
        """Copies, for `load`."""
        return {name: w.clone() for name, w in self.dense.items()}

    def load(self, dense: Mapping[str, Tensor]) -> None:
        """Take over saved weights; `MaskError` if they are of another model."""
        for t in self.targets:
            saved = dense.get(t.name)
            if saved is None or saved.shape != t.weight.shape:
                raise MaskError(f"The state has no dense weight of {t.name} in its shape.")
            self.dense[t.name] = saved.detach().to(t.weight, copy=True)
        self._begun = True


class Scores:
    """Parameters of a method with an Adam of their own, without weight decay, or plain sums of gradients.

    They are not the model's, so that neither its optimizer's weight decay nor its state reaches them. Their
    learning rate follows the schedule of the optimizer's first group: it is multiplied by that group's
    learning rate over its first one. A `rate` of None is gradient descent with a rate of 1.
    """

    def __init__(self, values: Mapping[str, Tensor], rate: float | None, maximize: bool = False) -> None:
        self.values = {name: torch.nn.Parameter(v) for name, v in values.items()}
        self.rate = rate
        # Plain gradient descent has no state, so that neither saving nor loading knows of the difference.
        make = (
            partial(torch.optim.SGD, lr=1.0)
            if rate is None
            else partial(torch.optim.Adam, lr=rate, fused=True)
        )
        self._optimizer = make(self.values.values(), maximize=maximize)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name].detach()

    def step(self, gradients: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """One step with these gradients."""
        for name, parameter in self.values.items():
            parameter.grad = gradients[name].to(parameter.dtype)
        group = optimizer.param_groups[0]
        self._optimizer.param_groups[0]["lr"] = (
            (1.0 if self.rate is None else self.rate)
            * float(group["lr"])
            / float(group.get("initial_lr", group["lr"]) or 1.0)
        )
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        """Values and moments, by name."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.values.items():
            state[f"{name}/value"] = parameter.detach().clone()
            for key, moment in self._optimizer.state.get(parameter, {}).items():
                state[f"{name}/{key}"] = moment.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; `MaskError` if it is of another model."""
        for name, parameter in self.values.items():
            saved = state.get(f"{name}/value")
            if saved is None or saved.shape != parameter.shape:
                raise MaskError(f"The state has no scores of {name} in their shape.")
            with torch.no_grad():
                parameter.copy_(saved)
            moments = {
                key.removeprefix(f"{name}/"): value.clone()
                for key, value in state.items()
                if key.startswith(f"{name}/") and not key.endswith("/value")
            }
            if moments:
                self._optimizer.state[parameter] = moments
